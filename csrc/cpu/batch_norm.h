// BatchNorm: moments of a batch, and their application together with the activation.
//
// The moments are taken tile by tile, while a tile is still in the cache: the tile's mean first, then the
// squares of the distances from it. Tiles are joined in their order, by the mean's weighted mean and the
// squares about it, so nothing cancels at any ratio of mean to deviation, and the number of threads changes
// no bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "activation.h"
#include "choice_block.h"
#include "instruction_set.h"
#include "parallel.h"

namespace greedynas::cpu {

// Constants that normalise each channel: (x - mean) * scale + shift, in padded(channels).
template <typename T>
struct Normalisation {
  std::vector<T> mean, scale, shift;
};

template <typename T>
Normalisation<T> make_normalisation(const T* statistics, const T* gamma_beta, int64_t channels, double eps) {
  const int64_t stride = padded(channels);
  Normalisation<T> result{std::vector<T>(stride), std::vector<T>(stride), std::vector<T>(stride)};
  for (int64_t c = 0; c < channels; ++c) {
    const double deviation = std::sqrt(static_cast<double>(statistics[stride + c]) + eps);
    result.mean[c] = statistics[c];
    result.scale[c] = static_cast<T>(gamma_beta[c] / deviation);
    result.shift[c] = gamma_beta[stride + c];
  }
  return result;
}

template <typename T>
struct TileMomentsLoops {
  template <int kBytes>
  static GREEDYNAS_INLINE void run(const T* rows, int64_t stride, int64_t count, int64_t channels,
                                   double* __restrict__ mean, double* __restrict__ squares) {
    for (int64_t c = 0; c < channels; ++c) mean[c] = squares[c] = 0;
    for (int64_t r = 0; r < count; ++r) {
      const T* row = rows + r * stride;
      for (int64_t c = 0; c < channels; ++c) mean[c] += static_cast<double>(row[c]);
    }
    for (int64_t c = 0; c < channels; ++c) mean[c] /= static_cast<double>(count);
    for (int64_t r = 0; r < count; ++r) {
      const T* row = rows + r * stride;
      for (int64_t c = 0; c < channels; ++c) {
        const double distance = static_cast<double>(row[c]) - mean[c];
        squares[c] += distance * distance;
      }
    }
  }
};

// Moments of all tiles of one BatchNorm's input.
template <typename T>
class Moments {
 public:
  Moments(int64_t tiles, int64_t channels)
      : channels_(channels),
        counts_(tiles),
        sums_(std::make_unique_for_overwrite<double[]>(tiles * 2 * channels)) {}

  // Tile `tile` is `count` rows. Safe to call for different tiles at once.
  void add(int64_t tile, const T* rows, int64_t stride, int64_t count) {
    double* mean = sums_.get() + tile * 2 * channels_;
    counts_[tile] = count;
    run_vectorised<TileMomentsLoops<T>>(rows, stride, count, channels_, mean, mean + channels_);
  }

  // Writes mean and biased variance as they stand in a row of `statistics`.
  void join(T* statistics, const ParallelFor& parallel_for) const {
    double total = 0;
    for (const int64_t count : counts_) total += static_cast<double>(count);
    const auto tiles = static_cast<int64_t>(counts_.size());
    parallel_for(ceil_div(channels_, kLanes), tiles * kLanes * 4, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin * kLanes; c < std::min(end * kLanes, channels_); ++c) {
        double mean = 0;
        for (int64_t t = 0; t < tiles; ++t) mean += static_cast<double>(counts_[t]) * at(t, 0, c);
        mean /= total;
        double squares = 0;
        for (int64_t t = 0; t < tiles; ++t) {
          const double distance = at(t, 0, c) - mean;
          squares += at(t, 1, c) + static_cast<double>(counts_[t]) * distance * distance;
        }
        statistics[c] = static_cast<T>(mean);
        statistics[padded(channels_) + c] = static_cast<T>(squares / total);
      }
    });
  }

 private:
  double at(int64_t tile, int64_t which, int64_t channel) const {
    return sums_[(tile * 2 + which) * channels_ + channel];
  }

  int64_t channels_;
  std::vector<int64_t> counts_;
  std::unique_ptr<double[]> sums_;  // [tiles][mean, squares][channels]
};

// Rows of channels: out = activation((in - mean) * scale + shift); in place where out == in.
template <typename T>
struct NormaliseRows {
  const T* in;
  int64_t in_stride;
  T* out;
  int64_t out_stride;
  int64_t rows;
  int64_t channels;
  const T *mean, *scale, *shift;
  int64_t activation;
};

template <typename T>
struct NormaliseRowsLoops {
  template <int kBytes>
  static GREEDYNAS_INLINE void run(const NormaliseRows<T>* n) {
    switch (n->activation) {
      case kRelu:
        return rows<kRelu>(*n);
      case kRelu6:
        return rows<kRelu6>(*n);
      case kHswish:
        return rows<kHswish>(*n);
      case kSilu:
        return rows<kSilu>(*n);
      default:
        return rows<kLinear>(*n);
    }
  }

 private:
  template <Activation kActivation>
  static GREEDYNAS_INLINE void rows(NormaliseRows<T> n) {
    for (int64_t r = 0; r < n.rows; ++r) {
      const T* in = n.in + r * n.in_stride;
      T* out = n.out + r * n.out_stride;
      GREEDYNAS_INDEPENDENT
      for (int64_t c = 0; c < n.channels; ++c) {
        out[c] = activate<kActivation>((in[c] - n.mean[c]) * n.scale[c] + n.shift[c]);
      }
    }
  }
};

// The channels from first_channel on, as many as `channels`; `in` points at the first of them.
template <typename T>
void normalise_rows(const T* in, int64_t in_stride, T* out, int64_t out_stride, int64_t rows,
                    int64_t channels, const Normalisation<T>& n, int64_t activation,
                    int64_t first_channel = 0) {
  const NormaliseRows<T> arguments{in,
                                   in_stride,
                                   out,
                                   out_stride,
                                   rows,
                                   channels,
                                   n.mean.data() + first_channel,
                                   n.scale.data() + first_channel,
                                   n.shift.data() + first_channel,
                                   activation};
  run_vectorised<NormaliseRowsLoops<T>>(&arguments);
}

}  // namespace greedynas::cpu
