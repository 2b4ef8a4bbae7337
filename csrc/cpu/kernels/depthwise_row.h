// A row of outputs of the depthwise convolution, a few neighbouring pixels and a vector of channels at a
// time.

// One row of depthwise outputs of a group of channels.
template <typename T>
struct DepthwiseRow {
  using C = Compute<T>;
  const C* const* rows;  // of the ring, those of the kernel's rows that lie inside the image
  int64_t first_row, last_row;
  const C* weight;  // [kernel * kernel][channels of the group]
  T* output;        // [columns][channels of the group]
  int64_t columns;
  C* sums;  // [pilot, sum, squares][channels of the group], or null
  bool sets_pilot;
  bool streams;   // past the cache
  T* half_lines;  // [columns][lanes of a vector], where streams and a vector is half a cache line
  int64_t kernel, stride;
};

// The statistics of a row's outputs, a vector of channels at a time.
template <typename C>
struct RowSums {
  Vec<C> pilot, sum, squares;

  INLINE void add(Vec<C> value) {
    const Vec<C> distance = value - pilot;
    sum += distance;
    squares += distance * distance;
  }
};

// Stores past the cache, in whole cache lines: a vector of C, or, of BFloat16, this vector and the one
// before.
template <typename T, int kVectors>
INLINE void stream_column(const DepthwiseRow<T>& d, int v, int64_t column, Vec<Compute<T>> value) {
  constexpr int kLanesEach = kVectorLanes<Compute<T>>;
  constexpr int kWidth = kVectors * kLanesEach;
  T* out = d.output + column * kWidth;
#if GREEDYNAS_LEVEL >= GREEDYNAS_AVX512
  if constexpr (sizeof(T) == sizeof(Compute<T>)) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out + v * kLanesEach), (__m512i)value);
    return;
  }
#endif
#ifdef GREEDYNAS_BF16
  if constexpr (sizeof(T) == 2 && kVectors == 2) {
    T* half = d.half_lines + column * kLanesEach;
    if (v == 0) return store_values<T>(half, value);
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(half));
    const __m512i line =
        _mm512_inserti64x4(_mm512_castsi256_si512(low), (__m256i)_mm512_cvtneps_pbh((__m512)value), 1);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(out), line);
    return;
  }
#endif
  store_values<T>(out + v * kLanesEach, value);
}

template <typename T, int kVectors>
INLINE RowSums<Compute<T>> load_sums(const DepthwiseRow<T>& d, int v) {
  using C = Compute<T>;
  constexpr int kLanesEach = kVectorLanes<C>;
  constexpr int kWidth = kVectors * kLanesEach;
  if (!d.sums) return {Vec<C>{}, Vec<C>{}, Vec<C>{}};
  const C* sums = d.sums + v * kLanesEach;
  return {load<C>(sums), load<C>(sums + kWidth), load<C>(sums + 2 * kWidth)};
}

template <typename T, int kVectors>
INLINE void store_sums(const DepthwiseRow<T>& d, int v, const RowSums<Compute<T>>& values) {
  using C = Compute<T>;
  constexpr int kLanesEach = kVectorLanes<C>;
  constexpr int kWidth = kVectors * kLanesEach;
  if (!d.sums) return;
  C* sums = d.sums + v * kLanesEach;
  store<C>(sums, values.pilot);
  store<C>(sums + kWidth, values.sum);
  store<C>(sums + 2 * kWidth, values.squares);
}

// Stores a tile of outputs, those that lie inside the row, and adds them to the sums.
template <typename T, int kVectors, int kColumns>
INLINE void finish_columns(const DepthwiseRow<T>& d, int v, int64_t column,
                           const Vec<Compute<T>> (&out)[kColumns], RowSums<Compute<T>>& sums) {
  constexpr int kLanesEach = kVectorLanes<Compute<T>>;
  constexpr int kWidth = kVectors * kLanesEach;
  if (d.sets_pilot && column == 0) sums.pilot = out[0];
  T* output = d.output + column * kWidth + v * kLanesEach;
  UNROLL
  for (int c = 0; c < kColumns; ++c) {
    if (column + c >= d.columns) break;
    if (d.streams) {
      stream_column<T, kVectors>(d, v, column + c, out[c]);
    } else {
      store_values<T>(output + c * kWidth, out[c]);
    }
    sums.add(out[c]);
  }
}

