// The head of float maps: a pointwise convolution, BatchNorm, activation and the mean over each image,
// without its map. A block takes some channels of some neighbouring images.
//
// An image's pixels are summed up one after another, in groups of kSumGroup from its first one on: so its
// means are the same in any company.
#include <algorithm>
#include <cstdint>

#include "activate.h"
#include "device.h"
#include "float_product.cuh"
#include "kernels.h"

namespace greedynas::cuda {
namespace {

using Product = FloatProduct<8>;
constexpr int kSumGroup = 64;
constexpr int kStagedRows = kTilePixels / 2, kStagedPitch = Product::kWidth + 8;

struct RunningSum {
  float total, group;
};

// Behind the product's stages.
struct HeadMemory {
  float staged[kStagedRows][kStagedPitch];
  RunningSum carried[2][Product::kWidth];  // of an image that goes on; by turns written and read
};

class HeadRows {
 public:
  __device__ HeadRows(const HeadPool<float>& node, int images_each)
      : first_image(blockIdx.x / slices_of(node) * images_each),
        pixels(static_cast<int64_t>(min(images_each, node.images - first_image)) * node.image_pixels),
        depth(row_channels(node.in_channels)),
        x_(node.x + static_cast<int64_t>(first_image) * node.image_pixels * depth) {}

  static __device__ __host__ int slices_of(const HeadPool<float>& node) {
    return ceil_div(row_channels(node.channels), Product::kWidth);
  }
  __device__ __forceinline__ int tiles() const {
    return static_cast<int>(ceil_div(pixels, int64_t{kTilePixels}));
  }
  __device__ __forceinline__ int64_t first_of(int tile) const {
    return static_cast<int64_t>(tile) * kTilePixels;
  }
  __device__ __forceinline__ int count(int tile) const {
    return static_cast<int>(min(pixels - first_of(tile), int64_t{kTilePixels}));
  }
  __device__ __forceinline__ void load(int tile, int chunk, float* stage) const {
    const float* const from = x_ + first_of(tile) * depth;
    Product::load_rows(count(tile), depth, chunk, stage,
                       [&](int i) { return from + static_cast<int64_t>(Product::loaded_row(i)) * depth; });
  }
  __device__ __forceinline__ void finish(int, int, float*) const {}

  const int first_image;
  const int64_t pixels;  // of the block
  const int depth;

 private:
  const float* const x_;
};

// Maps sums, activates them and adds them up; stores an image's means when it is complete.
class HeadEnd {
 public:
  __device__ HeadEnd(const HeadPool<float>& node, const HeadRows& rows, int first_channel, HeadMemory& memory)
      : node_(node), rows_(rows), first_channel_(first_channel), memory_(memory) {}

  __device__ __forceinline__ void add_tile(int tile, Product::Sums& sums) {
    with_activation(node_.activation, [&](auto activation) { map<decltype(activation)::value>(sums); });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      __syncthreads();  // what was staged before has been summed up
      if (Product::warp() / 2 == half) {
#pragma unroll
        for (int i = 0; i < Product::kRows; ++i) {
#pragma unroll
          for (int j = 0; j < Product::kAcross; ++j) {
            memory_.staged[Product::row(i) % kStagedRows][Product::column(j)] = sums[i][j];
          }
        }
      }
      __syncthreads();
      const int64_t first = rows_.first_of(tile) + half * kStagedRows;
      add_rows(first, min(first + kStagedRows, rows_.pixels), half);
    }
  }

 private:
  template <int kActivation>
  __device__ __forceinline__ void map(Product::Sums& sums) const {
    const int stride = row_channels(node_.channels);
#pragma unroll
    for (int j = 0; j < Product::kAcross; ++j) {
      const int channel = first_channel_ + Product::column(j);
      if (channel >= stride) break;
      const float* const affine = node_.affine + channel;
      const float scale = __ldg(affine), shift = __ldg(affine + stride), bound = __ldg(affine + 2 * stride);
#pragma unroll
      for (int i = 0; i < Product::kRows; ++i) {
        sums[i][j] = activate<kActivation>(fmaf(sums[i][j], scale, shift), bound);
      }
    }
  }

