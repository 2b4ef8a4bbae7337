// Weights of one operation in the order in which the kernels read them (block_kernels.h).
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <span>
#include <vector>

#include "arena.h"
#include "block_kernels.h"
#include "channel_memory.h"
#include "memory_cache.h"
#include "operation_source.h"

namespace greedynas::cpu {

// What BatchNorm multiplies by and adds; padding is 0, so that padded channels stay 0 under every activation.
template <typename C>
struct Affine {
  std::span<C> scale, shift;
  std::span<const C> factor;  // of BatchNorm
};

// Mean and biased variance of channels.
template <typename C>
struct Moments {
  std::span<C> mean, variance;

  static Moments take(int64_t stride, ChannelMemory& memory) {
    return {memory.take<C>(stride), memory.take<C>(stride)};
  }
};

// The same, kept.
template <typename C>
struct KeptMoments {
  std::vector<C> mean, variance;

  void keep(const Moments<C>& moments) {
    mean.assign(moments.mean.begin(), moments.mean.end());
    variance.assign(moments.variance.begin(), moments.variance.end());
  }
};

// Those of an operation's BatchNorms.
template <typename C>
struct OperationStatistics {
  KeptMoments<C> stages[kBatchNormStages];
};

template <typename C>
struct BatchNorm {
  std::vector<C> gamma, beta;  // [row_channels]
  double eps = 0;
  int64_t channels = 0;
  // Of kTiled operations, else empty: powers of two that make of the results numbers for half precision, far
  // from both ends of its range.
  std::vector<C> factor{};

