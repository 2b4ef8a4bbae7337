// Powers of two that numbers are multiplied by without rounding.
#pragma once

#include "device.h"

namespace greedynas::cuda {

inline constexpr int kLargestExponent = 100;  // either way

// Magnitudes are compared by their bits, so that NaN is larger than inf and inf than all others.
__device__ __forceinline__ int magnitude_bits(float x) { return __float_as_int(x) & 0x7fffffff; }

__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }
__device__ __forceinline__ int exponent_of(float power) { return (__float_as_int(power) >> 23) - 127; }

// That of the power of two that brings a magnitude to [2^(exponent - 1), 2^exponent); 0 for 0 and what is not
// finite.
__device__ __forceinline__ int exponent_to(int magnitude, int exponent) {
  if (magnitude == 0 || magnitude >= 0x7f800000) return 0;
  const int own = (magnitude >> 23) - 127;  // the magnitude is below 2^(own + 1)
  return min(max(exponent - 1 - own, -kLargestExponent), kLargestExponent);
}

// The largest of `lanes` neighbouring lanes, a power of two.
__device__ __forceinline__ int largest_of_lanes(int magnitude, int lanes) {
  for (int distance = 1; distance < lanes; distance *= 2)
    magnitude = max(magnitude, __shfl_xor_sync(~0u, magnitude, distance));
  return magnitude;
}

}  // namespace greedynas::cuda
