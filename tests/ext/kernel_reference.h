// What the kernels are compared with: plain loops in long double, which carry a bound of the kernels'
// rounding errors along.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "cpu/block_kernels.h"

namespace reference {

using namespace greedynas;
using namespace greedynas::cpu;

using Real = long double;

inline std::mt19937 engine(11);
inline int64_t cases = 0;

inline std::normal_distribution<double> distribution;

inline double normal() { return distribution(engine); }

// A whole number in [low, high].
inline int64_t whole(int64_t low, int64_t high) {
  return low + static_cast<int64_t>(engine() % (high - low + 1));
}

template <typename V>
V pick(std::initializer_list<V> values) {
  return values.begin()[engine() % values.size()];
}

// Half a unit in the last place, relative: of what is computed, and of what is stored.
template <typename T>
constexpr Real kComputeRoundoff = std::numeric_limits<Compute<T>>::epsilon() / 2;
template <typename T>
constexpr Real kStoreRoundoff = sizeof(T) == 2 ? 1.0L / 256 : 0.0L;
// What is subnormal may count as 0; this is more than a sum of such numbers.
template <typename T>
constexpr Real kUnderflow = sizeof(T) < 8 ? 1e-36L : 1e-300L;

inline double value_of(double x) { return x; }
inline float value_of(float x) { return x; }
inline float value_of_bfloat16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float value_of(BFloat16 x) { return value_of_bfloat16(x.bits); }
inline float value_of(TiledBFloat16 x) { return value_of_bfloat16(x.bits); }

template <typename T>
T rounded(double x) {
  if constexpr (sizeof(T) == 2) {
    const auto value = static_cast<float>(x);
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return {0x7fc0};
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
  } else {
    return static_cast<T>(x);
  }
}

template <typename T>
T poison() {
  return rounded<T>(std::numeric_limits<double>::quiet_NaN());
}

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "failed: %s\n", what.c_str());
  std::exit(1);
}

// Memory that begins with a cache line, as the driver's does.
template <typename T>
struct LineAllocator {
  using value_type = T;
  LineAllocator() = default;
  template <typename V>
  LineAllocator(const LineAllocator<V>&) {}
  T* allocate(std::size_t size) {
    return static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t(64)));
  }
  void deallocate(T* memory, std::size_t) { ::operator delete(memory, std::align_val_t(64)); }
  template <typename V>
  bool operator==(const LineAllocator<V>&) const {
    return true;
  }
};
template <typename T>
using Lines = std::vector<T, LineAllocator<T>>;

// An output of exactly `size` values on a cache line's boundary: NaN before the call, and behind it a zone
// that nobody may write to.
template <typename T>
class Output {
 public:
  explicit Output(int64_t size) : size_(size), memory_(size + kGuard, poison<T>()) {
    std::memset(data() + size, kPattern, kGuard * sizeof(T));
  }
  Output(const Output&) = delete;
  T* data() { return memory_.data(); }
  const T* data() const { return memory_.data(); }
  double operator[](int64_t i) const { return value_of(memory_[i]); }

  void check_guard(const std::string& what) const {
    const auto* bytes = reinterpret_cast<const unsigned char*>(data() + size_);
    for (std::size_t i = 0; i < kGuard * sizeof(T); ++i) {
      if (bytes[i] != kPattern) fail(what + ": wrote behind its output, " + std::to_string(i) + " bytes");
    }
  }

 private:
  static constexpr int64_t kGuard = 64;
  static constexpr unsigned char kPattern = 0x5b;
  int64_t size_;
  Lines<T> memory_;
};

// A number and how far a kernel's may be from it.
struct Bounded {
  Real value = 0, error = 0;
};

inline void check(const std::string& what, const std::string& place, double got, const Bounded& expected) {
  const Real value = expected.value;
  bool same = std::abs(got - value) <= expected.error;
  if (std::isnan(value)) same = std::isnan(got);
  if (std::isinf(value)) same = static_cast<Real>(got) == value;
  if (same) return;
  char line[200];
  std::snprintf(line, sizeof line, "expected %.12Lg within %.3Lg, got %.12g", value, expected.error, got);
  fail(what + ", " + place + ": " + line);
}

