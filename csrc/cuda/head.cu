// The head: a pointwise convolution, BatchNorm, activation and the mean over each image, without its map.
//
// The product is turned round: its rows are output channels, its columns pixels. So a lane has all columns of
// its rows one after another, and sums up an image in registers. Images begin at multiples of 8 columns; what
// they have fewer is multiplied in vain. A block takes some channels of some neighbouring images.
#include <algorithm>

#include "activate.h"
#include "operands.cuh"
#include "pipeline.cuh"

namespace greedynas::cuda {
namespace {

constexpr int kChunk = 32;
constexpr int kRowTiles = 2, kBlockChannels = kPointwiseThreads / 32 * kRowTiles * 16;
constexpr int kColumnTiles = 14, kBlockColumns = kColumnTiles * 8;  // of a tile: two images of 7x7
constexpr int kPixelBytes = kBlockColumns * kChunk * 2, kWeightBytes = kBlockChannels * kChunk * 2;

// Columns, by eights: those of an image, then those of the next one.
struct ImageColumns {
  int first_image, images, image_pixels;

  template <typename T>
  __device__ ImageColumns(const HeadPool<T>& node, int images_each)
      : first_image(blockIdx.x * images_each),
        images(min(images_each, node.images - first_image)),
        image_pixels(node.image_pixels) {}
  __device__ __forceinline__ int eights() const { return ceil_div(image_pixels, 8); }  // of an image
};

// Copies pixels' rows, which are the product's columns.
template <typename T>
class HeadPixels {
 public:
  __device__ HeadPixels(const HeadPool<T>& node, const ImageColumns& columns)
      : x_(node.x), columns_(columns), depth_(row_channels(node.in_channels)) {}

  __device__ __forceinline__ void load(int tile, int chunk, unsigned char* stage) {
    if (chunk == 0) find_pixels(tile);
    const int piece = threadIdx.x % kPieces, channel = chunk * kChunk + piece * 8;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (pixels_[i] < 0) continue;
      unsigned char* const to = stage + piece_offset<kChunk>(column(i), piece);
      if (channel < depth_) {
        start_copy16(to, x_ + pixels_[i] * depth_ + channel);
      } else if (channel < round_up(depth_, 16)) {
        *reinterpret_cast<uint4*>(to) = uint4{0, 0, 0, 0};
      }
    }
  }

 private:
  static constexpr int kPieces = kChunk / 8, kStep = kPointwiseThreads / kPieces;
  static constexpr int kMost = ceil_div(kBlockColumns, kStep);

  static __device__ __forceinline__ int column(int i) {
    return static_cast<int>(threadIdx.x) / kPieces + i * kStep;
  }

  __device__ __forceinline__ void find_pixels(int tile) {
    const unsigned eights = columns_.eights();
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      const unsigned eight = static_cast<unsigned>(tile * kColumnTiles + column(i) / 8),
                     image = eight / eights;
      const int pixel = static_cast<int>(eight - image * eights) * 8 + column(i) % 8;
      const bool exists = column(i) < kBlockColumns && image < static_cast<unsigned>(columns_.images) &&
                          pixel < columns_.image_pixels;
      const int64_t first = static_cast<int64_t>(columns_.first_image + image) * columns_.image_pixels;
      pixels_[i] = exists ? first + pixel : -1;
    }
  }

  const T* const x_;
  const ImageColumns& columns_;
  const int depth_;
  int64_t pixels_[kMost];  // of the tile that is being loaded; -1: nothing is copied
};

