// Numbers of 16 bits, by their type: two in a register, the first one in the low half, and eight in 16 bytes.
// Kernels of BFloat16 and of Half maps are the same but for these.
#pragma once

#include <type_traits>

#include "device.h"
#include "kernels.h"

namespace greedynas::cuda {

// Whether the code is compiled for a device that computes with T; kernels have no body where it is not.
template <typename T>
__device__ __forceinline__ constexpr bool computes() {
  return !std::is_same_v<T, BFloat16> || since_sm80();
}

template <typename T>
struct Pair;

template <>
struct Pair<BFloat16> {
  static constexpr unsigned kOnes = 0x3f803f80u;

  static __device__ __forceinline__ unsigned pack(float low, float high) { return pack_bf16(low, high); }
  static __device__ __forceinline__ float2 unpack(unsigned pair) {
    return float2{low_bf16(pair), high_bf16(pair)};
  }
  static __device__ __forceinline__ unsigned subtract(unsigned a, unsigned b) { return subtract_bf16(a, b); }
  // c += A B (device.h), and c = A B: no registers to clear first.
  static __device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                                  unsigned b1 GREEDYNAS_PLACE) {
    multiply_bf16(c, a, b0, b1 GREEDYNAS_SAME_PLACE);
  }
  static __device__ __forceinline__ void multiply_first(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                                        unsigned b1 GREEDYNAS_PLACE) {
    multiply_bf16_first(c, a, b0, b1 GREEDYNAS_SAME_PLACE);
  }
};

template <>
struct Pair<Half> {
  static constexpr unsigned kOnes = 0x3c003c00u;

  static __device__ __forceinline__ unsigned pack(float low, float high) { return pack_half(low, high); }
  static __device__ __forceinline__ float2 unpack(unsigned pair) { return __half22float2(as_half2(pair)); }
  static __device__ __forceinline__ unsigned subtract(unsigned a, unsigned b) {
    return as_bits(__hsub2(as_half2(a), as_half2(b)));
  }
  static __device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                                  unsigned b1 GREEDYNAS_PLACE) {
    multiply_half(c, a, b0, b1 GREEDYNAS_SAME_PLACE);
  }
  static __device__ __forceinline__ void multiply_first(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                                        unsigned b1 GREEDYNAS_PLACE) {
    multiply_half_first(c, a, b0, b1 GREEDYNAS_SAME_PLACE);
  }
};

// Eight floats at a multiple of 16 bytes, which the kernel does not write.
__device__ __forceinline__ void load8(float (&values)[8], const float* from) {
  const float4 low = __ldg(reinterpret_cast<const float4*>(from));
  const float4 high = __ldg(reinterpret_cast<const float4*>(from) + 1);
  values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
  values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
}

template <typename T>
__device__ __forceinline__ void unpack(float (&x)[8], const uint4& words) {
  const unsigned w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = Pair<T>::unpack(w[i]);
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}

template <typename T>
__device__ __forceinline__ uint4 pack(const float (&x)[8]) {
  return {Pair<T>::pack(x[0], x[1]), Pair<T>::pack(x[2], x[3]), Pair<T>::pack(x[4], x[5]),
          Pair<T>::pack(x[6], x[7])};
}

// Four numbers, at a multiple of 8 bytes (floats: of 16); eight of a map, at a multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ void load4(float (&x)[4], const T* from) {
  const uint2 words = *reinterpret_cast<const uint2*>(from);
  const float2 low = Pair<T>::unpack(words.x), high = Pair<T>::unpack(words.y);
  x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
}
__device__ __forceinline__ void load4(float (&x)[4], const float* from) {
  const float4 words = __ldg(reinterpret_cast<const float4*>(from));
  x[0] = words.x, x[1] = words.y, x[2] = words.z, x[3] = words.w;
}
template <typename T>
__device__ __forceinline__ void load8(float (&x)[8], const T* from) {
  const uint4 words = *reinterpret_cast<const uint4*>(from);  // one load
  unpack<T>(x, words);
}

// As they are once they have been stored.
template <typename T>
__device__ __forceinline__ void round8(float (&x)[8]) {
  if constexpr (!std::is_same_v<T, float>) unpack<T>(x, pack<T>(x));
}

// Two neighbours, at a multiple of their size; and eight, at a multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ void store2(T* to, float low, float high) {
  *reinterpret_cast<unsigned*>(to) = Pair<T>::pack(low, high);
}
__device__ __forceinline__ void store2(float* to, float low, float high) {
  *reinterpret_cast<float2*>(to) = float2{low, high};
}
template <typename T>
__device__ __forceinline__ void store8(T* to, const float (&x)[8]) {
  *reinterpret_cast<uint4*>(to) = pack<T>(x);
}
__device__ __forceinline__ void store8(float* to, const float (&x)[8]) {
  reinterpret_cast<float4*>(to)[0] = float4{x[0], x[1], x[2], x[3]};
  reinterpret_cast<float4*>(to)[1] = float4{x[4], x[5], x[6], x[7]};
}

}  // namespace greedynas::cuda
