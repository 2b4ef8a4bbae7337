// The inner product of every pointwise convolution: rows of inputs, broadcast value by value, times vectors
// of weights. Sums stay in registers.

// sums[r] += in[r * in_stride + k] * weight[k][...] over k < depth.
template <int kRows, int kVectors, typename T>
INLINE void multiply_rows(Vec<Compute<T>> (&sums)[kRows][kVectors], const T* in, int64_t in_stride,
                          int64_t depth, const T* weight) {
  constexpr int kLanesEach = kVectorLanes<T>;
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> w[kVectors];
    UNROLL
    for (int v = 0; v < kVectors; ++v) w[v] = load<T>(weight + (k * kVectors + v) * kLanesEach);
    UNROLL
    for (int r = 0; r < kRows; ++r) {
      const T value = in[r * in_stride + k];
      UNROLL
      for (int v = 0; v < kVectors; ++v) sums[r][v] += value * w[v];
    }
  }
}

#ifdef GREEDYNAS_BF16
// Two neighbouring inputs at a time; depth is even.
template <int kRows, int kVectors>
INLINE void multiply_rows(Vec<float> (&sums)[kRows][kVectors], const Bf16* in, int64_t in_stride,
                          int64_t depth, const Bf16* weight) {
  for (int64_t k = 0; k < depth; k += 2) {
    __m512bh w[kVectors];
    UNROLL
    for (int v = 0; v < kVectors; ++v)
      w[v] = (__m512bh)_mm512_loadu_si512(weight + k * kVectors * 16 + v * 32);
    UNROLL
    for (int r = 0; r < kRows; ++r) {
      int32_t pair;
      __builtin_memcpy(&pair, in + r * in_stride + k, 4);
      const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
      UNROLL
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = (Vec<float>)_mm512_dpbf16_ps((__m512)sums[r][v], value, w[v]);
      }
    }
  }
}
#endif

// The input channels that a packed weight has rows for.
template <typename T>
constexpr int64_t packed_depth(int64_t channels) {
  if constexpr (kTiled<T>) return row_channels<T>(channels);
  return sizeof(T) == 2 ? (channels + 1) / 2 * 2 : channels;
}

template <typename V, int kRows, int kVectors>
INLINE void clear(V (&sums)[kRows][kVectors]) {
  UNROLL
  for (int r = 0; r < kRows; ++r) {
    UNROLL
    for (int v = 0; v < kVectors; ++v) sums[r][v] = V{};
  }
}