inline std::string at(std::initializer_list<int64_t> index) {
  std::string text = "[";
  for (const int64_t i : index) text += (text.size() > 1 ? ", " : "") + std::to_string(i);
  return text + "]";
}

// Sums of `terms` products in any order, with or without fused multiplication: (terms + 2) roundoffs of the
// sum of magnitudes, and what the factors bring along. The last term keeps subnormal results from counting.
template <typename T>
class Sum {
 public:
  void add(const Bounded& x, Real w) { add(x, Bounded{w, 0}); }
  void add(const Bounded& x, const Bounded& y) {
    sum_ += x.value * y.value;
    magnitude_ += std::abs(x.value * y.value);
    error_ += x.error * std::abs(y.value) + y.error * std::abs(x.value) + x.error * y.error;
    ++terms_;
  }
  Bounded result() const {
    return {sum_, (terms_ + 2) * kComputeRoundoff<T> * magnitude_ + error_ + kUnderflow<T>};
  }

 private:
  Real sum_ = 0, magnitude_ = 0, error_ = 0;
  int64_t terms_ = 0;
};

inline Real activated(int64_t activation, Real x) {
  const auto clamp_to_six = [](Real y) { return y < 0 ? 0 : (y > 6 ? 6 : y); };
  if (activation == kRelu) return x < 0 ? 0 : x;
  if (activation == kRelu6) return clamp_to_six(x);
  if (activation == kHswish) return x * clamp_to_six(x + 3) / 6;
  if (activation == kSilu) return x / (1 + std::exp(-x));
  return x;
}

// No activation's slope exceeds 1.5. Computing it costs a few roundoffs of the argument, or of 3 where hswish
// adds that, and exponential's own 2 units.
template <typename T>
Bounded activate(int64_t activation, const Bounded& x) {
  const Real value = activated(activation, x.value);
  if (!std::isfinite(x.value)) return {value, 0};
  const Real own = activation >= kHswish ? 10 * kComputeRoundoff<T> * (std::abs(x.value) + 3) : 0;
  return {value, 1.5L * x.error + own};
}

template <typename T>
Bounded affine(const Bounded& x, Real scale, Real shift) {
  const Real product = x.value * scale;
  return {product + shift,
          x.error * std::abs(scale) + 3 * kComputeRoundoff<T> * (std::abs(product) + std::abs(shift))};
}

template <typename T>
Bounded plus(const Bounded& x, Real y) {
  return {x.value + y, x.error + kComputeRoundoff<T> * (std::abs(x.value) + std::abs(y))};
}

// As it comes back from memory.
template <typename T>
Bounded stored(const Bounded& x) {
  return {x.value, x.error + kStoreRoundoff<T> * (std::abs(x.value) + x.error) * 1.001L};
}

// A map in NHWC with zero padding and NaN in the slack rows.
template <typename T>
struct Map {
  int64_t pixels, channels, stride;
  Lines<T> memory;

  // Values of the given mean and of standard deviation 1.
  Map(int64_t pixel_count, int64_t channel_count, double mean = 0)
      : pixels(pixel_count),
        channels(channel_count),
        stride(row_channels<T>(channels)),
        memory((pixel_count + kSlackRows) * stride, T{}) {
    for (int64_t p = 0; p < pixels; ++p) {
      for (int64_t c = 0; c < channels; ++c) set(p, c, mean + normal());
    }
    std::fill(memory.begin() + pixels * stride, memory.end(), poison<T>());
  }
  void set(int64_t p, int64_t c, double x) { memory[p * stride + c] = rounded<T>(x); }
  Real operator()(int64_t p, int64_t c) const { return value_of(memory[p * stride + c]); }
};

// [rows][columns] of values that T can store.
template <typename T>
struct Matrix {
  int64_t rows, columns;
  std::vector<T> values;

