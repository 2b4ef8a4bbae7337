// Operands of matrix products in shared memory: rows of chunks, multiplied by tensor cores (project.cu,
// conv_bn.cu, head.cu). Rows of a chunk are pieces of 16 bytes, swizzled so that load_matrices meets no bank
// twice.
#pragma once

#include <cstdint>

#include "device.h"
#include "kernels.h"
#include "numbers.h"

namespace greedynas::cuda {

inline constexpr int kPointwiseThreads = 256;

// Where a row's piece of 8 numbers begins, in bytes; rows of kChunk numbers.
template <int kChunk>
__device__ __forceinline__ int piece_offset(int row, int piece) {
  static_assert(kChunk == 32 || kChunk == 64);
  const int swizzle = kChunk == 64 ? row & 7 : row >> 1 & 3;
  return row * kChunk * 2 + ((piece ^ swizzle) << 4);
}

// Rows of a matrix, as they are, [rows][stride] in memory: a chunk of kRows of them, those that exist. What
// lies behind the columns becomes zero as far as it is multiplied.
template <int kRows, int kChunk, typename T>
__device__ __forceinline__ void load_rows(const T* matrix, int first_row, int rows, int stride, int chunk,
                                          unsigned char* shared) {
  constexpr int kPieces = kChunk / 8, kStep = kPointwiseThreads / kPieces;
  const int row = static_cast<int>(threadIdx.x) / kPieces, piece = static_cast<int>(threadIdx.x) % kPieces;
  const int column = chunk * kChunk + piece * 8;
  const T* const from = matrix + static_cast<int64_t>(first_row + row) * stride + column;
  unsigned char* const to = shared + piece_offset<kChunk>(row, piece);
#pragma unroll
  for (int i = 0; i < ceil_div(kRows, kStep); ++i) {
    if (row + i * kStep >= min(kRows, rows - first_row)) break;
    if (column < stride) {
      start_copy16(to + i * kStep * kChunk * 2, from + i * kStep * stride);
    } else if (column < round_up(stride, 16)) {
      *reinterpret_cast<uint4*>(to + i * kStep * kChunk * 2) = uint4{0, 0, 0, 0};
    }
  }
}

// Where a lane's addresses for load_matrices begin in an operand's first 16 rows, or columns. Sixteen numbers
// further on is ^ 32, for offsets of whole rows do not change the swizzle.
template <int kChunk>
__device__ __forceinline__ int lane_rows_offset() {
  const int lane = threadIdx.x & 31;
  return piece_offset<kChunk>(lane & 15, lane >> 4);
}
template <int kChunk>
__device__ __forceinline__ int lane_columns_offset() {
  const int lane = threadIdx.x & 31;
  return piece_offset<kChunk>((lane >> 4) * 8 + (lane & 7), lane >> 3 & 1);
}

// sums += rows columns', of which a warp has kRowTiles * 16 and kColumnTiles * 8, at offsets in shared memory
// that include the lane's; `steps` of 16 numbers.
template <typename T, int kChunk, int kRowTiles, int kColumnTiles>
__device__ __forceinline__ void multiply_chunk(float (&sums)[kRowTiles][kColumnTiles][4],
                                               const unsigned char* shared, int rows, int columns,
                                               int steps) {
  const auto multiply = [&](int step) {
    unsigned a[kRowTiles][4];
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
      load_matrices(a[m], shared + (rows ^ step * 32) + m * 16 * kChunk * 2);
    }
#pragma unroll
    for (int n = 0; n < kColumnTiles; n += 2) {
      unsigned b[4];
      load_matrices(b, shared + (columns ^ step * 32) + n * 8 * kChunk * 2);
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 2 && n + i < kColumnTiles; ++i) {
          Pair<T>::multiply(sums[m][n + i], a[m], b[2 * i], b[2 * i + 1]);
        }
      }
    }
  };
  if (steps >= kChunk / 16) {  // without branches between steps they overlap
#pragma unroll
    for (int step = 0; step < kChunk / 16; ++step) multiply(step);
  } else {
#pragma unroll 1
    for (int step = 0; step < steps; ++step) multiply(step);
  }
}

}  // namespace greedynas::cuda
