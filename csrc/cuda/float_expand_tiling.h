// How expand_depthwise on float maps divides its work between blocks: plain C++, a function of a node and the
// device alone, so that the units of its statistics are too.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace greedynas::cuda::float_expand {

inline constexpr int kGroup = 32;  // hidden channels of a block, a warp's width
inline constexpr int kCols = 7;    // output columns of a depthwise item (ImageNet's widths are 7 * 2^n)
inline constexpr int kWarps = 4;

// Output rows of a depthwise item.
constexpr int item_rows(int stride) { return stride == 1 ? 4 : 2; }

struct Shape {
  int images, height, width, in_channels;  // of memory rows: a multiple of 8
  int out_height, out_width;
  int kernel, stride;
};

inline Shape shape_of(const ExpandDepthwise<float>& n) {
  const auto out = [&](int size) { return (size - 1) / n.stride + 1; };
  return {n.images,      n.height,     n.width,  row_channels(n.in_channels),
          out(n.height), out(n.width), n.kernel, n.stride};
}

// A block makes `cols` output columns of `images` images, `step` rows at a time, sliding down: expanded rows
// lie in a ring, and none is computed twice. It has several images only where one step makes all rows.
struct Tiling {
  int images, cols, step;
};

// One block's shared memory in bytes.
struct Layout {
  int ring_rows, ring_cols;
  int ring;    // float [images][ring_rows][ring_cols][kGroup]
  int stages;  // of the product; at last sums on their way to the unit's
  int taps;    // float [kernel * kernel][kGroup]
  int affine;  // float [3][kGroup]
  int bytes;
};

inline Layout layout_of(const Shape& s, const Tiling& t, int stage_bytes) {
  const int halo = s.kernel - s.stride;
  Layout l{};
  l.ring_rows = t.step * s.stride + halo;
  l.ring_cols = round_up(t.cols, kCols) * s.stride + halo;
  const int64_t ring = int64_t{t.images} * l.ring_rows * l.ring_cols * kGroup * 4;
  l.stages = static_cast<int>(std::min(ring, int64_t{1} << 28));
  l.taps = l.stages + stage_bytes;
  l.affine = l.taps + s.kernel * s.kernel * kGroup * 4;
  l.bytes = l.affine + 3 * kGroup * 4;
  return l;
}

// Instructions of a block's warps per output, in units of fused multiply-adds; 0 if the tiling does not fit
// into `shared_bytes` of a block.
inline double cost_of(const Shape& s, const Tiling& t, int shared_bytes, int stage_bytes) {
  constexpr int kSystem = 1024, kStatic = 512;
  const Layout l = layout_of(s, t, stage_bytes);
  if (l.bytes + kStatic > shared_bytes) return 0;
  const int halo = s.kernel - s.stride, item = item_rows(s.stride);
  const int width = std::min(t.cols * s.stride + halo, s.width), steps = ceil_div(s.out_height, t.step);
  const double loads = (item * s.stride + halo) * (kCols * s.stride + halo);
  const double item_work = item * kCols * (s.kernel * s.kernel + 5.) + 1.3 * loads;
  double work = 0;
  for (int step = 0; step < steps; ++step) {
    // Ring rows 0 to kernel / 2 - 1 are above the image.
    const int begin = step == 0 ? s.kernel / 2 : halo + step * t.step * s.stride;
    const int end = std::min(halo + (step + 1) * t.step * s.stride, s.height + s.kernel / 2);
    const int pixels = t.images * std::max(0, end - begin) * width;
    const int rows = std::min(t.step, s.out_height - step * t.step);
    const int items = t.images * ceil_div(rows, item) * ceil_div(t.cols, kCols);
    work += ceil_div(pixels, 32) * 32. * (s.in_channels + 8);
    work += (items + round_up(items, kWarps)) / 2. * item_work;
    work += kWarps * (200. + ceil_div(std::max(pixels, 1), 128) * ceil_div(s.in_channels, 16) * 30.);
  }
  const int resident = (shared_bytes + kSystem) / (l.bytes + kStatic + kSystem);
  const double idle = resident >= 4 ? 1. : resident == 3 ? 1.06 : resident == 2 ? 1.2 : 1.7;
  const double columns =
      static_cast<double>(s.out_width) / ceil_div(s.out_width, t.cols);  // of a block, on average
  return work * idle / (t.images * s.out_height * columns);
}

inline Tiling best_tiling(const Shape& s, int shared_bytes, int stage_bytes) {
  const int item = item_rows(s.stride);
  Tiling best{1, std::min(kCols, s.out_width), item};
  double lowest = 0;
  const auto consider = [&](const Tiling& t) {
    const double cost = cost_of(s, t, shared_bytes, stage_bytes);
    if (cost > 0 && (lowest == 0 || cost < lowest)) {
      lowest = cost;
      best = t;
    }
  };
  const int rows = round_up(s.out_height, item);
  for (int strips = 1, cols = s.out_width + 1; cols > kCols; ++strips) {
    cols = std::min(round_up(ceil_div(s.out_width, strips), kCols), s.out_width);
    for (int step = item; step <= std::min(rows, 8 * item); step += item) consider({1, cols, step});
    if (strips > 1 || rows > 8 * item) continue;
    for (int images = 2; images <= std::min(8, s.images); ++images) consider({images, cols, rows});
  }
  return best;
}

struct Plan {
  Shape shape;
  Tiling tiling;

  int strips() const { return ceil_div(shape.out_width, tiling.cols); }
  int units() const { return ceil_div(shape.images, tiling.images) * strips(); }
};

}  // namespace greedynas::cuda::float_expand