  Affine<C> affine(std::span<const C> mean, std::span<const C> variance, ChannelMemory& memory) const {
    const auto stride = static_cast<int64_t>(gamma.size());
    const Affine<C> result{memory.take<C>(stride), memory.take<C>(stride), factor};
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
  // Of kTiled operations, or null: half_depthwise as in block_kernels.h, with the powers of two that its
  // channels were multiplied by; and those that sums of `project` have to be multiplied by.
  uint16_t* half_depthwise = nullptr;
  std::vector<C> half_depthwise_factor, project_factor;
  BatchNorm<C> batch_norms[kBatchNormStages];
  OperationStatistics<C> running;  // empty where none are stored

  int64_t hidden_stride() const { return row_channels<T>(source.hidden_channels); }
};

inline uint16_t bfloat16_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline BFloat16 round_to(float x, BFloat16*) { return {bfloat16_bits(x)}; }
inline TiledBFloat16 round_to(float x, TiledBFloat16*) { return {bfloat16_bits(x)}; }
inline float round_to(float x, float*) { return x; }
inline double round_to(double x, double*) { return x; }

// A weight as it is found: element (row, column) at row * row_stride + column * column_stride.
template <typename C>
struct Matrix {
  const C* values;
  int64_t row_stride, column_stride;
  // What rows are multiplied by, and columns (null: 1), and everything then.
  const C *row_factor = nullptr, *column_factor = nullptr;
  C factor = 1;
};

// Rows are output channels, `out_stride` of them with padding, columns input channels -> [group][in][channel
// of the group], where inputs are padded to a multiple of depth_multiple, and, unless that is 1, two
// neighbouring ones lie side by side. A few inputs of all channels of a group at a time: what is written
// stays in the nearest cache.
template <typename T>
void pack_pointwise(const Matrix<Compute<T>>& weight, int64_t out, int64_t out_stride, int64_t in,
                    int64_t group_width, int64_t depth_multiple, T* packed) {
  constexpr int64_t kInputs = 16;
  const int64_t depth = ceil_div(in, depth_multiple) * depth_multiple, step = weight.column_stride;
  for (int64_t channel = 0; channel < out_stride; channel += group_width) {
    const int64_t width = std::min(group_width, out_stride - channel);
    const int64_t real = std::min(width, out - channel);
    T* group = packed + channel * depth;
    if (real < width || in < depth) std::fill_n(group, width * depth, T{});
    for (int64_t first = 0; first < in; first += kInputs) {
      const int64_t last = std::min(first + kInputs, in);
      for (int64_t c = 0; c < real; ++c) {
        const Compute<T>* row = weight.values + (channel + c) * weight.row_stride;
        const auto value = [&](int64_t k) { return round_to(row[k * step], static_cast<T*>(nullptr)); };
        if (depth_multiple == 1) {
          for (int64_t k = first; k < last; ++k) group[k * width + c] = value(k);
        } else {
          for (int64_t k = first; k < last; k += 2) {
            T* pair = group + k * width + 2 * c;
            pair[0] = value(k);
            if (k + 1 < last) pair[1] = value(k + 1);
          }
        }
      }
    }
  }
}

// Rows are channels, columns taps -> [group][tap][channel of the group].
template <typename C>
void pack_depthwise(const Matrix<C>& weight, int64_t channels, int64_t stride, int64_t taps,
                    int64_t group_width, C* packed) {
  for (int64_t channel = 0; channel < stride; channel += group_width) {
    const int64_t width = std::min(group_width, stride - channel);
    for (int64_t c = 0; c < width; ++c) {
      const bool real = channel + c < channels;
      const C* row = weight.values + (channel + c) * weight.row_stride;
      const C factor = real && weight.row_factor ? weight.row_factor[channel + c] : C(1);
      for (int64_t tap = 0; tap < taps; ++tap)
        packed[channel * taps + tap * width + c] = real ? row[tap * weight.column_stride] * factor : C(0);
    }
  }
}

template <typename C>
void pack_bias(const C* bias, int64_t channels, int64_t stride, C* packed) {
  for (int64_t c = 0; c < stride; ++c) packed[c] = bias && c < channels ? bias[c] : C(0);
}

// The power of two, from 2^-100 to 2^100, that brings a magnitude to [2^(exponent - 1), 2^exponent); 1 for 0
// and what is not finite.
inline float factor_to(float magnitude, int exponent) {
  if (!(magnitude > 0 && magnitude < std::numeric_limits<float>::infinity())) return 1;
  const int own =
      static_cast<int>(std::bit_cast<uint32_t>(magnitude) >> 23) - 127;  // magnitude is below 2^(own + 1)
  return std::bit_cast<float>(static_cast<uint32_t>(std::clamp(exponent - 1 - own, -100, 100) + 127) << 23);
}

template <typename C>
std::vector<C> inverse(const std::vector<C>& factors) {
  std::vector<C> result(factors);
  for (C& x : result) x = 1 / x;
  return result;
}

template <typename C>
std::vector<C> padded_copy(const void* values, C missing, int64_t channels, int64_t stride) {
  std::vector<C> result(stride);
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
    int64_t expand, project, depthwise, half_depthwise, se_reduce, se_reduce_bias, se_expand,
        se_expand_bias;  // offsets
  };

  int64_t pointwise_size(int64_t out, int64_t in) const {
    return row_channels<T>(out) * ceil_div(in, k_.depth_multiple) * k_.depth_multiple * int64_t{sizeof(T)};
  }

  // Those depthwise convolutions that half precision has loops for. The others run in float.
  static bool takes_halves(const OperationSource& o) {
    return kTiled<T> && o.depthwise && (o.kernel == 3 || o.kernel == 5 || o.kernel == 7) && o.stride <= 2;
  }

  Parts place(const OperationSource& o, Arena& arena) const {
    const int64_t hidden = row_channels<T>(o.hidden_channels), se = o.se_channels, c = sizeof(C);
    return {arena.allocate(o.expand ? pointwise_size(hidden, o.in_channels) : 1),
            arena.allocate(o.project ? pointwise_size(o.out_channels, o.depth()) : 1),
            arena.allocate(o.depthwise ? hidden * o.kernel * o.kernel * c : 1),
            arena.allocate(takes_halves(o) ? hidden * o.kernel * o.kernel * 2 : 1),
            arena.allocate(std::max<int64_t>(1, padded(se) * o.hidden_channels * c)),
            arena.allocate(std::max<int64_t>(1, padded(se) * c)),
            arena.allocate(std::max<int64_t>(1, hidden * se * c)),
            arena.allocate(std::max<int64_t>(1, hidden * c))};
  }

