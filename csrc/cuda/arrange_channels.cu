// Channels of some maps brought into the rows of another: what splits, concatenations and shuffles come to. A
// thread has 8 neighbouring numbers of every step-th row; where these lie together in one source, at a
// multiple of 16 bytes, they are loaded as a whole.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "activate.h"
#include "device.h"
#include "kernels.h"
#include "numbers.h"

namespace greedynas::cuda {
namespace {

constexpr int kThreads = 256;

__device__ __forceinline__ float number_of(float value) { return value; }
template <typename T>
__device__ __forceinline__ float number_of(T value) {
  return Pair<T>::unpack(value.bits).x;
}
__device__ __forceinline__ void store_number(float* to, float value) { *to = value; }
template <typename T>
__device__ __forceinline__ void store_number(T* to, float value) {
  to->bits = static_cast<uint16_t>(Pair<T>::pack(value, 0.f));
}

// Where 8 numbers of a row come from.
template <typename From>
struct Origin {
  const From* first[8] = {};  // of the first row; null: zero
  int row[8] = {};            // numbers from one row to the next
  bool whole = false;

  template <typename To>
  __device__ __forceinline__ Origin(const ArrangeChannels<From, To>& a, int column) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      for (int s = 0; s < a.count; ++s) {
        const ChannelSource<From>& source = a.sources[s];
        const int distance = column + i - source.to_first;
        if (distance < 0 || distance % source.to_step != 0 || distance / source.to_step >= source.count)
          continue;
        first[i] = source.map + source.first + distance / source.to_step * source.step;
        row[i] = source.row;
      }
    }
    whole = first[0] != nullptr && reinterpret_cast<uintptr_t>(first[0]) % 16 == 0 &&
            row[0] * sizeof(From) % 16 == 0;
#pragma unroll
    for (int i = 1; i < 8; ++i) whole &= first[i] == first[0] + i && row[i] == row[0];
  }
  __device__ __forceinline__ void load(int64_t pixel, float (&values)[8]) const {
    if (whole) {
      load8(values, first[0] + pixel * row[0]);
      return;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = first[i] ? number_of(first[i][pixel * row[i]]) : 0.f;
  }
};

template <typename From, typename To>
__global__ void __launch_bounds__(kThreads)
    arrange_kernel(const __grid_constant__ ArrangeChannels<From, To> a) {
  if (!computes<From>() || !computes<To>()) return;
  const int vectors = ceil_div(a.out_row, 8), width = min(vectors, kThreads), rows = kThreads / width;
  const int vector = blockIdx.y * width + threadIdx.x % width, of_block = threadIdx.x / width;
  if (vector >= vectors || of_block >= rows) return;
  const Origin<From> origin(a, 8 * vector);
  const bool whole = a.out_row % 8 == 0;
  const int64_t step = static_cast<int64_t>(gridDim.x) * rows;
  for (int64_t pixel = static_cast<int64_t>(blockIdx.x) * rows + of_block; pixel < a.pixels; pixel += step) {
    float values[8];
    origin.load(pixel, values);
    with_activation(a.activation, [&](auto constant) {
      constexpr int kActivation = decltype(constant)::value;
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = activate<kActivation>(values[i], kPlainBound<kActivation>);
    });
    To* const to = a.out + pixel * a.out_row + 8 * vector;
    if (whole) {
      store8(to, values);
      continue;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (8 * vector + i < a.out_row) store_number(to + i, values[i]);
    }
  }
}

}  // namespace

template <typename From, typename To>
void arrange_channels(const ArrangeChannels<From, To>& node, Stream stream) {
  if (node.pixels == 0) return;
  const int vectors = ceil_div(node.out_row, 8), width = std::min(vectors, kThreads);
  const int64_t whole = ceil_div(node.pixels, int64_t{kThreads / width});
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(whole, 16 * multiprocessors()));
  GREEDYNAS_LAUNCH((arrange_kernel<From, To>), dim3(blocks, ceil_div(vectors, width)), dim3(kThreads), 0,
                   stream, node);
}

template void arrange_channels(const ArrangeChannels<float, float>&, Stream);
template void arrange_channels(const ArrangeChannels<BFloat16, BFloat16>&, Stream);
template void arrange_channels(const ArrangeChannels<Half, Half>&, Stream);
template void arrange_channels(const ArrangeChannels<BFloat16, float>&, Stream);
template void arrange_channels(const ArrangeChannels<Half, float>&, Stream);

}  // namespace greedynas::cuda
