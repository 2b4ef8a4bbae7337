// Convolutions of float maps that are followed by a BatchNorm and belong to no inverted bottleneck: strided
// pointwise ones, and the dense one of the images themselves. They differ in how rows come to shared memory.
#include <cstddef>
#include <cstdint>

#include "device.h"
#include "float_pointwise.cuh"
#include "kernels.h"

namespace greedynas::cuda {
namespace {

// Output pixels of images.
struct PixelGrid {
  int64_t pixels;
  int height, width;
};

PixelGrid grid_of(int images, int height, int width, int stride) {
  const int out_height = (height - 1) / stride + 1, out_width = (width - 1) / stride + 1;
  return {static_cast<int64_t>(images) * out_height * out_width, out_height, out_width};
}

// The image, row and column of an output pixel.
struct PixelPlace {
  int64_t image;
  int row, column;

  __device__ __forceinline__ PixelPlace(const PixelGrid& grid, int64_t pixel)
      : image(pixel / (grid.height * grid.width)) {
    const auto within = static_cast<unsigned>(pixel - image * (grid.height * grid.width));
    row = static_cast<int>(within / static_cast<unsigned>(grid.width));
    column = static_cast<int>(within) - row * grid.width;
  }
};

template <typename Product>
class StridedRows {
 public:
  __device__ StridedRows(const StridedConv<float>& node, const PixelGrid& grid, const Unit& unit)
      : node_(node), grid_(grid), unit_(unit), depth_(row_channels(node.in_channels)) {}

  __device__ __forceinline__ int count(int tile) const { return unit_.rows_of(tile); }
  __device__ __forceinline__ void load(int tile, int chunk, float* stage) {
    if (chunk == 0) {
#pragma unroll
      for (int i = 0; i < Product::kLoadedRows; ++i) {
        const PixelPlace at(grid_, unit_.first_of(tile) + Product::loaded_row(i));
        from_[i] = node_.x + ((at.image * node_.height + at.row * node_.stride) * node_.width +
                              at.column * node_.stride) *
                                 depth_;
      }
    }
    Product::load_rows(count(tile), depth_, chunk, stage, [&](int i) { return from_[i]; });
  }
  __device__ __forceinline__ void finish(int, int, float*) const {}

 private:
  const StridedConv<float>& node_;
  const PixelGrid& grid_;
  const Unit& unit_;
  const int depth_;
  const float* from_[Product::kLoadedRows];  // of the tile that is being loaded
};

// Where a number of the weight's row meets an image, from where the window begins.
struct StemTap {
  int64_t offset;
  int row, column;
};

// A thread has one pixel's window; neighbours read along a row of the image.
template <typename Product>
class StemRows {
 public:
  static_assert(kProductThreads == kTilePixels);

  __device__ StemRows(const StemConv<float>& node, const PixelGrid& grid, const Unit& unit, int depth,
                      StemTap* taps)
      : node_(node), grid_(grid), unit_(unit), taps_(taps) {
    for (int at = threadIdx.x; at < depth; at += kProductThreads) {
      const int channel = at % node.in_channels, tap = at / node.in_channels;
      const int row = tap / node.kernel, column = tap % node.kernel;
      const bool real = row < node.kernel;  // others are never inside
      taps[at] = {channel * node.strides[1] + row * node.strides[2] + column * node.strides[3],
                  real ? row : node.height + node.kernel, column};
    }
    __syncthreads();
  }

  __device__ __forceinline__ int count(int tile) const { return unit_.rows_of(tile); }
  __device__ __forceinline__ void load(int tile, int chunk, float* stage) {
    if (static_cast<int>(threadIdx.x) >= count(tile)) return;
    if (chunk == 0) {
      const PixelPlace at(grid_, unit_.first_of(tile) + threadIdx.x);
      row_ = at.row * node_.stride - node_.kernel / 2;
      column_ = at.column * node_.stride - node_.kernel / 2;
      window_ = at.image * node_.strides[0] + row_ * node_.strides[2] + column_ * node_.strides[3];
    }
    float values[Product::kDepth];
#pragma unroll
    for (int k = 0; k < Product::kDepth; ++k) {
      const StemTap& tap = taps_[chunk * Product::kDepth + k];
      const auto row = static_cast<unsigned>(row_ + tap.row),
                 column = static_cast<unsigned>(column_ + tap.column);
      const bool inside =
          row < static_cast<unsigned>(node_.height) && column < static_cast<unsigned>(node_.width);
      values[k] = inside ? __ldg(node_.images + window_ + tap.offset) : 0.f;
    }
    auto* const to = reinterpret_cast<float4*>(stage + threadIdx.x * Product::kPitch);
#pragma unroll
    for (int k = 0; k < Product::kPieces; ++k) {
      to[k] = float4{values[4 * k], values[4 * k + 1], values[4 * k + 2], values[4 * k + 3]};
    }
  }
  __device__ __forceinline__ void finish(int, int, float*) const {}