  PackedOperation<T> pack_one(const OperationSource& o, const Parts& parts, char* base) const {
    PackedOperation<T> p;
    p.source = o;
    const int64_t width = k_.group_width, hidden = o.hidden_channels, se = o.se_channels;
    pack_batch_norms(p);
    p.expand =
        pack_dense(matrix(o, o.expand, hidden, o.in_channels), hidden, o.in_channels, base + parts.expand);
    pack_project(p, base + parts.project);
    if (o.depthwise) pack_depthwise_weights(p, base + parts.depthwise, base + parts.half_depthwise);
    if (se > 0) {
      p.se_reduce = reinterpret_cast<C*>(base + parts.se_reduce);
      p.se_reduce_bias = reinterpret_cast<C*>(base + parts.se_reduce_bias);
      p.se_expand = reinterpret_cast<C*>(base + parts.se_expand);
      p.se_expand_bias = reinterpret_cast<C*>(base + parts.se_expand_bias);
      const int64_t stride = row_channels<T>(hidden);
      pack_pointwise<C>(matrix(o, o.se_reduce_weight, se, hidden), se, padded(se), hidden, width, 1,
                        p.se_reduce);
      pack_pointwise<C>(matrix(o, o.se_expand_weight, hidden, se), hidden, stride, se, width, 1, p.se_expand);
      pack_bias<C>(static_cast<const C*>(o.se_reduce_bias), se, padded(se), p.se_reduce_bias);
      pack_bias<C>(static_cast<const C*>(o.se_expand_bias), hidden, stride, p.se_expand_bias);
    }
    return p;
  }

  static Matrix<C> matrix(const OperationSource& o, const void* values, int64_t rows, int64_t columns) {
    const auto* weight = static_cast<const C*>(values);
    return o.channels_fastest ? Matrix<C>{weight, 1, padded(rows)} : Matrix<C>{weight, columns, 1};
  }

  // Null for weights that there are none of.
  T* pack_dense(const Matrix<C>& weight, int64_t out, int64_t in, char* to) const {
    if (!weight.values) return nullptr;
    T* target = reinterpret_cast<T*>(to);
    if constexpr (kTiled<T>) {
      k_.pack_tiles(tile_packing(weight, out, in), target);
    } else {
      pack_pointwise<T>(weight, out, row_channels<T>(out), in, k_.group_width, k_.depth_multiple, target);
    }
    return target;
  }

  void pack_project(PackedOperation<T>& p, char* to) const {
    const OperationSource& o = p.source;
    Matrix<C> weight = matrix(o, o.project, o.out_channels, o.depth());
    std::vector<C> row_factor, column_factor, reordered;
    if (o.kind == kConvBn && o.kernel > 1 && takes_tap_by_tap(o.in_channels)) {
      reordered = tap_by_tap(weight.values, o);
      weight.values = reordered.data();
    }
    if (kTiled<T> && o.project && o.kind == kInvertedBottleneck) {
      column_factor = inverse(p.batch_norms[kDepthwiseBn].factor);
      weight.column_factor = column_factor.data();
      row_factor = row_factors(weight, o.out_channels, o.depth());
      weight.row_factor = row_factor.data();
      weight.factor = std::ldexp(C(1), kTileExponent);
      p.project_factor = inverse(row_factor);
      p.project_factor.resize(row_channels<T>(o.out_channels));
    }
    p.project = pack_dense(weight, o.out_channels, o.depth(), to);
  }

