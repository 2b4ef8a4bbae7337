// finish: the last BatchNorm and the residual of a block, applied in one pass with the sums for the mean and
// the centred second moments of its output. From these, pointwise_moments knows the statistics of every
// pointwise convolution of that output without computing it: mean W m and variance diag(W S W^T).
//
// Values are taken relative to a pilot near their mean, multiplied in C over kGramPixels and added up in
// double.

template <typename T, Activation kActivation>
INLINE void finish_pixels(const FinishMap<T>& f, int64_t first, int64_t count, Compute<T>* centred,
                          double* sums) {
  using C = Compute<T>;
  constexpr int kLanesEach = kVectorLanes<C>;
  const int64_t stride = row_channels<T>(f.channels);
  const int64_t output_stride = f.output_stride ? f.output_stride : stride;
  for (int64_t c = 0; c < stride; c += kLanesEach) {
    Vec<C> scale{}, shift{}, pilot{}, sum{};
    if (f.scale) {
      scale = load<C>(f.scale + c);
      shift = load<C>(f.shift + c);
    }
    if (centred) pilot = load<C>(f.pilot + c);
    for (int64_t p = 0; p < count; ++p) {
      const int64_t place = (first + p) * stride + c;
      Vec<C> x = load_values<T>(f.raw + place);
      if (f.scale) {
        x = activate<kActivation, C>(x * scale + shift);
        if (f.residual) x += load_values<T>(f.residual + place);
        T* output = f.output + (first + p) * output_stride + c;
        store_values<T>(output, x);
        if constexpr (sizeof(T) < sizeof(C)) x = load_values<T>(output);  // as consumers read it
      }
      if (centred) {
        const Vec<C> distance = x - pilot;
        sum += distance;
        store<C>(centred + p * stride + c, distance);
      }
    }
    if (!centred) continue;
    for (int lane = 0; lane < kLanesEach; ++lane) sums[c + lane] += static_cast<double>(sum[lane]);
  }
}

inline constexpr int kGramRows = 8;

// gram[i..][j..] += sum over pixels of x[i] * x[j], for kGramRows values of i and kVectors vectors of j.
template <int kVectors, typename C>
INLINE void gram_tile(const C* x, int64_t stride, int64_t count, int64_t i, int64_t j, double* gram) {
  constexpr int kLanesEach = kVectorLanes<C>;
  Vec<C> acc[kGramRows][kVectors];
  clear(acc);
  for (int64_t p = 0; p < count; ++p) {
    const C* row = x + p * stride;
    Vec<C> values[kVectors];
    UNROLL
    for (int v = 0; v < kVectors; ++v) values[v] = load<C>(row + j + v * kLanesEach);
    UNROLL
    for (int q = 0; q < kGramRows; ++q) {
      UNROLL
      for (int v = 0; v < kVectors; ++v) acc[q][v] += row[i + q] * values[v];
    }
  }
  UNROLL
  for (int q = 0; q < kGramRows; ++q) {
    C part[kVectors * kLanesEach];
    UNROLL
    for (int v = 0; v < kVectors; ++v) store<C>(part + v * kLanesEach, acc[q][v]);
    double* out = gram + (i + q) * stride + j;
    for (int c = 0; c < kVectors * kLanesEach; ++c) out[c] += static_cast<double>(part[c]);
  }
}

template <typename T>
void finish(const FinishMap<T>& f, int64_t first_unit, int64_t last_unit, double* gram, double* sums) {
  using C = Compute<T>;
  constexpr int kLanesEach = kVectorLanes<C>;
  const int64_t stride = row_channels<T>(f.channels);
  thread_local Scratch<C> centred_memory;
  C* centred = f.pilot ? centred_memory.get(kGramPixels * stride) : nullptr;
  for (int64_t unit = first_unit; unit < last_unit; ++unit) {
    const int64_t first = unit * kGramPixels, count = std::min(kGramPixels, f.pixels - first);
    GREEDYNAS_WITH_ACTIVATION(f.activation, (finish_pixels<T, kActivation>(f, first, count, centred, sums)))
    if (!centred) continue;
    for (int64_t i = 0; i < stride; i += kGramRows) {
      // Columns from the vector that holds i on.
      for (int64_t j = i / kLanesEach * kLanesEach; j < stride; j += 2 * kLanesEach) {
        if (stride - j < 2 * kLanesEach) {
          gram_tile<1, C>(centred, stride, count, i, j, gram);
        } else {
          gram_tile<2, C>(centred, stride, count, i, j, gram);
        }
      }
    }
  }
}

