// What matrix products over pixels are made of: project.cu, conv_bn.cu and head.cu.
//
// A product's depth comes in chunks. A pipeline of stages brings chunks of both operands to shared memory, a
// few ahead of the one that is multiplied, across the borders of tiles; a matrix that fits stays there. Rows
// of a chunk are pieces of 16 bytes, swizzled so that load_matrices meets no bank twice.
//
// PointwiseTile is the product whose rows are pixels: a block takes a unit, some neighbouring tiles of
// pixels, and a pass, some output channels. It stores a map and the statistics of the unit.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "activate.h"
#include "device.h"
#include "kernels.h"
#include "numbers.h"

namespace greedynas::cuda {

inline constexpr int kPointwiseThreads = 256;
inline constexpr int kTilePixels = 128;
#ifdef __CUDACC__
inline constexpr int kMaxUnits = 2048;  // enough blocks, and few partial sums
#elif defined(GREEDYNAS_MAX_UNITS)
inline constexpr int kMaxUnits = GREEDYNAS_MAX_UNITS;  // of a part of a device (tests/emulation/trace)
#else
inline constexpr int kMaxUnits = 3;  // so that units of small maps have several tiles where they are emulated
#endif

// Tiles of a unit (the last one may have fewer).
constexpr int64_t unit_tiles(int64_t pixels) {
  return ceil_div(ceil_div(pixels, int64_t{kTilePixels}), int64_t{kMaxUnits});
}

// ---- operands in shared memory

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

// ---- the pipeline

// How a block divides its shared memory: stages of pixels, then slots of weights (one a chunk where all of
// them fit, else one a stage), then what else the kernel needs.
struct PipelinePlan {
  int stages, weight_slots;
  std::size_t bytes;
};

// As many blocks a multiprocessor as leave place for three stages. `most` blocks are enough.
inline PipelinePlan plan_pipeline(int chunks, std::size_t pixel_bytes, std::size_t weight_bytes,
                                  std::size_t other_bytes, int most) {
  const auto plan = [&](int stages, int slots) {
    return PipelinePlan{stages, slots, stages * pixel_bytes + slots * weight_bytes + other_bytes};
  };
  const std::size_t all = shared_bytes_per_block();
  for (int blocks = most; blocks > 0; --blocks) {
    const std::size_t limit = (all + 1024) / blocks - 1024;  // of each block 1 KB is the system's
    for (const bool resident : {true, false}) {
      for (int stages = 4; stages > 2; --stages) {
        const PipelinePlan p = plan(stages, resident ? std::max(chunks, 1) : stages);
        if (p.bytes <= limit) return p;
      }
    }
  }
  return plan(2, 2);
}

// Runs `tiles` tiles of `chunks` chunks through the stages:
//   load_pixels(tile, chunk, stage), load_weights(chunk, slot)   start copies
//   finish_pixels(tile, chunk, stage)   once this thread's own copies are there, before others read them
//   multiply(chunk, stage, slot)
//   finish_tile(tile)   while copies for the next one are on the way
// Where pixels wait in registers, in between, there are two stages.
template <typename LoadPixels, typename LoadWeights, typename FinishPixels, typename Multiply,
          typename FinishTile>
__device__ __forceinline__ void run_pipeline(int tiles, int chunks, int stages, int weight_slots,
                                             const LoadPixels& load_pixels, const LoadWeights& load_weights,
                                             const FinishPixels& finish_pixels, const Multiply& multiply,
                                             const FinishTile& finish_tile) {
  const bool resident = chunks <= weight_slots;
  int next_tile = 0, next_chunk = 0;
  const auto load = [&](int stage) {
    if (next_tile < tiles) {
      load_pixels(next_tile, next_chunk, stage);
      if (!resident || next_tile == 0) load_weights(next_chunk, resident ? next_chunk : stage);
      if (++next_chunk == chunks) {
        next_chunk = 0;
        ++next_tile;
      }
    }
    commit_copies();
  };
  for (int stage = 0; stage + 1 < stages; ++stage) load(stage);
  int stage = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      if (stages == 2) {
        wait_for_copies<0>();
      } else if (stages == 3) {
        wait_for_copies<1>();
      } else {
        wait_for_copies<2>();
      }
      finish_pixels(tile, chunk, stage);
      __syncthreads();  // the stage is filled, and the one before has been read
      load(stage == 0 ? stages - 1 : stage - 1);
      multiply(chunk, stage, resident ? chunk : stage);
      if (++stage == stages) stage = 0;
    }
    finish_tile(tile);
  }
}

