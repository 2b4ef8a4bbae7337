// Weights of pointwise convolutions for matrix tiles: see pack_pointwise in ../../weights.h, which does the
// same value by value.

// 16 rows from `row` on and 32 columns, times their factors, as pairs; what lies outside is 0.
INLINE void load_block(const TilePacking& p, int64_t row, int64_t column, __m512i (&rows)[16]) {
  const auto mask = [&](int64_t first) {
    return static_cast<__mmask16>((1u << std::clamp<int64_t>(p.columns - first, 0, 16)) - 1);
  };
  const __mmask16 low = mask(column), high = mask(column + 16);
  __m512 by[2] = {_mm512_set1_ps(p.factor), _mm512_set1_ps(p.factor)};
  if (p.column_factor) {
    by[0] = _mm512_maskz_loadu_ps(low, p.column_factor + column);
    by[1] = _mm512_maskz_loadu_ps(high, p.column_factor + column + 16);
  }
  for (int64_t r = 0; r < 16; ++r) {
    rows[r] = _mm512_setzero_si512();
    if (row + r >= p.rows) continue;
    const float* values = p.weight + (row + r) * p.row_stride + column;
    __m512 a = _mm512_maskz_loadu_ps(low, values), b = _mm512_maskz_loadu_ps(high, values + 16);
    if (p.row_factor) {
      const __m512 factor = _mm512_set1_ps(p.row_factor[row + r]);
      a = _mm512_mul_ps(a, factor);
      b = _mm512_mul_ps(b, factor);
    }
    a = _mm512_mul_ps(a, by[0]);
    b = _mm512_mul_ps(b, by[1]);
    if (p.column_factor) {
      a = _mm512_mul_ps(a, _mm512_set1_ps(p.factor));
      b = _mm512_mul_ps(b, _mm512_set1_ps(p.factor));
    }
    rows[r] = (__m512i)_mm512_cvtne2ps_pbh(b, a);
  }
}

inline void pack_tiles(const TilePacking& p, TiledBFloat16* packed) {
  const int64_t depth = row_channels<TiledBFloat16>(p.columns);
  for (int64_t row = 0; row < row_channels<TiledBFloat16>(p.rows); row += 16) {
    for (int64_t column = 0; column < depth; column += 32) {
      __m512i rows[16], pairs[16];
      load_block(p, row, column, rows);
      transpose_pairs(rows, pairs);
      TiledBFloat16* out = packed + row / 32 * 32 * depth + column * 32 + row % 32 * 2;
      for (int64_t i = 0; i < 16; ++i) _mm512_storeu_si512(out + i * 64, pairs[i]);
    }
  }
}

// The largest finite magnitude of each row, times the columns' factors.
inline void largest_of_rows(const TilePacking& p, float* largest) {
  const __m512 infinity = _mm512_set1_ps(__builtin_inff());
  for (int64_t row = 0; row < p.rows; ++row) {
    __m512 most = _mm512_setzero_ps();
    for (int64_t column = 0; column < p.columns; column += 16) {
      const auto mask = static_cast<__mmask16>((1u << std::min<int64_t>(p.columns - column, 16)) - 1);
      __m512 x = _mm512_abs_ps(_mm512_maskz_loadu_ps(mask, p.weight + row * p.row_stride + column));
      if (p.column_factor) x = _mm512_mul_ps(x, _mm512_maskz_loadu_ps(mask, p.column_factor + column));
      most = _mm512_mask_max_ps(most, _mm512_cmp_ps_mask(x, infinity, _CMP_LT_OQ), most, x);
    }
    largest[row] = _mm512_reduce_max_ps(most);
  }
}
