// From the kernels' partial sums to means and variances. Sums are joined in the order of their units, so the
// number of threads changes no bit.
#pragma once

#include <cstdint>
#include <span>

#include "block_kernels.h"
#include "channel_memory.h"
#include "weights.h"

namespace greedynas::cpu {

// The values of each channel that unit `u` of `partials` summed up: count_of(u), which may be 0.
// `stride`: of the partials' channels, a multiple of kLanes.
template <typename C, typename Count>
Moments<C> join_partials(const double* partials, int64_t units, const Count& count_of, int64_t stride,
                         ChannelMemory& memory, const ParallelFor& parallel_for) {
  const auto result = Moments<C>::take(stride, memory);
  double total = 0;
  for (int64_t u = 0; u < units; ++u) total += static_cast<double>(count_of(u));
  parallel_for(stride / kLanes, units * kLanes * 8, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      double means[kLanes] = {}, squares[kLanes] = {};
      const double* first = partials + block * kLanes;
      for (int64_t u = 0; u < units; ++u) {
        const auto count = static_cast<double>(count_of(u));
        if (count == 0) continue;
        const double* pilot = first + u * 3 * stride;
        for (int64_t c = 0; c < kLanes; ++c) means[c] += pilot[c] * count + pilot[stride + c];
      }
      for (double& mean : means) mean /= total;
      for (int64_t u = 0; u < units; ++u) {
        const auto count = static_cast<double>(count_of(u));
        if (count == 0) continue;
        const double* pilot = first + u * 3 * stride;
        for (int64_t c = 0; c < kLanes; ++c) {
          const double sum = pilot[stride + c];
          const double distance = pilot[c] + sum / count - means[c];
          squares[c] += pilot[2 * stride + c] - sum * sum / count + count * distance * distance;
        }
      }
      for (int64_t c = 0; c < kLanes; ++c) {
        const double variance = squares[c] / total;
        result.mean[block * kLanes + c] = static_cast<C>(means[c]);
        result.variance[block * kLanes + c] = static_cast<C>(variance < 0 ? 0 : variance);
      }
    }
  });
  return result;
}

// The mean of a map's channels, and the covariance as pointwise_moments reads it.
template <typename C>
struct MapMoments {
  C* mean;        // [channels]
  C* covariance;  // [channels][channels]

  static int64_t size(int64_t stride, int64_t channels) { return stride + channels * channels; }
};

// The sums of `finish` over segments of the pixels, each [stride] sums and [stride][stride] products.
template <typename C>
void join_gram(const double* segments, int64_t count, int64_t pixels, const C* pilot, int64_t channels,
               int64_t stride, const MapMoments<C>& out, ChannelMemory& memory,
               const ParallelFor& parallel_for) {
  const int64_t size = stride * (stride + 1);
  const auto n = static_cast<double>(pixels);
  const std::span<double> shift = memory.take<double>(channels);
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0;
    for (int64_t s = 0; s < count; ++s) sum += segments[s * size + c];
    shift[c] = sum / n;
    out.mean[c] = static_cast<C>(static_cast<double>(pilot[c]) + shift[c]);
  }
  parallel_for(channels, channels * count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = i; j < channels; ++j) {
        double sum = 0;
        for (int64_t s = 0; s < count; ++s) sum += segments[s * size + stride + i * stride + j];
        const double covariance = sum / n - shift[i] * shift[j];
        out.covariance[i * channels + j] = static_cast<C>(i == j ? covariance : 2 * covariance);
      }
    }
  });
}

}  // namespace greedynas::cpu
