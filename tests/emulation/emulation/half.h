// Numbers of 16 bits: half precision, pairs of it, bfloat16, and conversions.
#pragma once

#include <cstdint>
#include <cstring>

#include "language.h"

using __half = _Float16;
struct alignas(4) __half2 {
  __half x, y;
};

inline unsigned short __half_as_ushort(__half h) {
  std::uint16_t bits;
  std::memcpy(&bits, &h, 2);
  return bits;
}
inline __half __ushort_as_half(unsigned short bits) {
  __half h;
  std::memcpy(&h, &bits, 2);
  return h;
}
inline float __half2float(__half h) { return static_cast<float>(h); }
inline __half __float2half_rn(float f) { return static_cast<__half>(f); }

inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __half2 __float2half2_rn(float x) { return __floats2half2_rn(x, x); }
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
inline __half __low2half(__half2 h) { return h.x; }
inline __half __high2half(__half2 h) { return h.y; }
inline float __low2float(__half2 h) { return __half2float(h.x); }
inline float __high2float(__half2 h) { return __half2float(h.y); }

namespace emu {

// One rounding: a product of two halves is exact in double, and so is the sum but for extreme exponents.
inline __half fused_multiply_add(__half a, __half b, __half c) {
  return static_cast<__half>(static_cast<double>(a) * static_cast<double>(b) + static_cast<double>(c));
}
// NaN if one of them is.
inline __half max_nan(__half a, __half b) { return a != a ? a : b != b ? b : a > b ? a : b; }
inline __half min_nan(__half a, __half b) { return a != a ? a : b != b ? b : a < b ? a : b; }

inline float bfloat16_value(unsigned bits) {
  bits <<= 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline float half_value(unsigned bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}
// To the nearest, ties to even; NaN is the one that devices give.
inline unsigned bfloat16_bits(float f) {
  std::uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return f != f ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

}  // namespace emu

inline __half2 __hadd2(__half2 a, __half2 b) {
  return __floats2half2_rn(__low2float(a) + __low2float(b), __high2float(a) + __high2float(b));
}
inline __half2 __hsub2(__half2 a, __half2 b) {
  return __floats2half2_rn(__low2float(a) - __low2float(b), __high2float(a) - __high2float(b));
}
inline __half2 __hmul2(__half2 a, __half2 b) {
  return __floats2half2_rn(__low2float(a) * __low2float(b), __high2float(a) * __high2float(b));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return {emu::fused_multiply_add(a.x, b.x, c.x), emu::fused_multiply_add(a.y, b.y, c.y)};
}
inline __half2 __hmax2_nan(__half2 a, __half2 b) { return {emu::max_nan(a.x, b.x), emu::max_nan(a.y, b.y)}; }
inline __half2 __hmin2_nan(__half2 a, __half2 b) { return {emu::min_nan(a.x, b.x), emu::min_nan(a.y, b.y)}; }

namespace greedynas::cuda {

// Two in a register, the first one in the low half.
inline unsigned pack_half(float low, float high) {
  return __half_as_ushort(__float2half_rn(low)) |
         static_cast<unsigned>(__half_as_ushort(__float2half_rn(high))) << 16;
}
inline unsigned pack_half_relu(float low, float high) {
  return pack_half(low < 0.f ? 0.f : low, high < 0.f ? 0.f : high);
}
inline unsigned pack_bf16(float low, float high) {
  return emu::bfloat16_bits(low) | emu::bfloat16_bits(high) << 16;
}
inline unsigned subtract_bf16(unsigned a, unsigned b) {
  return pack_bf16(emu::bfloat16_value(a & 0xffff) - emu::bfloat16_value(b & 0xffff),
                   emu::bfloat16_value(a >> 16) - emu::bfloat16_value(b >> 16));
}

}  // namespace greedynas::cuda
