// Which pixels of x a block of expand_depthwise on float maps expands, tile by tile, and how they come to
// shared memory.
#pragma once

#include <cstdint>

#include "device.h"
#include "fast_div.cuh"
#include "float_expand_tiling.h"
#include "float_product.cuh"
#include "kernels.h"

namespace greedynas::cuda::float_expand {
namespace {

using Product = FloatProduct<kGroup / 8>;

static_assert(kWarps * 32 == kProductThreads);

// What one block works on. It lives in shared memory, so that no phase carries it in registers.
template <int K, int S>
struct Piece {
  int unit, first_image, images, out_col, out_cols;
  int left, width,
      col;  // ring columns [left, left + width) are inside the image, the first of them is its `col`
  int steps;
  FastDiv by_width, by_rows;

  __device__ __forceinline__ void set(const Shape& s, const Tiling& t, int of_unit) {
    unit = of_unit;
    const int strips = ceil_div(s.out_width, t.cols);
    first_image = unit / strips * t.images;
    images = min(t.images, s.images - first_image);
    out_col = unit % strips * t.cols;
    out_cols = min(t.cols, s.out_width - out_col);
    left = max(0, K / 2 - out_col * S);
    col = out_col * S - K / 2 + left;
    width = min(out_cols * S + K - S - left, s.width - col);
    steps = ceil_div(s.out_height, t.step);
    by_width.set(width);
    by_rows.set(max(1, rows(s, t, 0)));  // used only where a block has several images, and one step
  }
  // Ring rows that a step adds, counted from the first one on: those that are inside the image.
  __device__ __forceinline__ int first_row(const Tiling& t, int step) const {
    return step == 0 ? K / 2 : K - S + step * t.step * S;
  }
  __device__ __forceinline__ int rows(const Shape& s, const Tiling& t, int step) const {
    const int last = min(K - S + (step + 1) * t.step * S, s.height + K / 2);
    return max(0, last - first_row(t, step));
  }
  __device__ __forceinline__ int pixels(const Shape& s, const Tiling& t, int step) const {
    return images * rows(s, t, step) * width;
  }
  // Tiles of pixels; a step has one at least.
  __device__ __forceinline__ int tiles(const Shape& s, const Tiling& t, int step) const {
    return max(1, ceil_div(pixels(s, t, step), kTilePixels));
  }
  __device__ __forceinline__ void locate(int pixel, int* image, int* row, int* column) const {
    const int line = by_width(pixel);
    *image = images > 1 ? static_cast<int>(by_rows(line)) : 0;
    *row = line - *image * static_cast<int>(by_rows.d);
    if (images == 1) *row = line;
    *column = pixel - line * width;
  }
};

// Where the walk through the tiles of all steps is.
struct Walk {
  int step = 0, tile = 0;

  template <typename Block>
  __device__ __forceinline__ void advance(const Block& b, const Shape& s, const Tiling& t) {
    if (++tile == b.tiles(s, t, step)) {
      tile = 0;
      ++step;
    }
  }
};

// Copies rows of x.
template <int K, int S>
class InputRows {
 public:
  __device__ InputRows(const ExpandDepthwise<float>& node, const Shape& s, const Tiling& t,
                       const Piece<K, S>& b)
      : x_(node.x + static_cast<int64_t>(b.first_image) * s.height * s.width * s.in_channels),
        s_(s),
        t_(t),
        b_(b) {}

  __device__ __forceinline__ void load(int tile, int chunk, float* stage) {
    if (chunk == 0) find_pixels(tile);
    Product::load_rows(loaded_count_, s_.in_channels, chunk, stage, [&](int i) { return from_[i]; });
  }
  __device__ __forceinline__ void finish(int tile, int chunk, float*) {
    if (chunk > 0) return;
    if (tile > 0) walk.advance(b_, s_, t_);
    count_ = b_.pixels(s_, t_, walk.step) - walk.tile * kTilePixels;
  }
  __device__ __forceinline__ int count(int) const { return count_; }

  Walk walk;  // to the tile that is multiplied

 private:
  __device__ __forceinline__ void find_pixels(int tile) {
    if (tile > 0) ahead_.advance(b_, s_, t_);
    loaded_count_ = b_.pixels(s_, t_, ahead_.step) - ahead_.tile * kTilePixels;
    const int first_row = b_.first_row(t_, ahead_.step) - K / 2;
#pragma unroll
    for (int i = 0; i < Product::kLoadedRows; ++i) {
      int image, row, column;
      b_.locate(ahead_.tile * kTilePixels + Product::loaded_row(i), &image, &row, &column);
      const int64_t line = static_cast<int64_t>(image) * s_.height + first_row + row;
      from_[i] = x_ + (line * s_.width + b_.col + column) * s_.in_channels;
    }
  }

  const float* const x_;
  const Shape& s_;
  const Tiling& t_;
  const Piece<K, S>& b_;
  Walk ahead_;
  int loaded_count_ = 0, count_ = 0;
  const float* from_[Product::kLoadedRows];  // of the tile that is being loaded
};

}  // namespace
}  // namespace greedynas::cuda::float_expand
