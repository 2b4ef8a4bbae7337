// What finish_map's kernels share: 8 channels of the pass over the map, and how its moments are cut.
#pragma once

#include <algorithm>
#include <cstdint>

#include "activate.h"
#include "device.h"
#include "kernels.h"
#include "numbers.h"

namespace greedynas::cuda {

// What becomes of 8 channels of a pixel. Maps are not multiplied by a factor, so that bounds are known.
template <typename T>
struct FinishVector {
  float scale[8], shift[8];
  int activation;

  // Vector `vector` of `row`; without an affine map nothing, which must not be called.
  __device__ __forceinline__ FinishVector(const float* affine, int vector, int row, int activation_of)
      : scale{}, shift{}, activation(activation_of) {
    if (!affine) return;
    load8(scale, affine + 8 * vector);
    load8(shift, affine + 8 * (row + vector));
  }
  __device__ __forceinline__ uint4 operator()(const uint4& raw, bool adds, const uint4& residual) const {
    float x[8];
    unpack<T>(x, raw);
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = x[i] * scale[i] + shift[i];
    with_activation(activation, [&](auto constant) {
      constexpr int kActivation = decltype(constant)::value;
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] = activate<kActivation>(x[i], kPlainBound<kActivation>);
    });
    if (adds) {
      float added[8];
      unpack<T>(added, residual);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] += added[i];
    }
    return pack<T>(x);
  }
};

constexpr int kTile = 16;  // channels of a tile, pixels of a sweep
constexpr int kTileFloats = kTile * kTile;
constexpr int kMaxFusedTiles = 12;   // that registers have room for
constexpr int kMaxWindowTiles = 7;   // two windows are a block's
constexpr int kLessWindowTiles = 6;  // before compute capability 8.0, where copies take registers
// And shared memory, with a residual: 64 KB hold 8 of them.
inline int max_fused_tiles() { return little_shared_memory() ? 8 : kMaxFusedTiles; }

// How the moments of a map are cut: chunks of pixels, and windows of channels where a block cannot hold the
// products of all of them.
struct MomentsCut {
  int64_t pixels;
  int row;                    // vectors of 8 channels of a pixel
  int tiles;                  // of 16 channels
  int windows, window_tiles;  // the last window may be smaller
  int block_tiles;            // the most that a block works on: those of two windows
  int chunk, chunks;          // pixels of a block; blocks per pair of windows

  __device__ __host__ int window_pairs() const { return windows == 1 ? 1 : windows * (windows - 1) / 2; }
  __device__ __host__ int tile_pairs() const { return tiles * (tiles + 1) / 2; }
  // A block's part of `partials`: means of its channels; products, tile by tile, as mma leaves them.
  __device__ __host__ int floats() const {
    return block_tiles * kTile + block_tiles * (block_tiles + 1) / 2 * kTileFloats;
  }
  __device__ int64_t place(int of_chunk, int window_pair) const {
    return (static_cast<int64_t>(of_chunk) * window_pairs() + window_pair) * floats();
  }
  __device__ int chunk_pixels(int of_chunk) const {
    const int64_t left = pixels - static_cast<int64_t>(of_chunk) * chunk;
    return static_cast<int>(left < chunk ? left : chunk);
  }
};

constexpr int moments_groups(int block_tiles) { return std::max(1, 8 / block_tiles); }
constexpr int moments_threads(int block_tiles) { return 32 * block_tiles * moments_groups(block_tiles); }
// Blocks of a multiprocessor, as registers allow.
constexpr int moments_blocks(int block_tiles) {
  constexpr int kBlocks[] = {3, 3, 4, 2, 3, 3, 2, 2};
  return block_tiles <= 8 ? kBlocks[block_tiles - 1] : 1;
}

inline MomentsCut cut_moments(int64_t pixels, int channels) {
  constexpr int64_t kLongest = 64;  // sweeps of a chunk: tensor cores truncate, sums must not become long
  constexpr int64_t kShare = 2;     // partial sums are at most half of the map
  MomentsCut cut{};
  cut.pixels = pixels;
  cut.row = row_channels(channels) / 8;
  cut.tiles = ceil_div(cut.row, 2);
  cut.windows = 1;
  if (cut.tiles > max_fused_tiles())
    cut.windows = ceil_div(cut.tiles, little_shared_memory() ? kLessWindowTiles : kMaxWindowTiles);
  cut.window_tiles = ceil_div(cut.tiles, cut.windows);
  cut.block_tiles = std::min(cut.tiles, 2 * cut.window_tiles);
  const int64_t sweep = kTile * moments_groups(cut.block_tiles);
  const int64_t sweeps = std::max<int64_t>(1, ceil_div(pixels, sweep));
  // As many blocks as run at a time, or a multiple of that.
  const int64_t at_a_time =
      std::max(1, multiprocessors() * moments_blocks(cut.block_tiles) / cut.window_pairs());
  const int64_t filling = ceil_div(sweeps, at_a_time * ceil_div(sweeps, at_a_time * kLongest));
  const int64_t least = ceil_div(kShare * 4 * cut.floats() * cut.window_pairs(), sweep * cut.row * 16);
  cut.chunk = static_cast<int>(std::max(filling, least) * sweep);
  cut.chunks = static_cast<int>(ceil_div(pixels, int64_t{cut.chunk}));
  return cut;
}

// Two windows of channels, the tiles of which a block numbers from 0 on; the second may be empty.
struct WindowPair {
  int first[2], count[2];

  __device__ WindowPair(const MomentsCut& cut, int u, int v) : first{0, 0}, count{cut.tiles, 0} {
    if (cut.windows == 1) return;
    first[0] = u * cut.window_tiles;
    first[1] = v * cut.window_tiles;
    count[0] = cut.window_tiles;
    count[1] = min(cut.window_tiles, cut.tiles - first[1]);
  }
  // Pairs are numbered (0, 1), (0, 2), ..., (1, 2), ...
  __device__ static WindowPair of(const MomentsCut& cut, int index) {
    int u = 0;
    while (index >= cut.windows - 1 - u && u < cut.windows - 1) index -= cut.windows - 1 - u++;
    return WindowPair(cut, u, u + 1 + index);
  }
  __device__ static int index_of(const MomentsCut& cut, int u, int v) {
    return cut.windows == 1 ? 0 : u * (2 * cut.windows - u - 1) / 2 + v - u - 1;
  }
  __device__ int tiles() const { return count[0] + count[1]; }
  // Of a vector of 8 channels, two of which are a tile.
  __device__ int vector(int local) const {
    return local < 2 * count[0] ? 2 * first[0] + local : 2 * (first[1] - count[0]) + local;
  }
  __device__ int local_tile(int tile) const {
    return tile < first[0] + count[0] ? tile - first[0] : tile - first[1] + count[0];
  }
};

}  // namespace greedynas::cuda