  Matrix(int64_t row_count, int64_t column_count, double scale) : rows(row_count), columns(column_count) {
    values.resize(rows * columns);
    for (T& x : values) x = rounded<T>(scale * normal());
  }
  void set(int64_t r, int64_t c, double x) { values[r * columns + c] = rounded<T>(x); }
  Real operator()(int64_t r, int64_t c) const { return value_of(values[r * columns + c]); }

  // Rows are output channels: as block_kernels.h describes packed pointwise weights.
  Lines<T> pointwise(int64_t group_width, int64_t depth_multiple) const {
    const int64_t depth = ceil_div(columns, depth_multiple) * depth_multiple, stride = row_channels<T>(rows);
    const int64_t together = depth_multiple == 1 ? 1 : 2;  // inputs that lie side by side
    Lines<T> packed(stride * depth, T{});
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t group = row / group_width * group_width, width = std::min(group_width, stride - group);
      for (int64_t k = 0; k < columns; ++k) {
        packed[group * depth + (k / together * width + row - group) * together + k % together] =
            values[row * columns + k];
      }
    }
    return packed;
  }

  // Rows are channels, `stride` with padding, columns taps.
  Lines<T> depthwise(int64_t group_width, int64_t stride) const {
    Lines<T> packed(stride * columns, T{});
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t group = row / group_width * group_width, width = std::min(group_width, stride - group);
      for (int64_t tap = 0; tap < columns; ++tap) {
        packed[group * columns + tap * width + row - group] = values[row * columns + tap];
      }
    }
    return packed;
  }
};

// `stride` of them, what is padding zero.
template <typename C>
std::vector<C> channel_values(int64_t channels, int64_t stride, double scale) {
  std::vector<C> values(stride, C(0));
  for (int64_t c = 0; c < channels; ++c) values[c] = static_cast<C>(scale * normal());
  return values;
}

// Of a depthwise convolution's output: [slab][group][pixel of the slab][channel of the group], `stride`
// channels with padding.
struct SlabLayout {
  int64_t images, image_pixels, stride, slab_images, group_width;

  int64_t size() const { return images * image_pixels * stride; }
  int64_t slabs() const { return ceil_div(images, slab_images); }
  int64_t index(int64_t image, int64_t pixel, int64_t channel) const {
    const int64_t slab = image / slab_images, group = channel / group_width * group_width;
    const int64_t in_slab = std::min(slab_images, images - slab * slab_images);
    const int64_t width = std::min(group_width, stride - group);
    return slab * slab_images * image_pixels * stride + group * in_slab * image_pixels +
           ((image % slab_images) * image_pixels + pixel) * width + channel - group;
  }
};

// Checks a unit's [pilot, sum, squares] by the mean and the biased variance that follow from them. The kernel
// adds up distances from the pilot in C, at most kBlockPixels (or two rows' worth, fewer) at a time.
template <typename T>
void check_partials(const std::string& what, const double* unit, int64_t stride, int64_t channel,
                    const std::vector<Bounded>& values) {
  const auto n = static_cast<Real>(values.size());
  Real mean = 0, variance = 0, error = 0, farthest = 0;
  for (const Bounded& x : values) mean += x.value / n;
  for (const Bounded& x : values) {
    variance += (x.value - mean) * (x.value - mean) / n;
    error = std::max(error, x.error);
    farthest = std::max(farthest, std::abs(x.value - values[0].value));
  }
  // One distance is off by this, all terms rounded on the way.
  error = 2 * error + (kBlockPixels + 4) * kComputeRoundoff<T> * (farthest + 2 * error);
  const Real pilot = unit[channel], sum = unit[stride + channel], squares = unit[2 * stride + channel];
  const std::string place = "partials of channel " + std::to_string(channel);
  check(what, place + ", mean", static_cast<double>(pilot + sum / n),
        {mean, error + 1e-15L * std::abs(mean)});
  check(what, place + ", variance", static_cast<double>((squares - sum * sum / n) / n),
        {variance, 4 * error * (farthest + error)});
}

}  // namespace reference
