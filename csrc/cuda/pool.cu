// Maxima and means over windows of a map, with the statistics of what is stored. A block takes a unit of
// output pixels and up to 8 vectors of 8 channels; a thread one such vector of every rows-th pixel.
#include <cstdint>

#include "activate.h"
#include "device.h"
#include "kernels.h"
#include "numbers.h"
#include "operation_source.h"
#include "pointwise_tile.cuh"

namespace greedynas::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxVectors = 8;  // of a block

// How output pixels and the vectors of their rows are cut.
struct Cut {
  int out_height, out_width;
  int64_t pixels, unit_pixels;
  int vectors, slices, width;
};

template <typename T>
Cut cut_of(const Pool<T>& p) {
  Cut cut{};
  cut.out_height = ceil_div(p.height, p.stride);
  cut.out_width = ceil_div(p.width, p.stride);
  cut.pixels = static_cast<int64_t>(p.images) * cut.out_height * cut.out_width;
  cut.unit_pixels = unit_tiles(cut.pixels) * kTilePixels;
  cut.vectors = row_channels(p.channels) / 8;
  cut.slices = ceil_div(cut.vectors, kMaxVectors);
  cut.width = ceil_div(cut.vectors, cut.slices);
  return cut;
}

// As torch has it, a maximum with NaN in its window is NaN.
__device__ __forceinline__ float larger(float value, float next) {
  return next > value || next != next ? next : value;
}

template <bool kIsMaximum, typename T>
__device__ __forceinline__ void pool_window(const Pool<T>& p, const Cut& cut, int64_t pixel, int channel,
                                            float (&value)[8]) {
  const int64_t row = pixel / cut.out_width, image = row / cut.out_height;
  const int first_row = static_cast<int>(row - image * cut.out_height) * p.stride - p.kernel / 2;
  const int first_column = static_cast<int>(pixel - row * cut.out_width) * p.stride - p.kernel / 2;
  const int top = max(first_row, 0), bottom = min(first_row + p.kernel, p.height);
  const int left = max(first_column, 0), right = min(first_column + p.kernel, p.width);
  const T* const x = p.x + image * p.height * p.width * (8 * cut.vectors) + channel;
  const auto at = [&](int y, int column) {
    return x + (static_cast<int64_t>(y) * p.width + column) * (8 * cut.vectors);
  };
  if (kIsMaximum) load8(value, at(top, left));
#pragma unroll 1
  for (int y = top; y < bottom; ++y) {
#pragma unroll 2
    for (int column = left; column < right; ++column) {
      float next[8];
      load8(next, at(y, column));
#pragma unroll
      for (int i = 0; i < 8; ++i) value[i] = kIsMaximum ? larger(value[i], next[i]) : value[i] + next[i];
    }
  }
  if (kIsMaximum) return;
  const int count = p.pooling == kMean ? (bottom - top) * (right - left) : p.kernel * p.kernel;
  const float share = 1.f / static_cast<float>(count);
#pragma unroll
  for (int i = 0; i < 8; ++i) value[i] *= share;
}

// What comes after the window.
template <typename T>
__device__ __forceinline__ void finish(const Pool<T>& p, int row, int channel, float (&value)[8]) {
  if (p.affine) {
    float scale[8], shift[8];
    load8(scale, p.affine + channel);
    load8(shift, p.affine + row + channel);
#pragma unroll
    for (int i = 0; i < 8; ++i) value[i] = fmaf(value[i], scale[i], shift[i]);
  }
  with_activation(p.activation, [&](auto constant) {
    constexpr int kActivation = decltype(constant)::value;
#pragma unroll
    for (int i = 0; i < 8; ++i) value[i] = activate<kActivation>(value[i], kPlainBound<kActivation>);
  });
}

__device__ __forceinline__ void load_shared8(float (&values)[8], const float4* from) {
  const float4 low = from[0], high = from[1];
  values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
  values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 3)
    pool_kernel(const __grid_constant__ Pool<T> p, const __grid_constant__ Cut cut) {
  if (!computes<T>()) return;
  GREEDYNAS_SHARED(float4, pilots, [2 * kMaxVectors]);
  GREEDYNAS_SHARED(float4, of_threads, [4 * kThreads]);
  const int unit = blockIdx.x / cut.slices, slice = blockIdx.x % cut.slices, thread = threadIdx.x;
  const int rows = kThreads / cut.width, row = thread / cut.width, of_slice = thread % cut.width;
  const int row_floats = 8 * cut.vectors, channel = 8 * (slice * cut.width + of_slice);
  const bool works = row < rows && channel < row_floats;
  const int64_t first = unit * cut.unit_pixels, last = min(first + cut.unit_pixels, cut.pixels);
  float sum[8] = {}, squares[8] = {};
  bool begins = true;  // the same for all threads
  for (int64_t pixel = first + row; begins || pixel < last; pixel += rows, begins = false) {
    float value[8] = {};
    const bool some = works && pixel < last;
    if (some) {
      if (p.pooling == kMaximum) {
        pool_window<true>(p, cut, pixel, channel, value);
      } else {
        pool_window<false>(p, cut, pixel, channel, value);
      }
      finish(p, row_floats, channel, value);
      store8(p.y + pixel * row_floats + channel, value);
      round8<T>(value);
    }
    if (!p.partials) continue;
    if (begins) {  // what the first pixel has is the pilot
      if (some && row == 0) store8(reinterpret_cast<float*>(pilots + 2 * of_slice), value);
      __syncthreads();
    }
    if (!some) continue;
    float pilot[8];
    load_shared8(pilot, pilots + 2 * of_slice);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float distance = value[i] - pilot[i];
      sum[i] += distance;
      squares[i] = fmaf(distance, distance, squares[i]);
    }
  }
  if (!p.partials) return;
  store8(reinterpret_cast<float*>(of_threads + 4 * thread), sum);
  store8(reinterpret_cast<float*>(of_threads + 4 * thread + 2), squares);
  __syncthreads();
  const int c = 8 * slice * cut.width + thread;
  if (thread >= 8 * cut.width || c >= row_floats) return;
  const float* const sums = reinterpret_cast<const float*>(of_threads) + thread / 8 * 16 + thread % 8;
  float total = 0.f, total_squares = 0.f;
  for (int r = 0; r < rows; ++r) {
    total += sums[r * cut.width * 16];
    total_squares += sums[r * cut.width * 16 + 8];
  }
  float* const partials = p.partials + static_cast<int64_t>(unit) * 4 * row_floats + c;
  partials[0] = reinterpret_cast<const float*>(pilots)[thread];
  partials[row_floats] = total;
  partials[2 * row_floats] = total_squares;
  partials[3 * row_floats] = static_cast<float>(last - first);
}

}  // namespace

template <typename T>
void pool(const Pool<T>& node, Stream stream) {
  const Cut cut = cut_of(node);
  if (cut.pixels == 0) return;
  const int64_t units = ceil_div(cut.pixels, cut.unit_pixels);
  GREEDYNAS_LAUNCH((pool_kernel<T>), dim3(static_cast<unsigned>(units * cut.slices)), dim3(kThreads), 0,
                   stream, node, cut);
}

template void pool(const Pool<float>&, Stream);
template void pool(const Pool<BFloat16>&, Stream);
template void pool(const Pool<Half>&, Stream);

}  // namespace greedynas::cuda
