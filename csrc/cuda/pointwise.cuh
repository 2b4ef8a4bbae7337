// The product whose rows are pixels, from where a kernel brings them to the map that is stored: project.cu
// and conv_bn.cu.
#pragma once

#include <cstdint>

#include "device.h"
#include "kernels.h"
#include "operands.cuh"
#include "pipeline.cuh"
#include "pointwise_end.cuh"
#include "pointwise_tile.cuh"

namespace greedynas::cuda {

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
