// Channels of some maps brought into the rows of another: what splits, concatenations and shuffles come to. A
// thread has 8 neighbouring numbers of every step-th row, and loads them as wide as they lie.
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

// How 8 numbers of a row lie where they come from.
enum Lie : int {
  kApart,     // anywhere, or nowhere
  kTogether,  // side by side
  kByTurns,   // four and four side by side, as shuffles of two halves have them
  kEven,      // every other one of 16, from the first on
  kOdd,       // and from the second on
};

// Where they come from.
template <typename From>
struct Origin {
  const From* first[8] = {};  // of the first row; null: zero
  int row[8] = {};            // numbers from one row to the next
  int lie = kApart;

  template <typename To>
  __device__ __forceinline__ Origin(const ArrangeChannels<From, To>& a, int column) {
    int channel = 0;  // of the first number, in its source
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      for (int s = 0; s < a.count; ++s) {
        const ChannelSource<From>& source = a.sources[s];
        const int distance = column + i - source.to_first;
        if (distance < 0 || distance % source.to_step != 0 || distance / source.to_step >= source.count)
          continue;
        const int of_source = source.first + distance / source.to_step * source.step;
        if (i == 0) channel = of_source;
        first[i] = source.map + of_source;
        row[i] = source.row;
      }
    }
    if (lies(0, 1, 1, 8) && aligned(0, 16)) {
      lie = kTogether;
    } else if (lies(0, 2, 1, 4) && lies(1, 2, 1, 4) && aligned(0, 4 * sizeof(From)) &&
               aligned(1, 4 * sizeof(From))) {
      lie = kByTurns;
    } else if (lies(0, 1, 2, 8)) {
      const int odd = channel % 2;
      if (channel - odd + 16 <= row[0] && aligned(0, 16, odd)) lie = odd ? kOdd : kEven;
    }
  }

  // The numbers of the row `pixel`.
  __device__ __forceinline__ void load(int64_t pixel, float (&values)[8]) const {
    if (lie == kTogether) {
      load8(values, first[0] + pixel * row[0]);
    } else if (lie == kByTurns) {
      float even[4], odd[4];
      load4(even, first[0] + pixel * row[0]);
      load4(odd, first[1] + pixel * row[1]);
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = i % 2 ? odd[i / 2] : even[i / 2];
    } else if (lie == kEven || lie == kOdd) {
      const From* const from = first[0] - (lie == kOdd) + pixel * row[0];
      float low[8], high[8];
      load8(low, from);
      load8(high, from + 8);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        values[i] = lie == kOdd ? low[2 * i + 1] : low[2 * i];
        values[i + 4] = lie == kOdd ? high[2 * i + 1] : high[2 * i];
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = first[i] ? number_of(first[i][pixel * row[i]]) : 0.f;
    }
  }

 private:
  // Whether `count` numbers, every `step`-th from `number` on, lie `apart` from each other.
  __device__ __forceinline__ bool lies(int number, int step, int apart, int count) const {
    bool so = first[number] != nullptr;
#pragma unroll
    for (int i = 1; i < 8; ++i) {
      const int at = number + i * step;
      if (i < count) so &= first[at & 7] == first[number] + i * apart && row[at & 7] == row[number];
    }
    return so;
  }
  // Whether the number `before` a number lies at a multiple of `bytes`, in every row.
  __device__ __forceinline__ bool aligned(int number, int bytes, int before = 0) const {
    return reinterpret_cast<uintptr_t>(first[number] - before) % bytes == 0 &&
           row[number] * static_cast<int>(sizeof(From)) % bytes == 0;
  }
};

template <typename From, typename To>
__global__ void __launch_bounds__(kThreads, 3)
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
