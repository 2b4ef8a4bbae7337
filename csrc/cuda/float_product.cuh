// The product of two matrices in single precision that kernels of float maps are made of: kTilePixels rows,
// of pixels, times 8 * kAcross columns, of channels, summed up over a depth that both have in memory as rows.
//
// The depth comes in chunks of kDepth numbers: one is multiplied while the next one is on its way to shared
// memory, across the borders of tiles. A thread has kRows x kAcross sums: of rows 4 apart and of columns 8
// apart, so that the lanes of a warp read neighbouring rows of both operands, and these lie kPitch numbers
// apart: pieces of 16 bytes of 8 of them fall on different banks.
#pragma once

#include "device.h"
#include "kernels.h"
#include "pointwise.cuh"

namespace greedynas::cuda {

inline constexpr int kProductThreads = 128;

// Before 9.0 the same code takes more registers, most of all where copies to shared memory go through them.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
inline constexpr int kBlocksFewer = 1;
#else
inline constexpr int kBlocksFewer = 0;
#endif

template <int kColumnsOfThread>
struct FloatProduct {
  static constexpr int kAcross = kColumnsOfThread, kWidth = 8 * kAcross;
  static constexpr int kRows = 8, kDepth = 16, kPieces = kDepth / 4, kPitch = kDepth + 4;
  static constexpr int kStage = (kTilePixels + kWidth) * kPitch, kBytes = 2 * kStage * 4;
  static constexpr int kLoadedRows = kTilePixels * kPieces / kProductThreads;  // of a thread
  // Blocks that a multiprocessor has registers for.
  static constexpr int kBlocks = (kAcross > 5 ? 3 : 4) - kBlocksFewer;
  using Sums = float[kRows][kAcross];

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) % 32; }
  static __device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / 32; }
  // Where in the tile this thread's sums are.
  static __device__ __forceinline__ int row(int i) { return 32 * warp() + lane() / 8 + 4 * i; }
  static __device__ __forceinline__ int column(int j) { return 8 * j + lane() % 8; }
  // Which pieces of the rows this thread copies.
  static __device__ __forceinline__ int loaded_row(int i) {
    return static_cast<int>(threadIdx.x) / kPieces + i * (kProductThreads / kPieces);
  }
  static __device__ __forceinline__ int loaded_column(int chunk) {
    return chunk * kDepth + static_cast<int>(threadIdx.x) % kPieces * 4;
  }
  static __device__ __forceinline__ float* loaded_piece(float* stage, int i) {
    return stage + loaded_row(i) * kPitch + static_cast<int>(threadIdx.x) % kPieces * 4;
  }

  // Copies this thread's pieces of the first `count` rows; from(i): where its row i begins.
  template <typename From>
  static __device__ __forceinline__ void load_rows(int count, int depth, int chunk, float* stage,
                                                   const From& from) {
    if (loaded_column(chunk) >= depth) return;
#pragma unroll
    for (int i = 0; i < kLoadedRows; ++i) {
      if (loaded_row(i) < count) start_copy16(loaded_piece(stage, i), from(i) + loaded_column(chunk));
    }
  }

  // Copies rows of a matrix [rows][depth] to be columns: channel(c) is column c's row.
  template <typename Channel>
  static __device__ __forceinline__ void load_columns(const float* matrix, int rows, int depth, int chunk,
                                                      float* stage, const Channel& channel) {
    for (int q = threadIdx.x; q < kWidth * kPieces; q += kProductThreads) {
      const int c = q / kPieces, piece = q % kPieces, k = chunk * kDepth + piece * 4;
      if (channel(c) < rows && k < depth) {
        start_copy16(stage + (kTilePixels + c) * kPitch + piece * 4,
                     matrix + static_cast<int64_t>(channel(c)) * depth + k);
      }
    }
  }

  // Runs `tiles` tiles of a depth that is a multiple of 8. Rows has
  //   load(tile, chunk, stage)     starts copies; called in order
  //   finish(tile, chunk, stage)   once this thread's own copies are there, before others read them
  //   count(tile)                  of rows that exist
  // load_columns(tile, chunk, stage) starts copies too; finish_tile(tile, sums) runs while copies are on the
  // way.
  template <typename Rows, typename LoadColumns, typename FinishTile>
  static __device__ __forceinline__ void run(int tiles, int depth, float* shared, Rows& rows,
                                             const LoadColumns& load_columns, const FinishTile& finish_tile) {
    const int chunks = ceil_div(depth, kDepth);
    int next_tile = 0, next_chunk = 0, stage = 0;
    const auto load = [&](float* to) {
      if (next_tile < tiles) {
        rows.load(next_tile, next_chunk, to);
        load_columns(next_tile, next_chunk, to);
        if (++next_chunk == chunks) {
          next_chunk = 0;
          ++next_tile;
        }
      }
      commit_copies();
    };
    load(shared);
    for (int tile = 0; tile < tiles; ++tile) {
      float sums[kRows][kAcross] = {};
      for (int chunk = 0; chunk < chunks; ++chunk) {
        float* const at = shared + stage * kStage;
        wait_for_copies<0>();
        rows.finish(tile, chunk, at);
        __syncthreads();  // the stage is filled, and the other one has been read
        stage ^= 1;
        load(shared + stage * kStage);
        if (32 * warp() < rows.count(tile)) multiply(sums, at, (depth - chunk * kDepth) / 4);
      }
      finish_tile(tile, sums);
    }
  }

 private:
  static __device__ __forceinline__ void multiply(Sums& sums, const float* stage, int steps) {
    const float* const a = stage + row(0) * kPitch;
    const float* const b = stage + (kTilePixels + column(0)) * kPitch;
#pragma unroll 1  // more of them at a time need more registers than there are
    for (int step = 0; step < min(steps, kPieces); ++step) multiply_step(sums, a + 4 * step, b + 4 * step);
  }

  static __device__ __forceinline__ void multiply_step(Sums& sums, const float* a, const float* b) {
    float4 x[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) x[i] = *reinterpret_cast<const float4*>(a + 4 * i * kPitch);
#pragma unroll
    for (int j = 0; j < kAcross; ++j) {
      const float4 y = *reinterpret_cast<const float4*>(b + 8 * j * kPitch);
#pragma unroll
      for (int i = 0; i < kRows; ++i) sums[i][j] = fmaf(x[i].x, y.x, sums[i][j]);
#pragma unroll
      for (int i = 0; i < kRows; ++i) sums[i][j] = fmaf(x[i].y, y.y, sums[i][j]);
#pragma unroll
      for (int i = 0; i < kRows; ++i) sums[i][j] = fmaf(x[i].z, y.z, sums[i][j]);
#pragma unroll
      for (int i = 0; i < kRows; ++i) sums[i][j] = fmaf(x[i].w, y.w, sums[i][j]);
    }
  }
};

}  // namespace greedynas::cuda
