// What becomes of a tile's sums: a map, and the statistics of the unit.
#pragma once

#include <cstdint>

#include "activate.h"
#include "device.h"
#include "kernels.h"
#include "numbers.h"
#include "pointwise_tile.cuh"

namespace greedynas::cuda {

// The end of a tile: what becomes of its sums. kMapped: there is an affine map, and no statistics are asked
// for.
template <typename T, typename Tile, bool kMapped>
class PointwiseEnd {
 public:
  using Sums = float[Tile::kRowTiles][Tile::kColumnTiles][4];

  __device__ PointwiseEnd(const PointwiseOutput<T>& out, int first_column, unsigned char* staged)
      : out_(out),
        staged_(reinterpret_cast<unsigned*>(staged)),
        stride_(row_channels(out.channels)),
        first_column_(first_column) {}

  // `first`: the tile's pixel, of `rows`; `is_first`: whether it is the unit's.
  __device__ __forceinline__ void store_tile(Sums& sums, int64_t first, int rows, bool is_first) {
    if (first_column_ + Tile::kWidth > out_.channels) clear_padding(sums);
#pragma unroll
    for (int m = 0; m < Tile::kRowTiles; ++m) {
      const int staged = staged_rows(m, rows);
      if constexpr (kMapped) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (m + half > 0) __syncthreads();  // the rows before have been copied
          if (warp_row() / (Tile::kDown / 2) == half) stage_floats(sums[m]);
          __syncthreads();
          with_activation(out_.activation, [&](auto activation) {
            map_rows<decltype(activation)::value>(m, half, first, staged - half * (Tile::kStagedRows / 2));
          });
        }
      } else {
        if (m > 0) __syncthreads();
        stage_rounded(sums[m]);
        __syncthreads();
        copy_rows(m, first, staged);
        if (out_.partials) sum_rows(staged, m == 0 && is_first);
      }
    }
  }

  // `shared`: 16 bytes a thread, which nobody reads any more.
  __device__ __forceinline__ void store_statistics(int unit, int count, unsigned char* shared) const {
    float4* const joined = reinterpret_cast<float4*>(shared);  // [kSummedRows][kPairs]
    joined[threadIdx.x] = float4{sum_[0], sum_[1], squares_[0], squares_[1]};
    __syncthreads();
    const int column = first_column_ + pair() * 2;
    if (threadIdx.x >= Tile::kPairs || column >= stride_) return;
    float4 total = joined[threadIdx.x];
    for (int row = 1; row < Tile::kSummedRows; ++row) {
      const float4 more = joined[row * Tile::kPairs + threadIdx.x];
      total.x += more.x, total.y += more.y, total.z += more.z, total.w += more.w;
    }
    float* const partials = out_.partials + static_cast<int64_t>(unit) * 4 * stride_ + column;
    const auto store = [&](int kind, float low, float high) {
      *reinterpret_cast<float2*>(partials + kind * stride_) = float2{low, high};
    };
    const float2 pilot = Pair<T>::unpack(pilot_);
    store(0, pilot.x, pilot.y);
    store(1, total.x, total.y);
    store(2, total.z, total.w);
    store(3, static_cast<float>(count), static_cast<float>(count));
  }

 private:
  // Which pair this thread sums up.
  static __device__ __forceinline__ int pair() { return static_cast<int>(threadIdx.x) % Tile::kPairs; }
  static __device__ __forceinline__ int warp_row() {
    return static_cast<int>(threadIdx.x) / 32 / Tile::kAcross;
  }
  static __device__ __forceinline__ int lane_row() { return (threadIdx.x & 31) / 4; }
  // This lane's first column of a tile of 8, within the pass.
  static __device__ __forceinline__ int lane_column(int n) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = threadIdx.x & 31;
    return (warp % Tile::kAcross * Tile::kColumnTiles + n) * 8 + lane % 4 * 2;
  }

  // So that what is not finite in an input does not show there.
  __device__ __forceinline__ void clear_padding(Sums& sums) const {
#pragma unroll
    for (int n = 0; n < Tile::kColumnTiles; ++n) {
#pragma unroll
      for (int i = 0; i < Tile::kRowTiles * 4; ++i) {
        if (first_column_ + lane_column(n) + i % 2 >= out_.channels) sums[i / 4][n][i % 4] = 0.f;
      }
    }
  }

  __device__ __forceinline__ void stage_rounded(const float (&sums)[Tile::kColumnTiles][4]) const {
    unsigned* const to = staged_ + (warp_row() * 16 + lane_row()) * Tile::kStagedStride / 2;
#pragma unroll
    for (int n = 0; n < Tile::kColumnTiles; ++n) {
      to[lane_column(n) / 2] = Pair<T>::pack(sums[n][0], sums[n][1]);
      to[(8 * Tile::kStagedStride + lane_column(n)) / 2] = Pair<T>::pack(sums[n][2], sums[n][3]);
    }
  }

  __device__ __forceinline__ void stage_floats(const float (&sums)[Tile::kColumnTiles][4]) const {
    float* const to = reinterpret_cast<float*>(staged_) +
                      (warp_row() % (Tile::kDown / 2) * 16 + lane_row()) * Tile::kStagedStride;
#pragma unroll
    for (int n = 0; n < Tile::kColumnTiles; ++n) {
      *reinterpret_cast<float2*>(to + lane_column(n)) = float2{sums[n][0], sums[n][1]};
      *reinterpret_cast<float2*>(to + 8 * Tile::kStagedStride + lane_column(n)) =
          float2{sums[n][2], sums[n][3]};
    }
  }

  // The tile's pixel that lies in a staged row; how many of these rows there are, when the tile has `rows`.
  static __device__ __forceinline__ int pixel_of(int row, int m) {
    return Tile::kRowTiles == 1 ? row : (row / 16 * Tile::kRowTiles + m) * 16 + row % 16;
  }
  static __device__ __forceinline__ int staged_rows(int m, int rows) {
    if constexpr (Tile::kRowTiles == 1) return rows;
    constexpr int kWarpRows = Tile::kRowTiles * 16;
    return rows / kWarpRows * 16 + max(0, min(16, rows % kWarpRows - m * 16));
  }

  // Calls `store(row, column, at)` for this thread's pieces of `rows` staged rows, of which the first one is
  // `first_row`; `at`: where the piece lies in the tile's rows of the map.
  template <int kRows, typename Store>
  __device__ __forceinline__ void for_pieces(int m, int first_row, int rows, const Store& store) const {
    const int column = static_cast<int>(threadIdx.x) % Tile::kPieces * 8;
    const int thread_row = static_cast<int>(threadIdx.x) / Tile::kPieces;
    if (thread_row >= Tile::kCopiedRows || first_column_ + column >= stride_) return;
#pragma unroll 1
    for (int row = thread_row; row < min(kRows, rows); row += Tile::kCopiedRows) {
      store(row, column, pixel_of(first_row + row, m) * stride_ + first_column_ + column);
    }
  }

  __device__ __forceinline__ void copy_rows(int m, int64_t first, int rows) const {
    T* const y = out_.y + first * stride_;
    for_pieces<Tile::kStagedRows>(m, 0, rows, [&](int row, int column, int at) {
      const unsigned* const from = staged_ + (row * Tile::kStagedStride + column) / 2;
      *reinterpret_cast<uint4*>(y + at) = *reinterpret_cast<const uint4*>(from);
    });
  }

  template <int kActivation>
  __device__ __forceinline__ void map_rows(int m, int half, int64_t first, int rows) const {
    T* const y = out_.y + first * stride_;
    for_pieces<Tile::kStagedRows / 2>(
        m, half * (Tile::kStagedRows / 2), rows, [&](int row, int column, int at) {
          const float* const from =
              reinterpret_cast<const float*>(staged_) + row * Tile::kStagedStride + column;
          const float* const affine = out_.affine + first_column_ + column;
          float scale[8], shift[8], bound[8], values[8];
          load8(scale, affine);
          load8(shift, affine + stride_);
          load8(bound, affine + 2 * stride_);
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            values[i] = activate<kActivation>(fmaf(from[i], scale[i], shift[i]), bound[i]);
          }
          if (out_.residual) {
            float added[8];
            unpack<T>(added, *reinterpret_cast<const uint4*>(out_.residual + first * stride_ + at));
#pragma unroll
            for (int i = 0; i < 8; ++i) values[i] += added[i];
          }
          store8(y + at, values);
        });
  }

  __device__ __forceinline__ void sum_rows(int rows, bool sets_pilot) {
    const int first_row = static_cast<int>(threadIdx.x) / Tile::kPairs;
    if (first_row >= Tile::kSummedRows) return;
    const unsigned* const from = staged_ + pair();
    if (sets_pilot) pilot_ = from[0];
    const float2 pilot = Pair<T>::unpack(pilot_);
#pragma unroll 4
    for (int row = first_row; row < rows; row += Tile::kSummedRows) {
      const float2 values = Pair<T>::unpack(from[row * Tile::kStagedStride / 2]);
      const float low = values.x - pilot.x, high = values.y - pilot.y;
      sum_[0] += low;
      sum_[1] += high;
      squares_[0] = fmaf(low, low, squares_[0]);
      squares_[1] = fmaf(high, high, squares_[1]);
    }
  }

  const PointwiseOutput<T>& out_;
  unsigned* const staged_;  // T [kStagedRows][kStagedStride]
  const int stride_, first_column_;
  unsigned pilot_ = 0;
  float sum_[2] = {}, squares_[2] = {};
};

}  // namespace greedynas::cuda
