// Half precision: 11 bits, from 2^-24 to 65504. Conversions in plain arithmetic, and bounds of its roundings.
#pragma once

#include "kernel_reference.h"

namespace reference {

struct Half {
  uint16_t bits;
};

inline double value_of(Half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  double magnitude = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
  if (exponent == 31) magnitude = fraction ? NAN : INFINITY;
  return x.bits & 0x8000 ? -magnitude : magnitude;
}

// To the nearest, of two equally near ones the even one.
template <>
inline Half rounded<Half>(double x) {
  const auto value = static_cast<float>(x);
  const int sign = std::signbit(value) ? 0x8000 : 0;
  const double magnitude = std::abs(static_cast<double>(value));
  if (std::isnan(magnitude)) return {static_cast<uint16_t>(sign | 0x7e00)};
  if (magnitude >= 65520) return {static_cast<uint16_t>(sign | 0x7c00)};
  // Subnormal numbers have the exponent of the smallest normal ones.
  const int exponent = magnitude == 0 ? -14 : std::max(std::ilogb(magnitude), -14);
  const auto units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return {static_cast<uint16_t>(sign | ((exponent + 14) * 1024 + units))};
}

// Half a unit in the last place: relative, and of subnormal numbers, which have the unit 2^-24.
inline constexpr Real kHalfRoundoff = 1.0L / 2048;
inline constexpr Real kHalfUnderflow = 0x1p-25L;

// Rounded to half precision.
inline Bounded in_half(const Bounded& x) {
  return {x.value, x.error + kHalfRoundoff * (std::abs(x.value) + x.error) + kHalfUnderflow};
}

// Fused products, added up in half precision one after the other: no partial sum is greater than the sum of
// magnitudes, and that grows by (1 + 2^-11)^49 < 1.03 through the roundings. Adding 0 costs nothing.
class HalfSum {
 public:
  void add(const Bounded& x, Real w) {
    sum_ += x.value * w;
    magnitude_ += (std::abs(x.value) + x.error) * std::abs(w);
    error_ += x.error * std::abs(w);
    ++terms_;
  }
  Bounded result() const {
    return {sum_, error_ + terms_ * (1.03L * kHalfRoundoff * magnitude_ + kHalfUnderflow)};
  }

 private:
  Real sum_ = 0, magnitude_ = 0, error_ = 0;
  int64_t terms_ = 0;
};

// Checks a unit's [pilot, sum, squares] of a half-precision output against what is stored.
//
// The bound allows a kernel to add up the distances of as many as 16 outputs, and their squares, in half
// precision before they go on in float. A distance of two halves is rounded once and goes through 15
// additions, each off by 2^-11 of a sum of magnitudes: 16 * 2^-11 of it in all. Squares carry a distance's
// rounding twice and are rounded by 16 fused additions: 18 * 2^-11. In float every term costs a roundoff, and
// distance, square and the conversion another one each.
//
// So that little of this is subnormal, where 2^-25 of each number is lost, the kernel multiplies distances by
// a power of two that makes the mean of the first squares, at least 4, one in [1/4, 4): no more than 2^-25 *
// 4 is lost in relation to that mean, which is at most a fourth of all squares, nor more than the root of
// that of a distance. Where the first outputs are all the same the power of two is 1.
inline void check_half_partials(const std::string& what, const double* unit, int64_t stride, int64_t channel,
                                const std::vector<Real>& values) {
  const auto n = static_cast<Real>(values.size());
  const std::string place = "partials of channel " + std::to_string(channel);
  check(what, place + ", pilot", unit[channel], {values[0], 0});
  Real sum = 0, magnitude = 0, squares = 0;
  bool begins_constant = true;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const Real distance = values[i] - values[0];
    begins_constant = begins_constant && (i >= 4 || distance == 0);
    sum += distance;
    magnitude += std::abs(distance);
    squares += distance * distance;
  }
  const Real in_float = (n + 4) * kComputeRoundoff<float>;
  const Real scale = begins_constant ? 1 : squares, lost = n * kHalfUnderflow;
  check(what, place + ", sum", unit[stride + channel],
        {sum, (16 * kHalfRoundoff + in_float) * magnitude + lost * std::sqrt(scale)});
  check(what, place + ", squares", unit[2 * stride + channel],
        {squares, (18 * kHalfRoundoff + in_float) * squares + lost * scale});
}

}  // namespace reference
