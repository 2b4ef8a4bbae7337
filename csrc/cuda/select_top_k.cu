// A thread per loss counts those that come before it: that is its place. No order of execution, no memory
// besides the result; the work is quadratic, which a GPU does not notice below ten thousand.
#include "device.h"
#include "kernels.h"

namespace greedynas::cuda {
namespace {

constexpr int kThreads = 256;

// Numbers without a sign in the order of the losses: -0 as 0, NaN last, all of them equal. The largest number
// of 32 bits is not among them.
constexpr unsigned kNanKey = 0xff800001u;
__device__ __forceinline__ unsigned key(float loss) {
  if (loss != loss) return kNanKey;
  const unsigned bits = loss == 0.f ? 0u : __float_as_uint(loss);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__global__ void __launch_bounds__(kThreads) rank_kernel(const __grid_constant__ SelectTopK a) {
  GREEDYNAS_SHARED(unsigned, keys, [kThreads]);
  const int thread = threadIdx.x, tile = blockIdx.x, index = tile * kThreads + thread;
  const unsigned mine = index < a.count ? key(a.losses[index]) : kNanKey;
  int rank = 0;
  for (int first = 0; first < a.count; first += kThreads) {
    __syncthreads();
    // Nothing is before the keys behind the end: no loss has the largest number.
    keys[thread] = first + thread < a.count ? key(a.losses[first + thread]) : ~0u;
    __syncthreads();
    // Of equal ones, those with lower indices come before.
    const int others = first / kThreads;
    const unsigned limit = others < tile ? mine + 1 : mine;
#pragma unroll 16
    for (int i = 0; i < kThreads; ++i) rank += keys[i] < limit;
    if (others == tile) {
      for (int i = 0; i < thread; ++i) rank += keys[i] == mine;
    }
  }
  if (index < a.count && rank < a.k) a.indices[rank] = index;
}

}  // namespace

void select_top_k(const SelectTopK& a, Stream stream) {
  if (a.k == 0) return;
  GREEDYNAS_LAUNCH((rank_kernel), dim3(ceil_div(a.count, kThreads)), dim3(kThreads), 0, stream, a);
}

}  // namespace greedynas::cuda
