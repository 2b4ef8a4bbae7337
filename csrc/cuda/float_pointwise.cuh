// Products of float maps whose result is stored: float_project.cu and float_conv_bn.cu. A block takes a unit
// of pixels and a pass, some output channels.
#pragma once

#include "activate.h"
#include "device.h"
#include "float_product.cuh"
#include "kernels.h"
#include "pointwise.cuh"

namespace greedynas::cuda {

// What becomes of a tile's sums (PointwiseOutput), and the statistics of a unit.
template <typename Product>
class FloatPointwiseEnd {
 public:
  using Sums = typename Product::Sums;
  static constexpr int kWarps = kProductThreads / 32;
  static constexpr int kBytes = (1 + 2 * kWarps) * Product::kWidth * 4;

  __device__ FloatPointwiseEnd(const PointwiseOutput<float>& out, int first_column, float* shared)
      : out_(out),
        pilots_(shared),
        totals_(shared + Product::kWidth),
        stride_(row_channels(out.channels)),
        first_column_(first_column) {}

  // `first`: the tile's pixel, of `rows`; `is_first`: whether it is the unit's.
  __device__ __forceinline__ void store_tile(Sums& sums, int64_t first, int rows, bool is_first) const {
    if (out_.affine) {
      with_activation(out_.activation, [&](auto activation) { map_sums<decltype(activation)::value>(sums); });
    }
    float* const y = out_.y + first * stride_;
    const float* const residual = out_.residual ? out_.residual + first * stride_ : nullptr;
#pragma unroll
    for (int j = 0; j < Product::kAcross; ++j) {
      const int column = first_column_ + Product::column(j);
      if (column >= stride_) break;
#pragma unroll
      for (int i = 0; i < Product::kRows; ++i) {
        // So that what is not finite in an input does not show there.
        if (column >= out_.channels) sums[i][j] = 0.f;
        if (Product::row(i) >= rows) continue;
        const int at = Product::row(i) * stride_ + column;
        if (residual) sums[i][j] += residual[at];
        y[at] = sums[i][j];
      }
    }
    if (out_.partials) add(sums, rows, is_first);
  }

  __device__ __forceinline__ void store_statistics(int unit, int count) const {
    if (!out_.partials) return;
    __syncthreads();
    const int c = threadIdx.x, column = first_column_ + c;
    if (c >= Product::kWidth || column >= stride_) return;
    float sum = 0.f, squares = 0.f;
    for (int warp = 0; warp < kWarps; ++warp) {
      sum += total(warp, 0)[c];
      squares += total(warp, 1)[c];
    }
    float* const partials = out_.partials + static_cast<int64_t>(unit) * 4 * stride_ + column;
    partials[0] = pilots_[c];
    partials[stride_] = sum;
    partials[2 * stride_] = squares;
    partials[3 * stride_] = static_cast<float>(count);
  }

 private:
  __device__ __forceinline__ float* total(int warp, int kind) const {
    return totals_ + (2 * warp + kind) * Product::kWidth;
  }

  template <int kActivation>
  __device__ __forceinline__ void map_sums(Sums& sums) const {
#pragma unroll
    for (int j = 0; j < Product::kAcross; ++j) {
      const int column = first_column_ + Product::column(j);
      if (column >= stride_) break;
      const float* const affine = out_.affine + column;
      const float scale = __ldg(affine), shift = __ldg(affine + stride_), bound = __ldg(affine + 2 * stride_);
#pragma unroll
      for (int i = 0; i < Product::kRows; ++i) {
        sums[i][j] = activate<kActivation>(fmaf(sums[i][j], scale, shift), bound);
      }
    }
  }

  // Distances from the unit's first pixel; a warp's, in a fixed order, to those of its tiles before.
  __device__ __forceinline__ void add(const Sums& sums, int rows, bool is_first) const {
    if (is_first) {
      if (Product::row(0) == 0) {
#pragma unroll
        for (int j = 0; j < Product::kAcross; ++j) pilots_[Product::column(j)] = sums[0][j];
      }
      __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < Product::kAcross; ++j) {
      const int c = Product::column(j);
      if (first_column_ + c >= stride_) break;
      const float pilot = pilots_[c];
      float sum = 0.f, squares = 0.f;
#pragma unroll
      for (int i = 0; i < Product::kRows; ++i) {
        const float distance = Product::row(i) < rows ? sums[i][j] - pilot : 0.f;
        sum += distance;
        squares = fmaf(distance, distance, squares);
      }
#pragma unroll
      for (int lanes = 8; lanes < 32; lanes *= 2) {
        sum += __shfl_xor_sync(~0u, sum, lanes);
        squares += __shfl_xor_sync(~0u, squares, lanes);
      }
      if (Product::lane() < 8) {
        float *const sum_to = total(Product::warp(), 0) + c, *const squares_to =
                                                                 total(Product::warp(), 1) + c;
        *sum_to = is_first ? sum : *sum_to + sum;
        *squares_to = is_first ? squares : *squares_to + squares;
      }
    }
  }

  const PointwiseOutput<float>& out_;
  float* const pilots_;  // [kWidth]
  float* const totals_;  // [kWarps][2][kWidth]
  const int stride_, first_column_;
};

// What a block does. The weight is [row_channels(channels)][depth].
template <typename Product, typename Rows>
__device__ __forceinline__ void run_float_pointwise(Rows& rows, const float* weight, int depth,
                                                    const PointwiseOutput<float>& out, const Unit& unit,
                                                    int pass, float* shared) {
  const int first_column = pass * Product::kWidth;
  const FloatPointwiseEnd<Product> end(out, first_column, shared + 2 * Product::kStage);
  Product::run(
      unit.tiles(), depth, shared, rows,
      [&](int, int chunk, float* stage) {
        Product::load_columns(weight, row_channels(out.channels), depth, chunk, stage,
                              [&](int c) { return first_column + c; });
      },
      [&](int tile, typename Product::Sums& sums) {
        end.store_tile(sums, unit.first_of(tile), unit.rows_of(tile), tile == 0);
      });
  end.store_statistics(unit.index, static_cast<int>(unit.last - unit.first));
}

// Its shared memory, without what Rows needs.
template <typename Product>
constexpr int float_pointwise_bytes() {
  return Product::kBytes + FloatPointwiseEnd<Product>::kBytes;
}

}  // namespace greedynas::cuda
