// The activations of what an affine map gives (kernels.h), in float. NaN stays NaN.
#pragma once

#include "choice_block.h"
#include "device.h"

namespace greedynas::cuda {

// bound(i, plain): the bound of channel i, which is `plain` where no factor multiplies.
template <int kCount, typename Bound>
__device__ __forceinline__ void activate(float (&u)[kCount], int activation, const Bound& bound) {
  if (activation == kLinear) return;
  if (activation == kRelu) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) u[i] = u[i] < 0.f ? 0.f : u[i];
  } else if (activation == kRelu6) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float top = bound(i, 6.f);
      u[i] = u[i] > top ? top : u[i];
      u[i] = u[i] < 0.f ? 0.f : u[i];
    }
  } else if (activation == kHswish) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) u[i] *= __saturatef(u[i] * bound(i, 1.f / 6.f) + 0.5f);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) u[i] = __fdividef(u[i], 1.f + __expf(-u[i] * bound(i, 1.f)));
  }
}

// Eight floats at a multiple of 16 bytes.
__device__ __forceinline__ void load8(float (&to)[8], const float* from) {
  const float4 a = *reinterpret_cast<const float4*>(from), b = *reinterpret_cast<const float4*>(from + 4);
  to[0] = a.x;
  to[1] = a.y;
  to[2] = a.z;
  to[3] = a.w;
  to[4] = b.x;
  to[5] = b.y;
  to[6] = b.z;
  to[7] = b.w;
}

}  // namespace greedynas::cuda
