// Weights of one operation in the order in which the kernels read them (block_kernels.h).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "arena.h"
#include "block_kernels.h"
#include "memory_cache.h"
#include "operation_source.h"

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

// Those of an operation's BatchNorms.
template <typename C>
struct OperationStatistics {
  Moments<C> stages[kBatchNormStages];
};

template <typename C>
struct BatchNorm {
  std::vector<C> gamma, beta;
  double eps = 0;
  int64_t channels = 0;

  Affine<C> affine(const Moments<C>& moments) const {
    const int64_t width = padded(channels);
    Affine<C> result{std::vector<C>(width), std::vector<C>(width)};
    for (int64_t c = 0; c < channels; ++c) {
      const double scale =
          static_cast<double>(gamma[c]) / std::sqrt(static_cast<double>(moments.variance[c]) + eps);
      result.scale[c] = static_cast<C>(scale);
      result.shift[c] =
          static_cast<C>(static_cast<double>(beta[c]) - static_cast<double>(moments.mean[c]) * scale);
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
  OperationStatistics<C> running;  // empty where none are stored

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

// A weight as it is found: element (row, column) at row * row_stride + column * column_stride.
template <typename C>
struct Matrix {
  const C* values;
  int64_t row_stride, column_stride;
};

// Rows are output channels, columns input channels -> [group][in][channel of the group], of depth_multiple
// neighbouring inputs side by side. A few inputs of all channels of a group at a time: what is written stays
// in the nearest cache.
template <typename T>
void pack_pointwise(const Matrix<Compute<T>>& weight, int64_t out, int64_t in, int64_t group_width,
                    int64_t depth_multiple, T* packed) {
  constexpr int64_t kInputs = 16;
  const int64_t depth = ceil_div(in, depth_multiple) * depth_multiple, step = weight.column_stride;
  for (int64_t channel = 0; channel < padded(out); channel += group_width) {
    const int64_t width = std::min(group_width, padded(out) - channel);
    const int64_t real = std::min(width, out - channel);
    T* group = packed + channel * depth;
    if (real < width || in < depth) std::fill_n(group, width * depth, T{});
    for (int64_t first = 0; first < in; first += kInputs) {
      const int64_t last = std::min(first + kInputs, in);
      for (int64_t c = 0; c < real; ++c) {
        const Compute<T>* row = weight.values + (channel + c) * weight.row_stride;
        if (depth_multiple == 1) {
          for (int64_t k = first; k < last; ++k)
            group[k * width + c] = round_to(row[k * step], static_cast<T*>(nullptr));
        } else {
          for (int64_t k = first; k < last; k += 2) {
            T* pair = group + k * width + 2 * c;
            pair[0] = round_to(row[k * step], static_cast<T*>(nullptr));
            if (k + 1 < last) pair[1] = round_to(row[(k + 1) * step], static_cast<T*>(nullptr));
          }
        }
      }
    }
  }
}

// Rows are channels, columns taps -> [group][tap][channel of the group].
template <typename C>
void pack_depthwise(const Matrix<C>& weight, int64_t channels, int64_t taps, int64_t group_width, C* packed) {
  for (int64_t channel = 0; channel < padded(channels); channel += group_width) {
    const int64_t width = std::min(group_width, padded(channels) - channel);
    for (int64_t c = 0; c < width; ++c) {
      const C* row = weight.values + (channel + c) * weight.row_stride;
      for (int64_t tap = 0; tap < taps; ++tap) {
        packed[channel * taps + tap * width + c] =
            channel + c < channels ? row[tap * weight.column_stride] : C(0);
      }
    }
  }
}

template <typename C>
void pack_bias(const C* bias, int64_t channels, C* packed) {
  for (int64_t c = 0; c < padded(channels); ++c) packed[c] = bias && c < channels ? bias[c] : C(0);
}

template <typename C>
std::vector<C> padded_copy(const void* values, C missing, int64_t channels) {
  std::vector<C> result(padded(channels));
  for (int64_t c = 0; c < channels; ++c) result[c] = values ? static_cast<const C*>(values)[c] : missing;
  return result;
}

// Packs operations, side by side on the threads, into one piece of memory.
template <typename T>
class OperationPacker {
  using C = Compute<T>;

 public:
  explicit OperationPacker(const Kernels<T>& kernels) : k_(kernels) {}

  std::vector<PackedOperation<T>> pack(const std::vector<OperationSource>& sources, CachedMemory& memory,
                                       const ParallelFor& parallel_for) {
    Arena arena;
    std::vector<Parts> parts;
    for (const OperationSource& source : sources) parts.push_back(place(source, arena));
    char* base = memory.at_least(arena.size());
    std::vector<PackedOperation<T>> packed(sources.size());
    parallel_for(static_cast<int64_t>(sources.size()), 1 << 20, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) packed[i] = pack_one(sources[i], parts[i], base);
    });
    return packed;
  }

 private:
  struct Parts {
    int64_t expand, project, depthwise, se_reduce, se_reduce_bias, se_expand, se_expand_bias;  // offsets
  };

  int64_t pointwise_size(int64_t out, int64_t in) const {
    return padded(out) * ceil_div(in, k_.depth_multiple) * k_.depth_multiple * int64_t{sizeof(T)};
  }

  Parts place(const OperationSource& o, Arena& arena) const {
    const int64_t hidden = o.hidden_channels, se = o.se_channels, c = sizeof(C);
    return {arena.allocate(o.expand ? pointwise_size(hidden, o.in_channels) : 1),
            arena.allocate(o.project ? pointwise_size(o.out_channels, o.depth()) : 1),
            arena.allocate(o.depthwise ? padded(hidden) * o.kernel * o.kernel * c : 1),
            arena.allocate(std::max<int64_t>(1, padded(se) * hidden * c)),
            arena.allocate(std::max<int64_t>(1, padded(se) * c)),
            arena.allocate(std::max<int64_t>(1, padded(hidden) * se * c)),
            arena.allocate(std::max<int64_t>(1, padded(hidden) * c))};
  }

  PackedOperation<T> pack_one(const OperationSource& o, const Parts& parts, char* base) const {
    PackedOperation<T> p;
    p.source = o;
    const int64_t width = k_.group_width, hidden = o.hidden_channels, se = o.se_channels;
    const auto matrix = [&](const void* values, int64_t rows, int64_t columns) {
      const auto* weight = static_cast<const C*>(values);
      return o.channels_fastest ? Matrix<C>{weight, 1, padded(rows)} : Matrix<C>{weight, columns, 1};
    };
    const auto pointwise = [&](const void* weight, int64_t out, int64_t in, int64_t offset) -> T* {
      if (!weight) return nullptr;
      T* target = reinterpret_cast<T*>(base + offset);
      pack_pointwise<T>(matrix(weight, out, in), out, in, width, k_.depth_multiple, target);
      return target;
    };
    p.expand = pointwise(o.expand, hidden, o.in_channels, parts.expand);
    p.project = pointwise(o.project, o.out_channels, o.depth(), parts.project);
    if (o.depthwise) {
      const int64_t taps = o.kernel * o.kernel;
      p.depthwise = reinterpret_cast<C*>(base + parts.depthwise);
      pack_depthwise<C>(matrix(o.depthwise, hidden, taps), hidden, taps, width, p.depthwise);
    }
    if (se > 0) {
      p.se_reduce = reinterpret_cast<C*>(base + parts.se_reduce);
      p.se_reduce_bias = reinterpret_cast<C*>(base + parts.se_reduce_bias);
      p.se_expand = reinterpret_cast<C*>(base + parts.se_expand);
      p.se_expand_bias = reinterpret_cast<C*>(base + parts.se_expand_bias);
      pack_pointwise<C>(matrix(o.se_reduce_weight, se, hidden), se, hidden, width, 1, p.se_reduce);
      pack_pointwise<C>(matrix(o.se_expand_weight, hidden, se), hidden, se, width, 1, p.se_expand);
      pack_bias<C>(static_cast<const C*>(o.se_reduce_bias), se, p.se_reduce_bias);
      pack_bias<C>(static_cast<const C*>(o.se_expand_bias), hidden, p.se_expand_bias);
    }
    const bool stages[kBatchNormStages] = {o.expand != nullptr, o.depthwise != nullptr, o.project != nullptr};
    for (int stage = 0; stage < kBatchNormStages; ++stage) {
      if (!stages[stage]) continue;
      const BatchNormSource& norm = o.batch_norms[stage];
      const int64_t channels = stage == kProjectBn ? o.out_channels : hidden;
      p.batch_norms[stage] = {padded_copy<C>(norm.gamma, C(1), channels),
                              padded_copy<C>(norm.beta, C(0), channels), norm.eps, channels};
      if (!norm.mean) continue;
      p.running.stages[stage] = {padded_copy<C>(norm.mean, C(0), channels),
                                 padded_copy<C>(norm.variance, C(1), channels)};
    }
    return p;
  }

  const Kernels<T>& k_;
};

}  // namespace greedynas::cpu
