// A matrix of 16 x 16 pairs, in rows of 64 bytes, transposed. Four rows' quarters are put together as they
// are loaded, which leaves half of the shuffles.

INLINE __m512i quarters(const char* row, int64_t row_bytes) {
  const auto quarter = [&](int64_t i) __attribute__((always_inline)) {
    return _mm_load_si128(reinterpret_cast<const __m128i*>(row + i * row_bytes));
  };
  __m512i x = _mm512_castsi128_si512(quarter(0));
  x = _mm512_inserti32x4(x, quarter(4), 1);
  x = _mm512_inserti32x4(x, quarter(8), 2);
  return _mm512_inserti32x4(x, quarter(12), 3);
}

INLINE void transpose_pairs(const void* from, void* to) {
  const char* in = static_cast<const char*>(from);
  char* out = static_cast<char*>(to);
  UNROLL
  for (int q = 0; q < 4; ++q) {  // columns 4 q to 4 q + 3 of all rows
    __m512i r[4];
    UNROLL
    for (int i = 0; i < 4; ++i) r[i] = quarters(in + i * 64 + q * 16, 64);
    // Lane l of r[i]: row 4 l + i.
    const __m512i a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpackhi_epi32(r[0], r[1]);
    const __m512i c = _mm512_unpacklo_epi32(r[2], r[3]), d = _mm512_unpackhi_epi32(r[2], r[3]);
    _mm512_store_si512(out + (4 * q + 0) * 64, _mm512_unpacklo_epi64(a, c));
    _mm512_store_si512(out + (4 * q + 1) * 64, _mm512_unpackhi_epi64(a, c));
    _mm512_store_si512(out + (4 * q + 2) * 64, _mm512_unpacklo_epi64(b, d));
    _mm512_store_si512(out + (4 * q + 3) * 64, _mm512_unpackhi_epi64(b, d));
  }
}
