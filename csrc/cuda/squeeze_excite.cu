// squeeze: the means that squeeze-excitation works on. A block takes one image and up to 32 vectors of 8
// channels; a thread one such vector of every rows-th pixel.
#include <algorithm>
#include <cstdint>

#include "activate.h"
#include "choice_block.h"
#include "device.h"
#include "kernels.h"

namespace greedynas::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxVectors = 32;  // of a block
constexpr int kBatch = 4;        // pixels that a thread has on the way

// How the vectors of a pixel's row are cut.
struct Cut {
  int vectors, slices, width;
  __device__ __host__ explicit Cut(int channels)
      : vectors(row_channels(channels) / 8),
        slices(ceil_div(vectors, kMaxVectors)),
        width(ceil_div(vectors, slices)) {}
};

// Every `step`-th pixel from `row` on; `d` and `affine`: of the first pixel and of 8 channels.
template <int kActivation>
__device__ __forceinline__ void sum_pixels(const Squeeze& s, const uint4* d, const float* affine, int vectors,
                                           int row, int step, float (&sum)[8]) {
  float scale[8], shift[8], bound[8];
  load8(scale, affine);
  load8(shift, affine + 8 * vectors);
  load8(bound, affine + 16 * vectors);
  const int pixels = s.image_pixels;
  for (int first = row; first < pixels; first += kBatch * step) {
    uint4 loaded[kBatch] = {};
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int pixel = first + i * step;
      if (pixel < pixels) loaded[i] = d[static_cast<int64_t>(pixel) * vectors];
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i * step >= pixels) break;
      const unsigned words[4] = {loaded[i].x, loaded[i].y, loaded[i].z, loaded[i].w};
      float u[8];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 values = __half22float2(as_half2(words[j]));
        u[2 * j] = values.x * scale[2 * j] + shift[2 * j];
        u[2 * j + 1] = values.y * scale[2 * j + 1] + shift[2 * j + 1];
      }
      activate(u, kActivation, [&](int j, float) { return bound[j]; });
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[j] += u[j];
    }
  }
}

__global__ void __launch_bounds__(kThreads) squeeze_kernel(const __grid_constant__ Group<Squeeze> group) {
  const Squeeze& s = group.nodes[blockIdx.y];
  const Cut cut(s.channels);
  const int image = blockIdx.x / cut.slices, slice = blockIdx.x % cut.slices;
  if (image >= s.images) return;
  const int thread = threadIdx.x, rows = kThreads / cut.width, row = thread / cut.width;
  const int vector = slice * cut.width + thread % cut.width, row_floats = cut.vectors * 8;

  GREEDYNAS_SHARED(float4, of_threads, [kThreads * 2]);
  float sum[8] = {};
  if (row < rows && vector < cut.vectors) {
    const auto* d = reinterpret_cast<const uint4*>(s.d) +
                    static_cast<int64_t>(image) * s.image_pixels * cut.vectors + vector;
    const float* affine = s.affine + 8 * vector;
    switch (s.activation) {
      case kRelu:
        sum_pixels<kRelu>(s, d, affine, cut.vectors, row, rows, sum);
        break;
      case kRelu6:
        sum_pixels<kRelu6>(s, d, affine, cut.vectors, row, rows, sum);
        break;
      case kHswish:
        sum_pixels<kHswish>(s, d, affine, cut.vectors, row, rows, sum);
        break;
      case kSilu:
        sum_pixels<kSilu>(s, d, affine, cut.vectors, row, rows, sum);
        break;
      default:
        sum_pixels<kLinear>(s, d, affine, cut.vectors, row, rows, sum);
    }
  }
  // As single floats eight lanes would meet in each bank.
  of_threads[2 * thread] = float4{sum[0], sum[1], sum[2], sum[3]};
  of_threads[2 * thread + 1] = float4{sum[4], sum[5], sum[6], sum[7]};
  __syncthreads();

  const int c = 8 * slice * cut.width + thread;  // 8 * width is at most kThreads
  if (thread >= 8 * cut.width || c >= row_floats) return;
  const float* sums = reinterpret_cast<const float*>(of_threads);
  float total = 0.f;
  for (int r = 0; r < rows; ++r) total += sums[8 * cut.width * r + thread];
  const float factor = s.factor ? s.factor[c] : 1.f;
  s.pooled[static_cast<int64_t>(image) * row_floats + c] =
      total / (static_cast<float>(s.image_pixels) * factor);
}

}  // namespace

void squeeze(const Group<Squeeze>& group, Stream stream) {
  int blocks = 0;
  for (int i = 0; i < group.count; ++i) {
    blocks = std::max(blocks, group.nodes[i].images * Cut(group.nodes[i].channels).slices);
  }
  GREEDYNAS_LAUNCH(squeeze_kernel, dim3(blocks, group.count), dim3(kThreads), 0, stream, group);
}

}  // namespace greedynas::cuda
