// Weights of one operation in the order in which the kernels read them (block_kernels.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "block_kernels.h"
#include "chain.h"

namespace greedynas::cpu {

// What BatchNorm multiplies by and adds; padding is 0, so that padded channels stay 0 under every activation.
template <typename C>
struct Affine {
  std::vector<C> scale, shift;
};

// Mean and biased variance of channels.
template <typename C>
struct Moments {
  std::vector<C> mean, variance;
};

template <typename C>
struct BatchNorm {
  std::vector<C> gamma, beta;
  Moments<C> running;  // empty where none are stored
  double eps = 0;
  int64_t channels = 0;

  Affine<C> affine(const C* mean, const C* variance) const {
    const int64_t width = padded(channels);
    Affine<C> result{std::vector<C>(width), std::vector<C>(width)};
    for (int64_t c = 0; c < channels; ++c) {
      const double scale = static_cast<double>(gamma[c]) / std::sqrt(static_cast<double>(variance[c]) + eps);
      result.scale[c] = static_cast<C>(scale);
      result.shift[c] = static_cast<C>(static_cast<double>(beta[c]) - static_cast<double>(mean[c]) * scale);
    }
    return result;
  }
};

template <typename T>
struct PackedOperation {
  using C = Compute<T>;
  OperationSource source;
  // Into the evaluation's memory of packed weights.
  T *expand = nullptr, *project = nullptr;
  C *depthwise = nullptr, *se_reduce = nullptr, *se_reduce_bias = nullptr, *se_expand = nullptr,
    *se_expand_bias = nullptr;
  BatchNorm<C> batch_norms[kBatchNormStages];

  int64_t hidden_stride() const { return padded(source.hidden_channels); }
};

inline BFloat16 round_to(float x, BFloat16*) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline float round_to(float x, float*) { return x; }
inline double round_to(double x, double*) { return x; }

template <typename T>
int64_t packed_pointwise_size(int64_t out, int64_t in, int64_t depth_multiple) {
  return padded(out) * ceil_div(in, depth_multiple) * depth_multiple;
}

// [out, in] -> [group][in][channel of the group], of depth_multiple neighbouring inputs side by side. A few
// inputs of all channels of a group at a time: what is written stays in the nearest cache.
template <typename T>
void pack_pointwise(const Compute<T>* weight, int64_t out, int64_t in, int64_t group_width,
                    int64_t depth_multiple, T* packed) {
  constexpr int64_t kInputs = 16;
  const int64_t depth = ceil_div(in, depth_multiple) * depth_multiple;
  for (int64_t channel = 0; channel < padded(out); channel += group_width) {
    const int64_t width = std::min(group_width, padded(out) - channel);
    const int64_t real = std::min(width, out - channel);
    T* group = packed + channel * depth;
    if (real < width || in < depth) std::fill_n(group, width * depth, T{});
    for (int64_t first = 0; first < in; first += kInputs) {
      const int64_t last = std::min(first + kInputs, in);
      for (int64_t c = 0; c < real; ++c) {
        const Compute<T>* row = weight + (channel + c) * in;
        if (depth_multiple == 1) {
          for (int64_t k = first; k < last; ++k) group[k * width + c] = round_to(row[k], static_cast<T*>(nullptr));
        } else {
          for (int64_t k = first; k < last; k += 2) {
            T* pair = group + k * width + 2 * c;
            pair[0] = round_to(row[k], static_cast<T*>(nullptr));
            if (k + 1 < last) pair[1] = round_to(row[k + 1], static_cast<T*>(nullptr));
          }
        }
      }
    }
  }
}

// [channels, taps] -> [group][tap][channel of the group].
template <typename C>
void pack_depthwise(const C* weight, int64_t channels, int64_t taps, int64_t group_width, C* packed) {
  for (int64_t channel = 0; channel < padded(channels); channel += group_width) {
    const int64_t width = std::min(group_width, padded(channels) - channel);
    for (int64_t c = 0; c < width; ++c) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        packed[channel * taps + tap * width + c] =
            channel + c < channels ? weight[(channel + c) * taps + tap] : C(0);
      }
    }
  }
}

template <typename C>
void pack_bias(const C* bias, int64_t channels, C* packed) {
  for (int64_t c = 0; c < padded(channels); ++c) packed[c] = bias && c < channels ? bias[c] : C(0);
}

template <typename C>
BatchNorm<C> pack_batch_norm(const BatchNormSource& source, int64_t channels) {
  const auto copy = [&](const void* values, C missing) {
    std::vector<C> result(padded(channels));
    for (int64_t c = 0; c < channels; ++c) result[c] = values ? static_cast<const C*>(values)[c] : missing;
    return result;
  };
  BatchNorm<C> result{copy(source.gamma, C(1)), copy(source.beta, C(0)), {}, source.eps, channels};
  if (source.mean) result.running = {copy(source.mean, C(0)), copy(source.variance, C(1))};
  return result;
}

}  // namespace greedynas::cpu
