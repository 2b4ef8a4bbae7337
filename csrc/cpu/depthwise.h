// The depthwise convolution of a band of output rows, kLanes channels at a time.
//
// The band's input is first laid out with its zero padding, already normalised and activated, so the inner
// loops know no border: [rows][columns][kLanes]. A few neighbouring output pixels share each vector of
// weights.
#pragma once

#include <cstdint>

#include "choice_block.h"
#include "instruction_set.h"

namespace greedynas::cpu {

template <typename T>
struct DepthwiseBand {
  const T* in;      // [(out_rows - 1) * stride + kernel][columns][kLanes]
  int64_t columns;  // (out_columns - 1) * stride + kernel
  const T* weight;  // [kernel * kernel][weight_stride]
  int64_t weight_stride;
  int64_t kernel;
  int64_t stride;
  T* out;  // [out_rows][out_columns][pixel_stride]
  int64_t pixel_stride;
  int64_t out_rows;
  int64_t out_columns;
};

template <typename T>
struct DepthwiseLoops {
  template <int kBytes>
  static GREEDYNAS_INLINE void run(const DepthwiseBand<T>* band) {
    constexpr int kVectors = kLanes / kVectorLanes<T, kBytes>;
    constexpr int kPixels = 8 / kVectors;  // 8 vectors of sums in registers
    for (int64_t row = 0; row < band->out_rows; ++row) {
      int64_t column = 0;
      for (; column + kPixels <= band->out_columns; column += kPixels)
        tile<kBytes, kPixels>(*band, row, column);
      for (; column < band->out_columns; ++column) tile<kBytes, 1>(*band, row, column);
    }
  }

 private:
  template <int kBytes, int kPixels>
  static GREEDYNAS_INLINE void tile(const DepthwiseBand<T>& band, int64_t row, int64_t column) {
    using V = Vector<T, kBytes>;
    constexpr int kLanesEach = kVectorLanes<T, kBytes>;
    constexpr int kVectors = kLanes / kLanesEach;
    V sums[kPixels][kVectors] = {};
    for (int64_t ky = 0; ky < band.kernel; ++ky) {
      const T* in = band.in + ((row * band.stride + ky) * band.columns + column * band.stride) * kLanes;
      const T* weight = band.weight + ky * band.kernel * band.weight_stride;
      for (int64_t kx = 0; kx < band.kernel; ++kx, in += kLanes, weight += band.weight_stride) {
        GREEDYNAS_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          const V w = *reinterpret_cast<const V*>(weight + v * kLanesEach);
          GREEDYNAS_UNROLL
          for (int p = 0; p < kPixels; ++p) {
            sums[p][v] += *reinterpret_cast<const V*>(in + p * band.stride * kLanes + v * kLanesEach) * w;
          }
        }
      }
    }
    T* out = band.out + (row * band.out_columns + column) * band.pixel_stride;
    GREEDYNAS_UNROLL
    for (int p = 0; p < kPixels; ++p) {
      GREEDYNAS_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        *reinterpret_cast<V*>(out + p * band.pixel_stride + v * kLanesEach) = sums[p][v];
      }
    }
  }
};

template <typename T>
void depthwise_band(const DepthwiseBand<T>& band) {
  run_vectorised<DepthwiseLoops<T>>(&band);
}

}  // namespace greedynas::cpu
