// Tiles of the products whose rows are pixels: a block takes a unit, some neighbouring tiles of pixels, and a
// pass, some output channels.
#pragma once

#include <cstdint>

#include "device.h"
#include "kernels.h"
#include "numbers.h"
#include "operands.cuh"

namespace greedynas::cuda {

inline constexpr int kTilePixels = 128;
#ifdef __CUDACC__
inline constexpr int kMaxUnits = 2048;  // enough blocks, and few partial sums
#else
inline constexpr int kMaxUnits = 3;  // so that units of small maps have several tiles where they are emulated
#endif

// Tiles of a unit (the last one may have fewer).
constexpr int64_t unit_tiles(int64_t pixels) {
  return ceil_div(ceil_div(pixels, int64_t{kTilePixels}), int64_t{kMaxUnits});
}

// Output channels of a pass, numbers of a chunk, and how many warps share a pixel.
template <int kPassWidth, int kChunkNumbers, int kWarpsAcross>
struct PointwiseTile {
  static constexpr int kWidth = kPassWidth, kChunk = kChunkNumbers, kAcross = kWarpsAcross;
  static constexpr int kDown = kPointwiseThreads / 32 / kAcross;
  static constexpr int kRowTiles = kTilePixels / (16 * kDown), kColumnTiles = kWidth / (8 * kAcross);
  static_assert(kAcross == 1 || kColumnTiles % 2 == 0);
  // Blocks that a multiprocessor has registers for.
  static constexpr int kBlocks = kWidth <= 32 ? 3 : kAcross == 1 ? 2 : 1;
  static constexpr int kPixelBytes = kTilePixels * kChunk * 2;
  static constexpr int kWeightBytes = round_up(kWidth, 16) * kChunk * 2;  // weights are read by 16 rows

  // Results go through shared memory, kStagedRows numbers at a time: the first 16 of each warp, then the
  // next ones; or half as many floats. Rows lie an odd number of 16 bytes apart: then no bank is met twice.
  static constexpr int kStagedRows = 16 * kDown;
  static constexpr int kStagedStride = kWidth + (kWidth / 8 % 2 == 0 ? 8 : 0);
  static constexpr int kStagedBytes = kStagedRows * kStagedStride * 2;
  // Threads copy pieces of 8 channels from there, and sum up pairs of channels.
  static constexpr int kPieces = kWidth / 8, kCopiedRows = kPointwiseThreads / kPieces;
  static constexpr int kPairs = kWidth / 2, kSummedRows = kPointwiseThreads / kPairs;
  static_assert(kSummedRows * kPairs * sizeof(float4) <= 2 * kPixelBytes, "sums are joined in the stages");

  // In two stages: whether there is a place for it before compute capability 8.0.
  static constexpr bool kFitsLittleMemory = 2 * (kPixelBytes + kWeightBytes) + kStagedBytes <= 64 * 1024;
};

// Whether the code is compiled for a device that launches kernels with this tile.
template <typename T, typename Tile>
__device__ __forceinline__ constexpr bool computes_by() {
  return computes<T>() && (Tile::kFitsLittleMemory || since_sm80());
}

// The width of a pass: all output channels where they are few enough.
inline int pass_width(int channels) {
  const int row = row_channels(channels);
  return ceil_div(row, ceil_div(row, little_shared_memory() ? 160 : 192));
}
// Calls `function` with the tile that wastes the least.
template <typename Function>
void with_pointwise_tile(int channels, int depth, const Function& function) {
  const int width = pass_width(channels);
  if (width <= 16 && depth <= 32) return function(PointwiseTile<16, 32, 1>{});
  if (width <= 16) return function(PointwiseTile<16, 64, 1>{});
  if (width <= 24) return function(PointwiseTile<24, 64, 1>{});
  if (width <= 32) return function(PointwiseTile<32, 64, 1>{});
  if (width <= 40) return function(PointwiseTile<40, 64, 1>{});
  using Fitting = PointwiseTile<160, 32, 2>;
  static_assert(Fitting::kFitsLittleMemory);
  if (little_shared_memory()) return function(Fitting{});
  if (width <= 64) return function(PointwiseTile<64, 64, 1>{});
  if (width <= 80) return function(PointwiseTile<80, 64, 1>{});
  if (width <= 96) return function(PointwiseTile<96, 64, 1>{});
  if (width <= 160) return function(Fitting{});
  return function(PointwiseTile<192, 32, 2>{});
}

}  // namespace greedynas::cuda
