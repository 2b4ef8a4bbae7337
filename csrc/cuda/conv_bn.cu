// Convolutions that are followed by a BatchNorm and belong to no inverted bottleneck: strided pointwise ones,
// and the dense one of the images themselves. Both are products whose rows are pixels; they differ in how
// these come to shared memory.
#include <algorithm>

#include "pointwise.cuh"

namespace greedynas::cuda {
namespace {

// Output pixels of images, by image, row and column.
struct PixelGrid {
  int64_t pixels;
  int image_pixels, width;

  // The image of a tile's row, and where in the image that is.
  __device__ __forceinline__ int64_t locate(const ImagesOfTile& images, int tile_row, int* row,
                                            int* column) const {
    int within;
    const int64_t image = images.locate(tile_row, &within);
    *row = static_cast<int>(static_cast<unsigned>(within) / static_cast<unsigned>(width));
    *column = within - *row * width;
    return image;
  }
};

template <typename T, int kChunk>
class StridedPixels {
 public:
  __device__ StridedPixels(const StridedConv<T>& node, const PixelGrid& grid, const Unit& unit)
      : unit_(unit),
        x_(node.x),
        grid_(grid),
        height_(node.height),
        width_(node.width),
        stride_(node.stride),
        depth_(row_channels(node.in_channels)),
        images_(unit.first, grid.image_pixels) {}

  __device__ __forceinline__ void load(int tile, int chunk, unsigned char* stage) {
    if (chunk == 0) find_rows(tile);
    Pieces::load(rows_, depth_, chunk, stage, [&](int i) { return from_[i] + chunk * kChunk; });
  }
  __device__ __forceinline__ void finish(int, int, unsigned char*) const {}

 private:
  using Pieces = PieceMap<kChunk>;

  __device__ __forceinline__ void find_rows(int tile) {
    if (tile > 0) images_.advance();
    rows_ = unit_.rows_of(tile);
#pragma unroll
    for (int i = 0; i < Pieces::kMost; ++i) {
      int row, column;
      const int64_t image = grid_.locate(images_, Pieces::row() + i * Pieces::kStep, &row, &column);
      from_[i] =
          x_ + ((image * height_ + row * stride_) * width_ + column * stride_) * depth_ + Pieces::channel(0);
    }
  }

  const Unit& unit_;
  const T* const x_;
  const PixelGrid grid_;
  const int height_, width_, stride_, depth_;
  ImagesOfTile images_;
  const T* from_[Pieces::kMost];  // of the tile that is being loaded
  int rows_;
};

// Where the numbers of a row of the stem's weight meet an image, from where the window begins. In shared
// memory, padded to whole chunks.
struct StemTaps {
  int64_t* offsets;  // in bytes
  int* places;       // row * 2^16 + column
  int count;

  static std::size_t bytes(int padded) { return padded * (sizeof(int64_t) + sizeof(int)); }
  template <typename T>
  __device__ StemTaps(const StemConv<T>& node, int padded, unsigned char* shared)
      : offsets(reinterpret_cast<int64_t*>(shared)),
        places(reinterpret_cast<int*>(shared + padded * sizeof(int64_t))),
        count(node.kernel * node.kernel * node.in_channels) {
    for (int at = threadIdx.x; at < padded; at += kPointwiseThreads) {
      const int channel = at % node.in_channels, tap = at / node.in_channels;
      const int row = tap / node.kernel, column = tap % node.kernel;
      offsets[at] = (channel * node.strides[1] + row * node.strides[2] + column * node.strides[3]) * 4;
      places[at] = row << 16 | column;
    }
    __syncthreads();
  }
};

// Numbers wait in registers while the chunk before is multiplied. Threads of a warp have neighbouring pixels
// and the same taps: what they read lies along a row of the image.
template <typename T, int kChunk>
class StemPixels {
 public:
  __device__ StemPixels(const StemConv<T>& node, const PixelGrid& grid, const Unit& unit,
                        const StemTaps& taps)
      : node_(node), unit_(unit), grid_(grid), taps_(taps), images_(unit.first, grid.image_pixels) {}