// Maps sums, activates them and adds them up; stores an image's means when it is complete.
class HeadEnd {
 public:
  template <typename T>
  __device__ HeadEnd(const HeadPool<T>& node, const ImageColumns& columns, int first_channel)
      : columns_(columns), activation_(node.activation), channels_(node.channels), pooled_(node.pooled) {
    const int stride = row_channels(channels_), lane = threadIdx.x & 31;
    first_row_ = first_channel + static_cast<int>(threadIdx.x) / 32 * kRowTiles * 16 + lane / 4;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (channel(r) >= channels_) continue;
      scale_[r] = node.affine[channel(r)];
      shift_[r] = node.affine[stride + channel(r)];
      bound_[r] = node.affine[2 * stride + channel(r)];
    }
  }

  __device__ __forceinline__ void add_tile(const float (&sums)[kRowTiles][kColumnTiles][4]) {
    with_activation(activation_, [&](auto activation) { add<decltype(activation)::value>(sums); });
  }

 private:
  static constexpr int kRows = kRowTiles * 2;  // of a lane, 8 apart

  __device__ __forceinline__ int channel(int r) const { return first_row_ + r * 8; }

  template <int kActivation>
  __device__ __forceinline__ void add(const float (&sums)[kRowTiles][kColumnTiles][4]) {
    const int lane_pixel = static_cast<int>(threadIdx.x & 3) * 2;
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
      if (image_ == columns_.images) return;
      const int left = columns_.image_pixels - eight_ * 8 - lane_pixel;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float u = fmaf(sums[r / 2][n][r % 2 * 2 + i], scale_[r], shift_[r]);
          total_[r] += i < left ? activate<kActivation>(u, bound_[r]) : 0.f;
        }
      }
      if (++eight_ == columns_.eights()) store_image();
    }
  }

  __device__ __forceinline__ void store_image() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float total = total_[r];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      total_[r] = 0.f;
      const int stride = row_channels(channels_);
      if (threadIdx.x % 4 != 0 || channel(r) >= stride) continue;
      pooled_[static_cast<int64_t>(columns_.first_image + image_) * stride + channel(r)] =
          channel(r) < channels_ ? total / static_cast<float>(columns_.image_pixels) : 0.f;
    }
    eight_ = 0;
    ++image_;
  }

  const ImageColumns& columns_;
  const int activation_, channels_;
  float* const pooled_;
  int first_row_;
  int image_ = 0, eight_ = 0;  // where the next columns are
  float scale_[kRows] = {}, shift_[kRows] = {}, bound_[kRows] = {}, total_[kRows] = {};
};

template <typename T>
__global__ void __launch_bounds__(kPointwiseThreads, 1)
    head_pool_kernel(const __grid_constant__ Group<HeadPool<T>> group, int images_each, int stages,
                     int weight_slots) {
  if (!computes<T>()) return;
  GREEDYNAS_DYNAMIC_SHARED(shared);
  unsigned char* const weights = shared + stages * kPixelBytes;
  const HeadPool<T>& node = group.nodes[blockIdx.y];
  const int first_channel = blockIdx.z * kBlockChannels, depth = row_channels(node.in_channels);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int rows = stages * kPixelBytes + warp * kRowTiles * 16 * kChunk * 2 + lane_rows_offset<kChunk>();
  const ImageColumns columns(node, images_each);
  HeadPixels<T> source(node, columns);
  HeadEnd end(node, columns, first_channel);
  float sums[kRowTiles][kColumnTiles][4] = {};
  run_pipeline(
      static_cast<int>(ceil_div(int64_t{columns.images} * columns.eights(), int64_t{kColumnTiles})),
      ceil_div(depth, kChunk), stages, weight_slots,
      [&](int tile, int chunk, int stage) { source.load(tile, chunk, shared + stage * kPixelBytes); },
      [&](int chunk, int slot) {
        load_rows<kBlockChannels, kChunk>(node.weight, first_channel, row_channels(node.channels), depth,
                                          chunk, weights + slot * kWeightBytes);
      },
      [](int, int, int) {},
      [&](int chunk, int stage, int slot) {
        multiply_chunk<T, kChunk>(sums, shared, rows + slot * kWeightBytes,
                                  lane_columns_offset<kChunk>() + stage * kPixelBytes,
                                  ceil_div(depth - chunk * kChunk, 16));
      },
      [&](int) {
        end.add_tile(sums);
#pragma unroll
        for (int i = 0; i < kRowTiles * kColumnTiles * 4; ++i) {
          sums[i / (kColumnTiles * 4)][i / 4 % kColumnTiles][i % 4] = 0.f;
        }
      });
}

}  // namespace

template <typename T>
void head_pool(const Group<HeadPool<T>>& group, Stream stream) {
  const HeadPool<T>& node = group.nodes[0];
  if (node.images == 0) return;
  int depth = 0;
  for (int i = 0; i < group.count; ++i) depth = std::max(depth, row_channels(group.nodes[i].in_channels));
  const PipelinePlan plan = plan_pipeline(ceil_div(depth, kChunk), kPixelBytes, kWeightBytes, 0, 1);
  // Some blocks for each multiprocessor, so that they end together; but weights are to be loaded for several
  // tiles.
  const int slices = ceil_div(row_channels(node.channels), kBlockChannels);
  const int blocks = std::max(1, 4 * multiprocessors() / (slices * group.count));
  const int images_each = ceil_div(node.images, std::min(node.images, blocks));
  GREEDYNAS_LAUNCH((head_pool_kernel<T>), dim3(ceil_div(node.images, images_each), group.count, slices),
                   dim3(kPointwiseThreads), plan.bytes, stream, group, images_each, plan.stages,
                   plan.weight_slots);
}

template void head_pool(const Group<HeadPool<BFloat16>>&, Stream);
template void head_pool(const Group<HeadPool<Half>>&, Stream);

}  // namespace greedynas::cuda