// Packed weights of one group as [depth][width] of C.
template <typename T>
const Compute<T>* group_weights(const T* weight, int64_t, int64_t) {
  return weight;
}
#ifdef GREEDYNAS_BF16
template <>
const float* group_weights<Bf16>(const Bf16* weight, int64_t depth, int64_t width) {
  thread_local Scratch<float> memory;
  float* out = memory.get((depth + 1) * width);
  for (int64_t k = 0; k < depth; ++k) {
    for (int64_t c = 0; c < width; ++c) {
      const uint32_t bits = static_cast<uint32_t>(weight[k / 2 * 2 * width + c * 2 + k % 2].bits) << 16;
      __builtin_memcpy(out + k * width + c, &bits, 4);
    }
  }
  return out;
}
#endif

// covariance: [depth][depth], row i from column i on, what lies right of the diagonal doubled.
template <typename C, int kVectors>
void group_moments(const C* mean, const C* covariance, int64_t depth, const C* weight, C* out_mean,
                   C* out_variance) {
  constexpr int kLanesEach = kVectorLanes<C>;
  constexpr int kWidth = kVectors * kLanesEach;
  constexpr int kRows = 4;
  Vec<C> means[kVectors] = {}, variances[kVectors] = {};
  for (int64_t i = 0; i < depth; i += kRows) {
    Vec<C> acc[kRows][kVectors];
    clear(acc);
    const int64_t rows = std::min<int64_t>(kRows, depth - i);
    const auto one = [&](int64_t j, int r) __attribute__((always_inline)) {
      UNROLL
      for (int v = 0; v < kVectors; ++v) {
        acc[r][v] += covariance[(i + r) * depth + j] * load<C>(weight + j * kWidth + v * kLanesEach);
      }
    };
    for (int64_t j = i; j < std::min(i + rows, depth); ++j) {  // the corner: above the diagonal only
      UNROLL
      for (int r = 0; r < kRows; ++r) {
        if (i + r <= j) one(j, r);
      }
    }
    if (rows == kRows) {
      for (int64_t j = i + kRows; j < depth; ++j) {
        UNROLL
        for (int r = 0; r < kRows; ++r) one(j, r);
      }
    }
    UNROLL
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) break;
      UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const Vec<C> w = load<C>(weight + (i + r) * kWidth + v * kLanesEach);
        variances[v] += w * acc[r][v];
        means[v] += mean[i + r] * w;
      }
    }
  }
  UNROLL
  for (int v = 0; v < kVectors; ++v) {
    store<C>(out_mean + v * kLanesEach, means[v]);
    store<C>(out_variance + v * kLanesEach, positive<C>(variances[v]));
  }
}

template <typename T>
void pointwise_moments(const Compute<T>* mean, const Compute<T>* covariance, int64_t depth, const T* weight,
                       int64_t channels, int64_t group, Compute<T>* out_mean, Compute<T>* out_variance) {
  using C = Compute<T>;
  const int64_t channel = group * kGroupWidth<C>;
  const int64_t width = std::min<int64_t>(kGroupWidth<C>, row_channels<T>(channels) - channel);
  const C* w = group_weights<T>(weight + channel * packed_depth<T>(depth), depth, width);
  if (kHasNarrowGroup<C> && width < kGroupWidth<C>) {
    group_moments<C, 1>(mean, covariance, depth, w, out_mean + channel, out_variance + channel);
  } else {
    group_moments<C, 2>(mean, covariance, depth, w, out_mean + channel, out_variance + channel);
  }
}