  // [out][in][tap] -> [out][tap][in].
  static std::vector<C> tap_by_tap(const C* weight, const OperationSource& o) {
    const int64_t taps = o.kernel * o.kernel;
    std::vector<C> result(o.out_channels * o.depth());
    for (int64_t row = 0; row < o.out_channels * o.depth(); row += o.depth()) {
      for (int64_t c = 0; c < o.in_channels; ++c) {
        for (int64_t tap = 0; tap < taps; ++tap)
          result[row + tap * o.in_channels + c] = weight[row + c * taps + tap];
      }
    }
    return result;
  }

  void pack_depthwise_weights(PackedOperation<T>& p, char* to, [[maybe_unused]] char* halves_to) const {
    const OperationSource& o = p.source;
    const int64_t hidden = o.hidden_channels, taps = o.kernel * o.kernel, stride = p.hidden_stride();
    Matrix<C> weight = matrix(o, o.depthwise, hidden, taps);
    C* target = reinterpret_cast<C*>(to);
    if constexpr (kTiled<T>) {
      if (takes_halves(o)) {
        p.half_depthwise = reinterpret_cast<uint16_t*>(halves_to);
        p.half_depthwise_factor = row_factors(weight, hidden, taps);
        weight.row_factor = p.half_depthwise_factor.data();
        pack_depthwise<C>(weight, hidden, stride, taps, k_.group_width, target);
        k_.to_halves(target, stride * taps, p.half_depthwise);
        p.half_depthwise_factor.resize(stride, C(1));
        if (o.expand) return;  // what comes from an expansion is always of halves
        weight.row_factor = nullptr;
      }
    }
    p.depthwise = target;
    pack_depthwise<C>(weight, hidden, stride, taps, k_.group_width, target);
  }

  // kTiled kernels have no operations whose channels are fastest: mixed_op knows no bfloat16.
  static TilePacking tile_packing(const Matrix<C>& weight, int64_t rows, int64_t columns) {
    return {weight.values,        rows,         columns, weight.row_stride, weight.row_factor,
            weight.column_factor, weight.factor};
  }

  // The powers of two that bring each row's largest value, times the columns' factors, to [0.5, 1).
  std::vector<C> row_factors(const Matrix<C>& weight, int64_t rows, int64_t columns) const {
    std::vector<C> factors(rows);
    if constexpr (kTiled<T>) {
      k_.largest_of_rows(tile_packing(weight, rows, columns), factors.data());
      for (C& x : factors) x = factor_to(x, 0);
    }
    return factors;
  }

  void pack_batch_norms(PackedOperation<T>& p) const {
    const OperationSource& o = p.source;
    for (int stage = 0; stage < kBatchNormStages; ++stage) {
      if (!o.normalises(stage)) continue;
      const BatchNormSource& norm = o.batch_norms[stage];
      const int64_t channels = stage == kProjectBn ? o.out_channels : o.hidden_channels;
      const int64_t stride = row_channels<T>(channels);
      BatchNorm<C>& packed =
          p.batch_norms[stage] = {padded_copy<C>(norm.gamma, C(1), channels, stride),
                                  padded_copy<C>(norm.beta, C(0), channels, stride), norm.eps, channels};
      if constexpr (kTiled<T>) {
        packed.factor.reserve(stride);
        for (int64_t c = 0; c < stride; ++c)
          packed.factor.push_back(
              factor_to(std::max(std::abs(packed.gamma[c]), std::abs(packed.beta[c])), kHalfExponent));
      }
      if (!norm.mean) continue;
      p.running.stages[stage] = {padded_copy<C>(norm.mean, C(0), channels, stride),
                                 padded_copy<C>(norm.variance, C(1), channels, stride)};
    }
  }

  // Root mean squares of 2^kHalfExponent at most, or 1.4 times that: the largest of n normalised values is at
  // most sqrt(n), so that the sum of 49 of them, of 10 million values each, stays within half precision; what
  // rounds to 0 is a millionth.
  static constexpr int kHalfExponent = -2;

  const Kernels<T>& k_;
};

}  // namespace greedynas::cpu