 private:
  const StemConv<float>& node_;
  const PixelGrid& grid_;
  const Unit& unit_;
  const StemTap* const taps_;
  int row_ = 0, column_ = 0;  // of the window's first number, which may lie outside the image
  int64_t window_ = 0;        // that number
};

template <typename Product>
__global__ void __launch_bounds__(kProductThreads, 2)
    float_strided_conv_kernel(const __grid_constant__ Group<StridedConv<float>> group,
                              const __grid_constant__ PixelGrid grid, int passes) {
  GREEDYNAS_DYNAMIC_SHARED(shared);
  const StridedConv<float>& node = group.nodes[blockIdx.y];
  const Unit unit(grid.pixels, blockIdx.x / passes);
  StridedRows<Product> rows(node, grid, unit);
  run_float_pointwise<Product>(rows, node.weight, row_channels(node.in_channels), node.out, unit,
                               blockIdx.x % passes, reinterpret_cast<float*>(shared));
}

template <typename Product>
__global__ void __launch_bounds__(kProductThreads, Product::kBlocks)
    float_stem_conv_kernel(const __grid_constant__ StemConv<float> node,
                           const __grid_constant__ PixelGrid grid, int depth, int passes) {
  GREEDYNAS_DYNAMIC_SHARED(shared);
  const Unit unit(grid.pixels, blockIdx.x / passes);
  StemRows<Product> rows(node, grid, unit, depth,
                         reinterpret_cast<StemTap*>(shared + float_pointwise_bytes<Product>()));
  run_float_pointwise<Product>(rows, node.weight, depth, node.out, unit, blockIdx.x % passes,
                               reinterpret_cast<float*>(shared));
}

// Calls `function` with the product for that many output channels, and its passes.
template <typename Function>
void with_product(int channels, const Function& function) {
  const int row = row_channels(channels);
  if (row <= 32) return function(FloatProduct<4>{}, 1);
  function(FloatProduct<6>{}, ceil_div(row, FloatProduct<6>::kWidth));
}

}  // namespace

template <>
void strided_conv(const Group<StridedConv<float>>& group, Stream stream) {
  const StridedConv<float>& node = group.nodes[0];
  const PixelGrid grid = grid_of(node.images, node.height, node.width, node.stride);
  const int units = pointwise_units<float>(grid.pixels);
  if (units == 0) return;
  with_product(node.out.channels, [&](auto product, int passes) {
    using Product = decltype(product);
    GREEDYNAS_LAUNCH((float_strided_conv_kernel<Product>), dim3(units * passes, group.count),
                     dim3(kProductThreads), float_pointwise_bytes<Product>(), stream, group, grid, passes);
  });
}

template <>
void stem_conv(const StemConv<float>& node, Stream stream) {
  const PixelGrid grid = grid_of(node.images_count, node.height, node.width, node.stride);
  const int units = pointwise_units<float>(grid.pixels);
  if (units == 0) return;
  const int depth = round_up(node.kernel * node.kernel * node.in_channels, 16);
  with_product(node.out.channels, [&](auto product, int passes) {
    using Product = decltype(product);
    const std::size_t bytes = float_pointwise_bytes<Product>() + depth * sizeof(StemTap);
    GREEDYNAS_LAUNCH((float_stem_conv_kernel<Product>), dim3(units * passes), dim3(kProductThreads), bytes,
                     stream, node, grid, depth, passes);
  });
}

}  // namespace greedynas::cuda