// ---- products whose rows are pixels

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
};

// The tile for some output channels: in one pass where they are few enough.
inline int passes_of(int channels) {
  return ceil_div(row_channels(channels), little_shared_memory() ? 160 : 192);
}
template <typename Function>
void with_pointwise_tile(int channels, int depth, const Function& function) {
  const int width = ceil_div(row_channels(channels), passes_of(channels));
  if (width <= 16 && depth <= 32) return function(PointwiseTile<16, 32, 1>{});
  if (width <= 16) return function(PointwiseTile<16, 64, 1>{});
  if (width <= 24) return function(PointwiseTile<24, 64, 1>{});
  if (width <= 32) return function(PointwiseTile<32, 64, 1>{});
  if (width <= 40) return function(PointwiseTile<40, 64, 1>{});
  // The others do not fit into 64 KB.
  if (little_shared_memory()) return function(PointwiseTile<160, 32, 2>{});
  if (width <= 64) return function(PointwiseTile<64, 64, 1>{});
  if (width <= 80) return function(PointwiseTile<80, 64, 1>{});
  if (width <= 96) return function(PointwiseTile<96, 64, 1>{});
  if (width <= 160) return function(PointwiseTile<160, 32, 2>{});
  return function(PointwiseTile<192, 32, 2>{});
}

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

// The pixels of a block.
struct Unit {
  int index;
  int64_t first, last;  // pixels, the last one excluded

  __device__ Unit(int64_t pixels, int index)
      : index(index),
        first(index * unit_tiles(pixels) * kTilePixels),
        last(min(first + unit_tiles(pixels) * kTilePixels, pixels)) {}
  __device__ __forceinline__ int tiles() const {
    return static_cast<int>(ceil_div(last - first, int64_t{kTilePixels}));
  }
  __device__ __forceinline__ int64_t first_of(int tile) const {
    return first + static_cast<int64_t>(tile) * kTilePixels;
  }
  __device__ __forceinline__ int rows_of(int tile) const {
    return static_cast<int>(min(last - first_of(tile), int64_t{kTilePixels}));
  }
};

// What a block does. Pixels has load(tile, chunk, stage) and finish(tile, chunk, stage), called in order. The
// weight is [row_channels(channels)][depth], of the same type.
template <typename Tile, bool kMapped, typename Pixels, typename Number, typename T>
__device__ __forceinline__ void run_pointwise(Pixels& source, const Number* weight, int depth,
                                              const PointwiseOutput<T>& out, const Unit& unit, int pass,
                                              int stages, int weight_slots, unsigned char* shared) {
  unsigned char* const weights = shared + stages * Tile::kPixelBytes;
  const int warp = static_cast<int>(threadIdx.x) / 32, first_column = pass * Tile::kWidth;
  const int rows =
      warp / Tile::kAcross * Tile::kRowTiles * 16 * Tile::kChunk * 2 + lane_rows_offset<Tile::kChunk>();
  const int columns = stages * Tile::kPixelBytes +
                      warp % Tile::kAcross * Tile::kColumnTiles * 8 * Tile::kChunk * 2 +
                      lane_columns_offset<Tile::kChunk>();
  PointwiseEnd<T, Tile, kMapped> end(out, first_column, weights + weight_slots * Tile::kWeightBytes);

  float sums[Tile::kRowTiles][Tile::kColumnTiles][4] = {};
  run_pipeline(
      unit.tiles(), ceil_div(depth, Tile::kChunk), stages, weight_slots,
      [&](int tile, int chunk, int stage) { source.load(tile, chunk, shared + stage * Tile::kPixelBytes); },
      [&](int chunk, int slot) {
        load_rows<Tile::kWidth, Tile::kChunk>(weight, first_column, row_channels(out.channels), depth, chunk,
                                              weights + slot * Tile::kWeightBytes);
      },
      [&](int tile, int chunk, int stage) { source.finish(tile, chunk, shared + stage * Tile::kPixelBytes); },
      [&](int chunk, int stage, int slot) {
        multiply_chunk<Number, Tile::kChunk>(sums, shared, rows + stage * Tile::kPixelBytes,
                                             columns + slot * Tile::kWeightBytes,
                                             ceil_div(depth - chunk * Tile::kChunk, 16));
      },
      [&](int tile) {
        end.store_tile(sums, unit.first_of(tile), unit.rows_of(tile), tile == 0);
#pragma unroll
        for (int i = 0; i < Tile::kRowTiles * Tile::kColumnTiles * 4; ++i) {
          sums[i / (Tile::kColumnTiles * 4)][i / 4 % Tile::kColumnTiles][i % 4] = 0.f;
        }
      });
  if (!kMapped && out.partials) {
    __syncthreads();
    end.store_statistics(unit.index, static_cast<int>(unit.last - unit.first), shared);
  }
}