// For a kernel and a stride that are known when this is compiled, or, with kKernel 0, for any.
template <typename T, int kKernel, int kStride, int kColumns, int kVectors>
void depthwise_row(const DepthwiseRow<T>& d) {
  using C = Compute<T>;
  constexpr int kLanesEach = kVectorLanes<C>;
  constexpr int kWidth = kVectors * kLanesEach;
  for (int v = 0; v < kVectors; ++v) {
    RowSums<C> sums = load_sums<T, kVectors>(d, v);
    for (int64_t column = 0; column < d.columns; column += kColumns) {
      Vec<C> out[kColumns];
      UNROLL
      for (int c = 0; c < kColumns; ++c) out[c] = Vec<C>{};
      for (int64_t y = d.first_row; y < d.last_row; ++y) {
        const int64_t kernel = kKernel ? kKernel : d.kernel, stride = kKernel ? kStride : d.stride;
        const C* in = d.rows[y] + column * stride * kWidth + v * kLanesEach;
        const C* weight = d.weight + y * kernel * kWidth + v * kLanesEach;
        if constexpr (kKernel == 0) {
          for (int64_t x = 0; x < kernel; ++x) {
            const Vec<C> w = load<C>(weight + x * kWidth);
            UNROLL
            for (int c = 0; c < kColumns; ++c) out[c] += load<C>(in + (c * stride + x) * kWidth) * w;
          }
        } else {
          Vec<C> w[kKernel];
          UNROLL
          for (int x = 0; x < kKernel; ++x) w[x] = load<C>(weight + x * kWidth);
          _Pragma("GCC unroll 40") for (int i = 0; i < (kColumns - 1) * kStride + kKernel; ++i) {
            const Vec<C> value = load<C>(in + i * kWidth);
            UNROLL
            for (int x = 0; x < kKernel; ++x) {
              if (i - x >= 0 && (i - x) % kStride == 0 && (i - x) / kStride < kColumns) {
                out[(i - x) / kStride] += value * w[x];
              }
            }
          }
        }
      }
      finish_columns<T, kVectors, kColumns>(d, v, column, out, sums);
    }
    store_sums<T, kVectors>(d, v, sums);
  }
}

template <typename T>
struct RowKernel {
  void (*run)(const DepthwiseRow<T>&);
  int64_t columns;  // of a tile: outputs are computed in whole tiles
};

template <typename T, int kKernel, int kStride, int kVectors>
RowKernel<T> choose_columns(int64_t out_width) {
  RowKernel<T> best{&depthwise_row<T, kKernel, kStride, 4, kVectors>, 4};
  const auto consider = [&](void (*run)(const DepthwiseRow<T>&), int64_t columns) {
    if (ceil_div(out_width, columns) * columns <= ceil_div(out_width, best.columns) * best.columns) {
      best = {run, columns};
    }
  };
  consider(&depthwise_row<T, kKernel, kStride, 7, kVectors>, 7);
  consider(&depthwise_row<T, kKernel, kStride, 8, kVectors>, 8);
#if GREEDYNAS_LEVEL >= GREEDYNAS_AVX512
  consider(&depthwise_row<T, kKernel, kStride, 14, kVectors>, 14);
#endif
  return best;
}

template <typename T, int kVectors>
RowKernel<T> choose_row(int64_t kernel, int64_t stride, int64_t out_width) {
  if (stride == 1 && kernel == 3) return choose_columns<T, 3, 1, kVectors>(out_width);
  if (stride == 1 && kernel == 5) return choose_columns<T, 5, 1, kVectors>(out_width);
  if (stride == 1 && kernel == 7) return choose_columns<T, 7, 1, kVectors>(out_width);
  if (stride == 2 && kernel == 3) return choose_columns<T, 3, 2, kVectors>(out_width);
  if (stride == 2 && kernel == 5) return choose_columns<T, 5, 2, kVectors>(out_width);
  if (stride == 2 && kernel == 7) return choose_columns<T, 7, 2, kVectors>(out_width);
  return {&depthwise_row<T, 0, 0, 4, kVectors>, 4};
}
