// The activations of what an affine map gives, u, as kernels.h describes them. NaN stays NaN.
#pragma once

#include <type_traits>

#include "choice_block.h"
#include "device.h"

namespace greedynas::cuda {

// The bound of channels that no factor multiplies.
template <int kActivation>
inline constexpr float kPlainBound = kActivation == kRelu6    ? 6.f
                                     : kActivation == kHswish ? 1.f / 6.f
                                                              : 1.f;

template <int kActivation>
__device__ __forceinline__ float activate(float u, float bound) {
  if constexpr (kActivation == kRelu) {
    return u < 0.f ? 0.f : u;
  } else if constexpr (kActivation == kRelu6) {
    const float positive = u < 0.f ? 0.f : u;
    return positive > bound ? bound : positive;
  } else if constexpr (kActivation == kHswish) {
    return u * __saturatef(fmaf(u, bound, 0.5f));
  } else if constexpr (kActivation == kSilu) {
    return __fdividef(u, 1.f + __expf(-u * bound));
  } else {
    return u;
  }
}

// Two of them in half precision.
template <int kActivation>
__device__ __forceinline__ unsigned activate_to_halves(float low, float high, float low_bound,
                                                       float high_bound) {
  if constexpr (kActivation == kRelu) {
    return pack_relu(low, high);
  } else if constexpr (kActivation == kRelu6) {
    return pack_relu6(low, high, low_bound, high_bound);
  } else {
    return pack_half(activate<kActivation>(low, low_bound), activate<kActivation>(high, high_bound));
  }
}

// Calls `function` with the activation as a constant.
template <typename Function>
__device__ __forceinline__ void with_activation(int activation, const Function& function) {
  switch (activation) {
    case kRelu:
      return function(std::integral_constant<int, kRelu>{});
    case kRelu6:
      return function(std::integral_constant<int, kRelu6>{});
    case kHswish:
      return function(std::integral_constant<int, kHswish>{});
    case kSilu:
      return function(std::integral_constant<int, kSilu>{});
    default:
      return function(std::integral_constant<int, kLinear>{});
  }
}

}  // namespace greedynas::cuda