  __device__ __forceinline__ void load(int tile, int chunk, unsigned char*) {
    if (chunk == 0) find_window(tile);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int at = chunk * kChunk + piece(i) * 8;
      unsigned seen = (1u << max(0, min(8, taps_.count - at))) - 1;
      if (!inside_) seen &= inside(at);
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        values_[i][j] = 0.f;
        if (seen >> j & 1) {
          values_[i][j] = __ldg(reinterpret_cast<const float*>(window_ + taps_.offsets[at + j]));
        }
      }
    }
  }

  __device__ __forceinline__ void finish(int, int, unsigned char* stage) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      *reinterpret_cast<uint4*>(stage + piece_offset<kChunk>(pixel(), piece(i))) = pack<T>(values_[i]);
    }
  }

 private:
  static constexpr int kPieces = kTilePixels * kChunk / 8 / kPointwiseThreads;  // of a thread, of one pixel

  static __device__ __forceinline__ int pixel() { return static_cast<int>(threadIdx.x) % kTilePixels; }
  static __device__ __forceinline__ int piece(int i) {
    return static_cast<int>(threadIdx.x) / kTilePixels * kPieces + i;
  }

  __device__ __forceinline__ void find_window(int tile) {
    if (tile > 0) images_.advance();
    const int64_t image = grid_.locate(images_, min(pixel(), unit_.rows_of(tile) - 1), &row_, &column_);
    row_ = row_ * node_.stride - node_.kernel / 2;
    column_ = column_ * node_.stride - node_.kernel / 2;
    window_ = reinterpret_cast<const char*>(node_.images) +
              (image * node_.strides[0] + row_ * node_.strides[2] + column_ * node_.strides[3]) * 4;
    inside_ = row_ >= 0 && column_ >= 0 && row_ + node_.kernel <= node_.height &&
              column_ + node_.kernel <= node_.width;
  }

  // Which of 8 taps lie inside the image.
  __device__ __forceinline__ unsigned inside(int at) const {
    unsigned result = 0;
    for (int j = 0; j < 8; ++j) {
      const int row = row_ + (taps_.places[at + j] >> 16);
      const int column = column_ + (taps_.places[at + j] & 0xffff);
      if (row >= 0 && row < node_.height && column >= 0 && column < node_.width) result |= 1u << j;
    }
    return result;
  }

  const StemConv<T>& node_;
  const Unit& unit_;
  const PixelGrid grid_;
  const StemTaps& taps_;
  ImagesOfTile images_;
  int row_, column_;    // of the window's first number, which may lie outside the image
  const char* window_;  // that number
  bool inside_;         // all of the window
  float values_[kPieces][8];
};

template <typename T, typename Tile, bool kMapped>
__global__ void __launch_bounds__(kPointwiseThreads, Tile::kWidth <= 64 ? 2 : 1)
    strided_conv_kernel(const __grid_constant__ Group<StridedConv<T>> group, PixelGrid grid, int passes,
                        int stages, int weight_slots) {
  if (!computes_by<T, Tile>()) return;
  GREEDYNAS_DYNAMIC_SHARED(shared);
  const StridedConv<T>& node = group.nodes[blockIdx.y];
  const Unit unit(grid.pixels, blockIdx.x / passes);
  StridedPixels<T, Tile::kChunk> source(node, grid, unit);
  run_pointwise<Tile, kMapped>(source, node.weight, row_channels(node.in_channels), node.out, unit,
                               blockIdx.x % passes, stages, weight_slots, shared);
}

template <typename T, typename Tile, bool kMapped>
__global__ void __launch_bounds__(kPointwiseThreads, Tile::kBlocks - (kMapped || !since_sm80() ? 1 : 0))
    stem_conv_kernel(const __grid_constant__ StemConv<T> node, PixelGrid grid, int depth, int passes,
                     int weight_slots) {
  if (!computes_by<T, Tile>()) return;
  GREEDYNAS_DYNAMIC_SHARED(shared);
  constexpr int kStages = 2;
  const StemTaps taps(
      node, round_up(depth, Tile::kChunk),
      shared + kStages * Tile::kPixelBytes + weight_slots * Tile::kWeightBytes + Tile::kStagedBytes);
  const Unit unit(grid.pixels, blockIdx.x / passes);
  StemPixels<T, Tile::kChunk> source(node, grid, unit, taps);
  run_pointwise<Tile, kMapped>(source, node.weight, depth, node.out, unit, blockIdx.x % passes, kStages,
                               weight_slots, shared);
}

