// The 1x1 convolution on rows of channels: out[r][j] = sum over k of in[r][k] * weight[k][j].
//
// 4 rows x 2 vectors of output channels stay in registers while k runs; a vector of weights is loaded once
// for the 4 rows and a row's value is broadcast. The caller cuts the pixels into tiles of kTileRows rows,
// small enough that `in` stays in the cache while the output channels are walked through.
#pragma once

#include <cstdint>
#include <cstring>

#include "instruction_set.h"

namespace greedynas::cpu {

inline constexpr int64_t kTileRows = 96;

template <typename T>
struct Pointwise {
  const T* in;
  int64_t in_stride;  // of rows, in elements
  int64_t rows;
  int64_t in_channels;
  const T* weight;  // [in_channels][weight_stride], weight_stride a multiple of kLanes
  int64_t weight_stride;
  T* out;
  int64_t out_stride;
  int64_t out_channels;
};

template <typename T>
struct PointwiseLoops {
  template <int kBytes>
  static GREEDYNAS_INLINE void run(const Pointwise<T>* p) {
    constexpr int64_t kColumns = 2 * kVectorLanes<T, kBytes>;
    for (int64_t column = 0; column < p->out_channels; column += kColumns) {
      const int64_t columns = p->out_channels - column < kColumns ? p->out_channels - column : kColumns;
      int64_t row = 0;
      for (; row + 4 <= p->rows; row += 4) tile<kBytes, 4>(*p, row, column, columns);
      for (; row < p->rows; ++row) tile<kBytes, 1>(*p, row, column, columns);
    }
  }

 private:
  template <int kBytes, int kRows>
  static GREEDYNAS_INLINE void tile(const Pointwise<T>& p, int64_t row, int64_t column, int64_t columns) {
    using V = Vector<T, kBytes>;
    constexpr int kLanesEach = kVectorLanes<T, kBytes>;
    const T* in = p.in + row * p.in_stride;
    const T* weight = p.weight + column;
    V sums[kRows][2] = {};
    for (int64_t k = 0; k < p.in_channels; ++k) {
      const V low = *reinterpret_cast<const V*>(weight + k * p.weight_stride);
      const V high = *reinterpret_cast<const V*>(weight + k * p.weight_stride + kLanesEach);
      GREEDYNAS_UNROLL
      for (int r = 0; r < kRows; ++r) {
        sums[r][0] += in[r * p.in_stride + k] * low;
        sums[r][1] += in[r * p.in_stride + k] * high;
      }
    }
    GREEDYNAS_UNROLL
    for (int r = 0; r < kRows; ++r) {
      T* out = p.out + (row + r) * p.out_stride + column;
      if (columns == 2 * kLanesEach) {
        *reinterpret_cast<V*>(out) = sums[r][0];
        *reinterpret_cast<V*>(out + kLanesEach) = sums[r][1];
      } else {
        T buffer[2 * kLanesEach];
        *reinterpret_cast<V*>(buffer) = sums[r][0];
        *reinterpret_cast<V*>(buffer + kLanesEach) = sums[r][1];
        std::memcpy(out, buffer, columns * sizeof(T));
      }
    }
  }
};

template <typename T>
void pointwise(const Pointwise<T>& arguments) {
  run_vectorised<PointwiseLoops<T>>(&arguments);
}

}  // namespace greedynas::cpu
