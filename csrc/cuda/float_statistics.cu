// BatchNorm after a pointwise convolution of float maps: a block multiplies kTilePixels rows of the weights W
// with the covariance S, some columns at a time, and the result with the rows again.
#include <algorithm>
#include <cstdint>

#include "device.h"
#include "float_product.cuh"
#include "kernels.h"
#include "norm_channel.cuh"

namespace greedynas::cuda {
namespace {

using Product = FloatProduct<8>;

// Rows of W, the same for all tiles, which are columns of S.
struct WeightRows {
  const float* first;
  int rows, depth;

  __device__ __forceinline__ int count(int) const { return rows; }
  __device__ __forceinline__ void load(int, int chunk, float* stage) const {
    Product::load_rows(rows, depth, chunk, stage,
                       [&](int i) { return first + static_cast<int64_t>(Product::loaded_row(i)) * depth; });
  }
  __device__ __forceinline__ void finish(int, int, float*) const {}
};

__global__ void __launch_bounds__(kProductThreads, Product::kBlocks)
    float_pointwise_affine_kernel(const __grid_constant__ Group<PointwiseAffine<float>> group) {
  static_assert(kProductThreads == kTilePixels);
  GREEDYNAS_DYNAMIC_SHARED(shared);
  GREEDYNAS_SHARED(double, variances, [kTilePixels]);
  const PointwiseAffine<float>& p = group.nodes[blockIdx.y];
  const int row = row_channels(p.channels), in = row_channels(p.in_channels),
            first = blockIdx.x * kTilePixels;
  if (first >= row) return;
  WeightRows rows{p.weight + static_cast<int64_t>(first) * in, min(kTilePixels, row - first), in};
  variances[threadIdx.x] = 0;
  Product::run(
      ceil_div(in, Product::kWidth), in, reinterpret_cast<float*>(shared), rows,
      [&](int tile, int chunk, float* stage) {
        Product::load_columns(p.covariance, in, in, chunk, stage,
                              [&](int c) { return tile * Product::kWidth + c; });
      },
      [&](int tile, const Product::Sums& sums) {
#pragma unroll
        for (int i = 0; i < Product::kRows; ++i) {
          float variance = 0.f;
#pragma unroll
          for (int j = 0; j < Product::kAcross; ++j) {
            const int column = tile * Product::kWidth + Product::column(j);
            if (Product::row(i) < rows.rows && column < in) {
              variance =
                  fmaf(sums[i][j], rows.first[static_cast<int64_t>(Product::row(i)) * in + column], variance);
            }
          }
#pragma unroll
          for (int lanes = 1; lanes < 8; lanes *= 2) variance += __shfl_xor_sync(~0u, variance, lanes);
          if (Product::lane() % 8 == 0) variances[Product::row(i)] += variance;
        }
      });
  __syncthreads();
  const int thread = threadIdx.x, c = first + thread;
  if (c >= row) return;
  const float* const weight = rows.first + static_cast<int64_t>(thread) * in;
  double mean = 0;
  for (int k = 0; k < in; ++k) mean += static_cast<double>(weight[k]) * p.mean[k];
  const Channel channel(p.norm, p.stored_factor, c, p.channels);
  const double unstored = 1.f / channel.stored;
  channel.write(mean * unstored, variances[thread] * unstored * unstored, p.norm.eps, p.activation, c,
                p.channels, p.affine, p.keep);
}

}  // namespace

template <>
void pointwise_affine(const Group<PointwiseAffine<float>>& group, Stream stream) {
  int blocks = 1;
  for (int i = 0; i < group.count; ++i) {
    blocks = std::max(blocks, ceil_div(row_channels(group.nodes[i].channels), kTilePixels));
  }
  GREEDYNAS_LAUNCH(float_pointwise_affine_kernel, dim3(blocks, group.count), dim3(kProductThreads),
                   Product::kBytes, stream, group);
}

}  // namespace greedynas::cuda
