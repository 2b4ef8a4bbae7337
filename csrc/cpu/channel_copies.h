// Some channels of a tensor into the rows of a map, and of a map into those of a tensor.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "block_kernels.h"
#include "parallel.h"
#include "pilot.h"
#include "unit_source.h"
#include "weights.h"
#include "workspace.h"

namespace greedynas::cpu {

template <typename To, typename From>
To converted(From x) {
  if constexpr (std::is_same_v<To, From>) {
    return x;
  } else if constexpr (std::is_arithmetic_v<To>) {
    return value_of(x);
  } else {
    return round_to(x, static_cast<To*>(nullptr));
  }
}

// A tensor [images][channels][height][width] of any strides, in elements.
template <typename S>
struct TensorInput {
  const S* values;
  int64_t images, height, width;
  int64_t strides[4];  // of image, channel, row, column
};

template <typename To, typename From>
void copy_channels(const From* from, int64_t from_step, To* to, int64_t to_step, int64_t count) {
  const auto copy = [&](int64_t a, int64_t b) __attribute__((always_inline)) {
    for (int64_t c = 0; c < count; ++c) to[c * b] = converted<To>(from[c * a]);
  };
  if (from_step == 1 && to_step == 1) {
    copy(1, 1);
  } else if (from_step == 2 && to_step == 1) {
    copy(2, 1);
  } else if (from_step == 1 && to_step == 2) {
    copy(1, 2);
  } else {
    copy(from_step, to_step);
  }
}

// Channels of one row of pixels; `to` has `to_stride` elements a pixel.
template <typename To, typename From>
void copy_row(const TensorInput<From>& in, const Channels& reads, int64_t image, int64_t y, To* to,
              int64_t to_stride, int64_t to_step) {
  const From* row = in.values + image * in.strides[0] + y * in.strides[2] + reads.first * in.strides[1];
  const int64_t step = reads.step * in.strides[1], column = in.strides[3];
  if (column != 1 || step == 1) {
    for (int64_t x = 0; x < in.width; ++x)
      copy_channels(row + x * column, step, to + x * to_stride, to_step, reads.count);
    return;
  }
  constexpr int64_t kColumns = 16;  // whose rows stay in the cache while channel after channel is read
  for (int64_t x = 0; x < in.width; x += kColumns) {
    const int64_t columns = std::min(kColumns, in.width - x);
    for (int64_t c = 0; c < reads.count; ++c) {
      for (int64_t i = 0; i < columns; ++i)
        to[(x + i) * to_stride + c * to_step] = converted<To>(row[c * step + x + i]);
    }
  }
}

// body(image, y) for each row of pixels of a batch; `work` is about how much there is to copy in one.
template <typename Body>
void for_rows(int64_t images, int64_t height, int64_t work, const ParallelFor& parallel_for,
              const Body& body) {
  parallel_for(images * height, work, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) body(row / height, row % height);
  });
}

// The map has as many channels as are read; its padding becomes 0.
template <typename T, typename S>
void gather(const TensorInput<S>& in, const Channels& reads, const Map<T>& map,
            const ParallelFor& parallel_for) {
  const int64_t stride = row_channels<T>(reads.count);
  for_rows(in.images, in.height, in.width * stride, parallel_for, [&](int64_t image, int64_t y) {
    T* to = map.data + (image * in.height + y) * in.width * stride;
    copy_row(in, reads, image, y, to, stride, 1);
    if (reads.count == stride) return;
    for (int64_t x = 0; x < in.width; ++x)
      std::fill_n(to + x * stride + reads.count, stride - reads.count, T{});
  });
}

}  // namespace greedynas::cpu