template <typename Tile>
PipelinePlan plan_pointwise(int depth) {
  return plan_pipeline(ceil_div(depth, Tile::kChunk), Tile::kPixelBytes, Tile::kWeightBytes,
                       Tile::kStagedBytes, Tile::kBlocks);
}

// Which pieces of a tile's pixels are a thread's: those of rows kStep apart.
template <int kChunk>
struct PieceMap {
  static constexpr int kPieces = kChunk / 8, kStep = kPointwiseThreads / kPieces, kMost = kTilePixels / kStep;

  static __device__ __forceinline__ int row() { return static_cast<int>(threadIdx.x) / kPieces; }
  static __device__ __forceinline__ int channel(int chunk) {
    return chunk * kChunk + static_cast<int>(threadIdx.x) % kPieces * 8;
  }
  // Of the first row. The others' swizzle is the same.
  static __device__ __forceinline__ int offset() {
    return piece_offset<kChunk>(row(), static_cast<int>(threadIdx.x) % kPieces);
  }
  static constexpr int kOffsetStep = kStep * kChunk * 2;

  // Copies this thread's pieces of a chunk, from where `from(i)` says, of rows below `rows`; zeros behind
  // `depth`, as far as they are multiplied.
  template <typename From>
  static __device__ __forceinline__ void load(int rows, int depth, int chunk, unsigned char* stage,
                                              const From& from) {
    unsigned char* const to = stage + offset();
    if (channel(chunk) < depth) {
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        if (row() + i * kStep < rows) start_copy16(to + i * kOffsetStep, from(i));
      }
    } else if (channel(chunk) < round_up(depth, 16)) {
#pragma unroll
      for (int i = 0; i < kMost; ++i) *reinterpret_cast<uint4*>(to + i * kOffsetStep) = uint4{0, 0, 0, 0};
    }
  }
};

// The images of a tile's pixels.
class ImagesOfTile {
 public:
  __device__ ImagesOfTile(int64_t first_pixel, int image_pixels)
      : image_(first_pixel / image_pixels),
        within_(static_cast<int>(first_pixel % image_pixels)),
        image_pixels_(image_pixels),
        reciprocal_(0xffffffffu / static_cast<unsigned>(image_pixels) + 1) {}

  // Of the tile behind this one.
  __device__ __forceinline__ void advance() {
    int within;
    image_ = locate(kTilePixels, &within);
    within_ = within;
  }
  // The image of a row's pixel, and where in the image that is.
  __device__ __forceinline__ int64_t locate(int row, int* within) const {
    const int distance = within_ + row;
    int images;  // between the tile's first pixel and this one; divided without a division
    if (image_pixels_ >= kTilePixels) {
      images = distance >= image_pixels_ ? 1 : 0;
    } else {
      images = image_pixels_ == 1 ? distance : static_cast<int>(__umulhi(distance, reciprocal_));
    }
    *within = distance - images * image_pixels_;
    return image_ + images;
  }

 private:
  int64_t image_;
  int within_;
  const int image_pixels_;
  const unsigned reciprocal_;
};

}  // namespace greedynas::cuda