  // The staged rows are the block's pixels from `first` to `last`; a thread takes an image's part of them.
  __device__ __forceinline__ void add_rows(int64_t first, int64_t last, int half) const {
    if (first >= last) return;
    const int64_t first_image = first / node_.image_pixels;
    const int images = static_cast<int>((last - 1) / node_.image_pixels - first_image) + 1;
    for (int item = threadIdx.x; item < images * Product::kWidth; item += kProductThreads) {
      const int c = item % Product::kWidth;
      const int64_t image = first_image + item / Product::kWidth, begin = image * node_.image_pixels;
      const int64_t end = begin + node_.image_pixels;
      int row = static_cast<int>(max(begin, first) - first),
          group_row = static_cast<int>((first + row - begin) % kSumGroup);
      const int last_row = static_cast<int>(min(end, last) - first);
      RunningSum sum{0.f, 0.f};
      if (begin < first) sum = memory_.carried[half][c];
      while (row < last_row) {
        const int stop = min(last_row, row + kSumGroup - group_row);
#pragma unroll 8
        for (; row < stop; ++row) sum.group += memory_.staged[row][c];
        if ((first + row - begin) % kSumGroup == 0) {
          sum.total += sum.group;
          sum.group = 0.f;
        }
        group_row = 0;
      }
      if (end > last) {
        memory_.carried[1 - half][c] = sum;
      } else {
        store(static_cast<int>(image), c, sum.total + sum.group);
      }
    }
  }

  __device__ __forceinline__ void store(int image, int c, float total) const {
    const int channel = first_channel_ + c, stride = row_channels(node_.channels);
    if (channel >= stride) return;
    node_.pooled[static_cast<int64_t>(rows_.first_image + image) * stride + channel] =
        channel < node_.channels ? total / static_cast<float>(node_.image_pixels) : 0.f;
  }

  const HeadPool<float>& node_;
  const HeadRows& rows_;
  const int first_channel_;
  HeadMemory& memory_;
};

__global__ void __launch_bounds__(kProductThreads, Product::kBlocks)
    float_head_pool_kernel(const __grid_constant__ Group<HeadPool<float>> group, int images_each) {
  GREEDYNAS_DYNAMIC_SHARED(shared);
  const HeadPool<float>& node = group.nodes[blockIdx.y];
  const int first_channel = blockIdx.x % HeadRows::slices_of(node) * Product::kWidth;
  HeadRows rows(node, images_each);
  HeadEnd end(node, rows, first_channel, *reinterpret_cast<HeadMemory*>(shared + Product::kBytes));
  Product::run(
      rows.tiles(), rows.depth, reinterpret_cast<float*>(shared), rows,
      [&](int, int chunk, float* stage) {
        Product::load_columns(node.weight, row_channels(node.channels), rows.depth, chunk, stage,
                              [&](int c) { return first_channel + c; });
      },
      [&](int tile, Product::Sums& sums) { end.add_tile(tile, sums); });
}

}  // namespace

template <>
void head_pool(const Group<HeadPool<float>>& group, Stream stream) {
  const HeadPool<float>& node = group.nodes[0];
  if (node.images == 0) return;
  // Some blocks for each multiprocessor, so that they end together.
  const int slices = HeadRows::slices_of(node);
  const int blocks = std::max(1, 16 * multiprocessors() / (slices * group.count));
  const int images_each = ceil_div(node.images, std::min(node.images, blocks));
  GREEDYNAS_LAUNCH(float_head_pool_kernel, dim3(ceil_div(node.images, images_each) * slices, group.count),
                   dim3(kProductThreads), Product::kBytes + sizeof(HeadMemory), stream, group, images_each);
}

}  // namespace greedynas::cuda
