// A row of logits (a path, an image) is read once into registers, by a warp or, where it is long, by a block.
// As torch's log_softmax: the largest logit first, then the sum of exponentials, so that inf and NaN go the
// same ways.
#include <cmath>

#include "device.h"
#include "kernels.h"

namespace greedynas::cuda {
namespace {

constexpr int kThreads = 256;
constexpr float kInfinity = __builtin_huge_valf();

struct Best {
  float value;
  int index;
};

// As torch.argmax: the first of the largest values, NaN being larger than all.
__device__ __forceinline__ bool is_better(const Best& a, const Best& b) {
  const bool a_is_nan = a.value != a.value, b_is_nan = b.value != b.value;
  if (a_is_nan != b_is_nan) return a_is_nan;
  if (a.value > b.value) return true;
  return (a_is_nan || a.value == b.value) && a.index < b.index;
}

__device__ __forceinline__ Best best_of_warp(Best best) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const Best other{__shfl_xor_sync(~0u, best.value, distance), __shfl_xor_sync(~0u, best.index, distance)};
    if (is_better(other, best)) best = other;
  }
  return best;
}

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

// Sums over a row with the largest of its logits.
struct Sums {
  float exponentials = 0;
  float gaps = 0;  // sum of (largest - logit); differences first, so that large logits do not cancel
  __device__ __forceinline__ void add(float gap) {
    exponentials += std::exp(-gap);
    gaps += gap;
  }
};

__global__ void __launch_bounds__(kThreads) zero_kernel(int64_t* values, int count) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i < count) values[i] = 0;
}

// kRowThreads threads per row, kHeld logits in the registers of each. A block reads what is left of a longer
// row twice; a warp's row is not longer.
template <int kRowThreads, int kHeld>
__global__ void __launch_bounds__(kThreads) loss_kernel(const __grid_constant__ PathCrossEntropy a) {
  static_assert(kRowThreads == 32 || kRowThreads == kThreads);
  constexpr bool kBlock = kRowThreads != 32;
  const int64_t row = int64_t{blockIdx.x} * (kThreads / kRowThreads) + threadIdx.x / kRowThreads;
  if (row >= int64_t{a.paths} * a.images) return;
  const int64_t path = row / a.images;
  const int classes = a.classes, thread = threadIdx.x % kRowThreads;
  const int64_t target = a.targets[row - path * a.images];
  const float* logits = a.logits + row * classes;

  float held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int c = thread + i * kRowThreads;
    held[i] = c < classes ? logits[c] : -kInfinity;
  }
  Best best{held[0], thread};  // a thread without a class has a higher index than all that have one
#pragma unroll
  for (int i = 1; i < kHeld; ++i) {
    const Best other{held[i], thread + i * kRowThreads};
    if (is_better(other, best)) best = other;
  }
  if constexpr (kBlock) {
#pragma unroll 8
    for (int c = thread + kHeld * kRowThreads; c < classes; c += kRowThreads) {
      const Best other{logits[c], c};
      if (is_better(other, best)) best = other;
    }
  }
  best = best_of_warp(best);
  if constexpr (kBlock) {
    GREEDYNAS_SHARED(Best, bests, [kThreads / 32]);
    if (thread % 32 == 0) bests[thread / 32] = best;
    __syncthreads();
    best = best_of_warp(bests[thread % (kThreads / 32)]);
  }

  Sums sums;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (thread + i * kRowThreads < classes) sums.add(best.value - held[i]);
  }
  if constexpr (kBlock) {
#pragma unroll 8
    for (int c = thread + kHeld * kRowThreads; c < classes; c += kRowThreads)
      sums.add(best.value - logits[c]);
  }
  sums = {sum_of_warp(sums.exponentials), sum_of_warp(sums.gaps)};
  if constexpr (kBlock) {
    GREEDYNAS_SHARED(Sums, parts, [kThreads / 32]);
    if (thread % 32 == 0) parts[thread / 32] = sums;
    __syncthreads();
    sums = {};
#pragma unroll
    for (int warp = 0; warp < kThreads / 32; ++warp) {
      sums.exponentials += parts[warp].exponentials;
      sums.gaps += parts[warp].gaps;
    }
  }
  if (thread != 0) return;

  if (target < 0 || target >= classes) {
    atomicExch(a.status, 1);  // as other warps may, at the same time
    a.image_losses[row] = kInfinity - kInfinity;
    return;
  }
  const float log_sum = std::log(sums.exponentials);
  float loss = best.value - logits[target] + log_sum;
  if (a.label_smoothing > 0) {  // not a branch to save work: 0 * inf would be NaN where torch has none
    const auto n = static_cast<float>(classes);
    loss = (1 - a.label_smoothing) * loss + a.label_smoothing * (sums.gaps / n + log_sum);
  }
  a.image_losses[row] = loss;
  // Integers: the order does not matter.
  if (best.index == target) atomicAdd(reinterpret_cast<unsigned long long*>(a.correct + path), 1ull);
}

template <int kRowThreads, int kHeld>
void launch_losses(const PathCrossEntropy& a, Stream stream) {
  const int64_t blocks = ceil_div(int64_t{a.paths} * a.images, int64_t{kThreads / kRowThreads});
  GREEDYNAS_LAUNCH((loss_kernel<kRowThreads, kHeld>), dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0,
                   stream, a);
}

}  // namespace

void path_cross_entropy(const PathCrossEntropy& a, Stream stream) {
  if (a.paths == 0) return;
  GREEDYNAS_LAUNCH((zero_kernel), dim3(ceil_div(a.paths, kThreads)), dim3(kThreads), 0, stream, a.correct,
                   a.paths);
  if (a.images == 0) return;
  if (a.classes <= 32 * 8) {
    launch_losses<32, 8>(a, stream);
  } else if (a.classes <= 32 * 32) {
    launch_losses<32, 32>(a, stream);
  } else {
    launch_losses<kThreads, 16>(a, stream);
  }
}

}  // namespace greedynas::cuda
