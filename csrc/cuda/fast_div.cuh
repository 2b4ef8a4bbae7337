// Division by a number that stays the same.
#pragma once

#include "device.h"

namespace greedynas::cuda {

// n / d for n * d < 2^32, without a branch (a branch makes nvcc duplicate loops).
struct FastDiv {
  unsigned d, magic, one;
  __device__ __forceinline__ void set(unsigned v) {
    d = v;
    magic = v > 1 ? 0xffffffffu / v + 1 : 0;
    one = v > 1 ? 0 : ~0u;
  }
  __device__ __forceinline__ unsigned operator()(unsigned n) const { return __umulhi(n, magic) + (n & one); }
};

}  // namespace greedynas::cuda
