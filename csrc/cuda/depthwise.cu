// A depthwise convolution of a map that no BatchNorm follows: what is stored may be of any range, so it is of
// the map's type. A thread computes 8 channels of kStrip neighbouring pixels of a row, so that each of its
// weights is loaded once for all of them; what is read is activated each time, for it costs less than to
// store it.
#include <algorithm>
#include <cstdint>

#include "activate.h"
#include "device.h"
#include "kernels.h"
#include "numbers.h"

namespace greedynas::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxVectors = 8;  // of a block
constexpr int kStrip = 4;

// How the output is cut: rows of pixels into strips, rows of channels into slices of vectors.
struct Cut {
  int out_height, out_width, row_strips;
  int64_t strips;
  int vectors, slices, width;
};

template <typename T>
Cut cut_of(const DepthwiseConv<T>& n) {
  Cut cut{};
  cut.out_height = ceil_div(n.height, n.stride);
  cut.out_width = ceil_div(n.width, n.stride);
  cut.row_strips = ceil_div(cut.out_width, kStrip);
  cut.strips = static_cast<int64_t>(n.images) * cut.out_height * cut.row_strips;
  cut.vectors = row_channels(n.channels) / 8;
  cut.slices = ceil_div(cut.vectors, kMaxVectors);
  cut.width = ceil_div(cut.vectors, cut.slices);
  return cut;
}

// The sums of a strip, whose windows begin at (row, column) of an image, which may lie outside. `x`,
// `weight`, `affine`: of 8 channels.
template <int kActivation, typename T>
__device__ __forceinline__ void convolve(const DepthwiseConv<T>& n, int row_floats, const T* x,
                                         const float* weight, const float* affine, int row, int column,
                                         float (&sums)[kStrip][8]) {
  float scale[8], shift[8] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i) scale[i] = 1.f;
  if (affine) {
    load8(scale, affine);
    load8(shift, affine + row_floats);
  }
  for (int ky = max(0, -row); ky < min(n.kernel, n.height - row); ++ky) {
    const T* const line = x + static_cast<int64_t>(row + ky) * n.width * row_floats;
    for (int kx = 0; kx < n.kernel; ++kx) {
      float w[8];
      load8(w, weight + (ky * n.kernel + kx) * row_floats);
#pragma unroll
      for (int o = 0; o < kStrip; ++o) {
        const int at = column + kx + o * n.stride;
        if (at < 0 || at >= n.width) continue;
        float value[8];
        load8(value, line + static_cast<int64_t>(at) * row_floats);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float u = fmaf(value[i], scale[i], shift[i]);
          sums[o][i] = fmaf(activate<kActivation>(u, kPlainBound<kActivation>), w[i], sums[o][i]);
        }
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    plain_depthwise_kernel(const __grid_constant__ DepthwiseConv<T> n, const __grid_constant__ Cut cut) {
  if (!computes<T>()) return;
  const int rows = kThreads / cut.width, slice = blockIdx.x % cut.slices;
  const int channel = 8 * (slice * cut.width + static_cast<int>(threadIdx.x) % cut.width);
  const int of_block = static_cast<int>(threadIdx.x) / cut.width, row_floats = 8 * cut.vectors;
  const int64_t strip = static_cast<int64_t>(blockIdx.x / cut.slices) * rows + of_block;
  if (of_block >= rows || channel >= row_floats || strip >= cut.strips) return;
  const int64_t line = strip / cut.row_strips, image = line / cut.out_height;
  const int out_column = static_cast<int>(strip - line * cut.row_strips) * kStrip;
  const int row = static_cast<int>(line - image * cut.out_height) * n.stride - n.kernel / 2;
  const T* const x = n.x + image * n.height * n.width * row_floats + channel;
  const float* const affine = n.affine ? n.affine + channel : nullptr;
  float sums[kStrip][8] = {};
  with_activation(n.activation, [&](auto activation) {
    convolve<decltype(activation)::value>(n, row_floats, x, n.weight + channel, affine, row,
                                          out_column * n.stride - n.kernel / 2, sums);
  });
  float factor[8];
  load8(factor, n.stored_factor + channel);
  T* const y = n.y + (line * cut.out_width + out_column) * row_floats + channel;
#pragma unroll
  for (int o = 0; o < kStrip; ++o) {
    if (out_column + o >= cut.out_width) break;
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[o][i] /= factor[i];
    store8(y + static_cast<int64_t>(o) * row_floats, sums[o]);
  }
}

}  // namespace

template <typename T>
void depthwise_conv(const DepthwiseConv<T>& node, Stream stream) {
  const Cut cut = cut_of(node);
  if (cut.strips == 0) return;
  const int64_t blocks = ceil_div(cut.strips, int64_t{kThreads / cut.width});
  GREEDYNAS_LAUNCH((plain_depthwise_kernel<T>), dim3(static_cast<unsigned>(blocks * cut.slices)),
                   dim3(kThreads), 0, stream, node, cut);
}

template void depthwise_conv(const DepthwiseConv<float>&, Stream);
template void depthwise_conv(const DepthwiseConv<BFloat16>&, Stream);
template void depthwise_conv(const DepthwiseConv<Half>&, Stream);

}  // namespace greedynas::cuda