// Calls `function` with the tile for some output channels. There are fewer than of projections: what counts
// is how fast x is read, not what is multiplied in vain.
template <typename Function>
void with_strided_tile(int channels, const Function& function) {
  const int width = pass_width(channels);
  using Fitting = PointwiseTile<160, 32, 2>;
  if (width <= 32) return function(PointwiseTile<32, 64, 1>{});
  if (little_shared_memory()) return function(Fitting{});
  if (width <= 64) return function(PointwiseTile<64, 64, 1>{});
  if (width <= 96) return function(PointwiseTile<96, 64, 1>{});
  if (width <= 160) return function(Fitting{});
  return function(PointwiseTile<192, 32, 2>{});
}

constexpr int out_size(int size, int kernel, int stride) {
  return (size + kernel / 2 * 2 - kernel) / stride + 1;
}

PixelGrid grid_of(int images, int height, int width) {
  return {static_cast<int64_t>(images) * height * width, height * width, width};
}

}  // namespace

template <typename T>
void strided_conv(const Group<StridedConv<T>>& group, Stream stream) {
  const StridedConv<T>& node = group.nodes[0];
  const PixelGrid grid =
      grid_of(node.images, out_size(node.height, 1, node.stride), out_size(node.width, 1, node.stride));
  const int units = pointwise_units<T>(grid.pixels), channels = node.out.channels;
  if (units == 0) return;
  int depth = 0;
  for (int i = 0; i < group.count; ++i) depth = std::max(depth, row_channels(group.nodes[i].in_channels));
  with_strided_tile(channels, [&](auto tile) {
    using Tile = decltype(tile);
    const PipelinePlan plan = plan_pointwise<Tile>(depth);
    const int passes = ceil_div(row_channels(channels), Tile::kWidth);
    const auto launch = [&](auto strided_conv_kernel_of_tile) {
      GREEDYNAS_LAUNCH(strided_conv_kernel_of_tile, dim3(units * passes, group.count),
                       dim3(kPointwiseThreads), plan.bytes, stream, group, grid, passes, plan.stages,
                       plan.weight_slots);
    };
    if (node.out.affine) {
      launch(strided_conv_kernel<T, Tile, true>);
    } else {
      launch(strided_conv_kernel<T, Tile, false>);
    }
  });
}

template <typename T>
void stem_conv(const StemConv<T>& node, Stream stream) {
  const PixelGrid grid = grid_of(node.images_count, out_size(node.height, node.kernel, node.stride),
                                 out_size(node.width, node.kernel, node.stride));
  const int units = pointwise_units<T>(grid.pixels), channels = node.out.channels;
  if (units == 0) return;
  const int depth = round_up(node.kernel * node.kernel * node.in_channels, 16);
  const auto with_tile = [&](auto tile) {
    using Tile = decltype(tile);
    const std::size_t taps = StemTaps::bytes(round_up(depth, Tile::kChunk));
    const int passes = ceil_div(row_channels(channels), Tile::kWidth), chunks = ceil_div(depth, Tile::kChunk);
    // All of the weight where it fits, else a chunk for each of the two stages.
    const auto bytes = [&](int slots) {
      return 2 * Tile::kPixelBytes + slots * Tile::kWeightBytes + Tile::kStagedBytes + taps;
    };
    const int slots = bytes(chunks) <= 64 * 1024 ? chunks : 2;
    const auto launch = [&](auto stem_conv_kernel_of_tile) {
      GREEDYNAS_LAUNCH(stem_conv_kernel_of_tile, dim3(units * passes), dim3(kPointwiseThreads), bytes(slots),
                       stream, node, grid, depth, passes, slots);
    };
    if (node.out.affine) {
      launch(stem_conv_kernel<T, Tile, true>);
    } else {
      launch(stem_conv_kernel<T, Tile, false>);
    }
  };
  if (channels <= 32) return with_tile(PointwiseTile<32, 32, 1>{});
  with_tile(PointwiseTile<64, 32, 1>{});
}

template void strided_conv(const Group<StridedConv<BFloat16>>&, Stream);
template void strided_conv(const Group<StridedConv<Half>>&, Stream);
template void stem_conv(const StemConv<BFloat16>&, Stream);
template void stem_conv(const StemConv<Half>&, Stream);

}  // namespace greedynas::cuda
