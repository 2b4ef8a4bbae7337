// How expand_depthwise divides its work between blocks: plain C++, a function of a node alone, so that the
// units of its statistics are too.
#pragma once

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace greedynas::cuda::expand {

inline constexpr int kCols = 7;   // output columns of a depthwise item (ImageNet's widths are 7 * 2^n)
inline constexpr int kSlots = 8;  // depthwise items that a block works on at a time

// Output rows of a depthwise item. More of them share more loads, but need registers.
constexpr int item_rows(int stride) { return stride == 1 ? 4 : 2; }

// Hidden channels at a time: a thread has two of them, kSlots items make a block of 192 or 256 threads.
constexpr int threads_of(int group) { return kSlots * group / 2; }
// Blocks that a multiprocessor's registers have to hold.
constexpr int least_blocks(int kernel, int group) { return group == 48 && kernel == 3 ? 3 : 2; }
// The channels' words of a pixel in the ring. 16 bytes more than needed: an mma fragment's 8 pixels fall on
// different banks.
constexpr int pixel_words(int group) { return group / 2 + 4; }
// Words between one item's columns and the next one's beyond their distance in pixels: lanes of a warp that
// work on neighbouring items (group / 2 is no multiple of 32) fall on different banks.
constexpr int item_padding(int group, int stride) {
  const int wanted = group / 2 % 32, distance = kCols * stride * pixel_words(group);
  return group / 2 % 32 == 0 ? 0 : ((wanted - distance) % 32 + 32) % 32;
}

struct Shape {
  int images, height, width, in_channels;  // of memory rows: a multiple of 8
  int out_height, out_width;
  int kernel, stride, group;
};

template <typename T>
Shape shape_of(const ExpandDepthwise<T>& n, int group) {
  const auto out = [&](int size) { return (size - 1) / n.stride + 1; };
  return {n.images, n.height, n.width, row_channels(n.in_channels), out(n.height), out(n.width),
          n.kernel, n.stride, group};
}

// A block makes `rows` x `cols` outputs of `images` images, `step` rows at a time: with step >= rows
// everything at once ("whole"), and then x stays in shared memory while the block goes through its channel
// groups; otherwise the expanded rows lie in a ring, and the block has one image and one group.
struct Tiling {
  int images, rows, cols, step;

  constexpr bool whole() const { return step >= rows; }
};

// One block's shared memory in bytes; the host computes it, the kernel reads constants.
struct Layout {
  int ring_rows, row_words;  // of the ring; words of 4 bytes
  int x_stride;              // in elements
  int ring;                  // half [images][ring_rows][row_words]
  int x;                     // maps [pixels][x_stride]
  int weight;                // of the same type [group][x_stride]
  int depthwise;  // half [2 if whole][kernel * kernel][group]: one is read while the next group's arrives
  int affine;     // float [3][group]
  int place;      // int [pixels]: where in the ring a step's pixels go
  int sums;       // float [4][threads], half [2][threads], int [kSlots]: moments on their way to the unit's
  int bytes;
};

inline Layout layout_of(const Shape& s, const Tiling& t) {
  const int halo = s.kernel - s.stride, strips = ceil_div(t.cols, kCols);
  const int rows = std::min(t.step * s.stride + (t.whole() ? halo : 0), s.height);
  const int cols = std::min(t.cols * s.stride + halo, s.width);
  const int64_t pixels = ceil_div(int64_t{t.images} * rows * cols, int64_t{32}) * 32;
  int64_t bytes = 0;  // may be far more than there is
  const auto take = [&](int64_t size) {
    const auto at = static_cast<int>(bytes);
    bytes = std::min(bytes + size, int64_t{1} << 30);
    return at;
  };
  Layout l;
  l.ring_rows = t.step * s.stride + halo;
  l.row_words =
      (strips * kCols * s.stride + halo) * pixel_words(s.group) + strips * item_padding(s.group, s.stride);
  l.x_stride = round_up(s.in_channels, 16) + 8;  // an odd number of 16-byte units: ldmatrix without conflicts
  l.ring = take(int64_t{t.images} * l.ring_rows * l.row_words * 4);
  l.x = take(pixels * l.x_stride * 2);
  l.weight = take(int64_t{s.group} * l.x_stride * 2);
  l.depthwise = take(int64_t{t.whole() ? 2 : 1} * s.kernel * s.kernel * s.group * 2);
  l.affine = take(int64_t{3} * s.group * 4);
  l.place = take(pixels * 4);
  l.sums = take((int64_t{5} * threads_of(s.group) + kSlots) * 4);
  l.bytes = static_cast<int>(bytes);
  return l;
}

struct Device {
  int multiprocessors, shared_bytes;  // the latter of a block
};

inline constexpr int kOtherShared =
    1024;  // at least what a block needs beside Layout, with the system's part

// Blocks of a multiprocessor; 0 if one does not fit.
inline int resident_blocks(const Shape& s, const Layout& l, const Device& device) {
  const int shared = l.bytes + kOtherShared;
  if (shared > device.shared_bytes) return 0;
  return std::min(least_blocks(s.kernel, s.group), (device.shared_bytes + 1024) / (shared + 1024));
}

// Modelled cycles of a multiprocessor per image and channel group; 0 if the tiling does not fit. The
// constants are fitted to 1300 measurements of 54 shapes on an H200 (they explain its times to 9%): `work`
// counts what a block issues, in units of one fused multiply-add of a warp, of which 3.2 are done in a cycle;
// `wait` is how long it takes if it has the multiprocessor to itself.
inline double cost_of(const Shape& s, const Tiling& t, const Device& device) {
  const Layout l = layout_of(s, t);
  const int resident = resident_blocks(s, l, device);
  if (resident == 0) return 0;
  const int halo = s.kernel - s.stride, item = item_rows(s.stride), warps = threads_of(s.group) / 32;
  const int cols = std::min(t.cols * s.stride + halo, s.width);
  const int step_rows = std::min(t.step * s.stride + (t.whole() ? halo : 0), s.height);
  const int steps = t.whole() ? 1 : ceil_div(t.rows, t.step);
  const int tiles = ceil_div(t.images * step_rows * cols, 32);
  const int first_tiles = t.whole() ? 0 : ceil_div(halo * cols, 32);  // of the rows before the first output
  const int all_steps = steps + (t.whole() ? 0 : 1);
  const int items = t.images * ceil_div(std::min(t.step, t.rows), item) * ceil_div(t.cols, kCols);
  const double k_steps = ceil_div(s.in_channels, 16), warp = s.group / 64.;  // of 64 channels, a warp's width
  const double item_work = item * s.kernel * s.kernel * kCols +
                           5.6 * (item * s.stride + halo) * (kCols * s.stride + halo) + 12.7 * item * kCols;
  // A block that keeps x loads it once for several groups.
  const double x_bytes = (t.whole() ? 0.25 : 1.) * t.images * s.in_channels * 2. * cols *
                         (steps * step_rows + (t.whole() ? 0 : halo));
  const double weight_bytes = s.group * (s.in_channels + s.kernel * s.kernel + 6) * 2.;
  const double work = (steps * tiles + first_tiles) * k_steps * 104 * warp +
                      steps * items * item_work * warp + (x_bytes + weight_bytes) / 512 * 69 +
                      all_steps * warps * 133.;
  const double wait =
      (steps * ceil_div(tiles, warps) + ceil_div(first_tiles, warps)) * (504 + 184 * k_steps * warp) +
      steps * ceil_div(items, kSlots) * item_work * 1.5 + all_steps * 2250. + 2300;
  const double cycles = std::hypot(resident * work / 3.2, wait) / resident;
  const double pieces = static_cast<double>(ceil_div(s.out_height, t.rows)) * ceil_div(s.out_width, t.cols);
  // With few blocks the last ones run alone. How many channel groups there are is left out (4 is usual).
  const double waves = 4 * pieces * ceil_div(s.images, t.images) / (device.multiprocessors * resident);
  return cycles * pieces / t.images * (1 + 0.5 / waves);
}

// The tiling with the lowest modelled cost; `images` is 0 if none fits.
inline Tiling best_tiling(const Shape& s, const Device& device) {
  const int item = item_rows(s.stride);
  Tiling best{};
  double lowest = 0;
  const auto consider = [&](const Tiling& t) {
    const double cost = cost_of(s, t, device);
    if (cost > 0 && (lowest == 0 || cost < lowest)) {
      lowest = cost;
      best = t;
    }
  };
  for (int tiles = 1, cols = s.out_width + kCols; cols > kCols; tiles *= 2) {
    cols = std::min(round_up(ceil_div(s.out_width, tiles), kCols), s.out_width);
    for (int bands = 1, rows = s.out_height + item; rows > item; bands *= 2) {
      rows = round_up(ceil_div(s.out_height, bands), item);
      for (int step = item; step < rows && step <= 8 * item && bands <= 4; step += item) {
        consider({1, rows, cols, step});
      }
      const int most_images = bands == 1 && tiles == 1 ? std::min(8, s.images) : 1;
      for (int images = 1; images <= most_images; ++images) consider({images, rows, cols, rows});
    }
  }
  // Very many input channels: less than an item's rows and columns.
  for (int cols = std::min(kCols, s.out_width); lowest == 0 && cols > 0; --cols) {
    for (int step = item; step > 0; --step) consider({1, s.out_height, cols, step});
  }
  return best;
}

struct Plan {
  Shape shape;
  Tiling tiling;

  int units() const {
    return ceil_div(shape.images, tiling.images) * ceil_div(shape.out_height, tiling.rows) *
           ceil_div(shape.out_width, tiling.cols);
  }
};

// The size of channel groups that wastes the fewest channels, the larger of equal ones; unless only the other
// fits.
template <typename T>
Plan plan_of(const ExpandDepthwise<T>& node, const Device& device) {
  const bool small = round_up(node.hidden_channels, 48) < round_up(node.hidden_channels, 64);
  for (const int group : {small ? 48 : 64, 48}) {
    const Shape shape = shape_of(node, group);
    const Tiling tiling = best_tiling(shape, device);
    if (tiling.images > 0) return {shape, tiling};
  }
  throw std::invalid_argument("expand_depthwise: " + std::to_string(node.in_channels) +
                              " input channels do not fit into the device's shared memory");
}

}  // namespace greedynas::cuda::expand
