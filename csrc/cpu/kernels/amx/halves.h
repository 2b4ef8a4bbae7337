// Vectors of half-precision numbers: the 32 channels of a group.

using Half = _Float16;
using Halves = __m512h;
inline constexpr int64_t kHalfLanes = 32;

INLINE Halves load_halves(const Half* p) { return _mm512_load_ph(p); }
INLINE Vec<float> low_half(Halves x) { return (Vec<float>)_mm512_cvtxph_ps(_mm512_castph512_ph256(x)); }
INLINE Vec<float> high_half(Halves x) {
  return (Vec<float>)_mm512_cvtxph_ps(_mm256_castpd_ph(_mm512_extractf64x4_pd(_mm512_castph_pd(x), 1)));
}
INLINE Halves to_halves(Vec<float> low, Vec<float> high) {
  const __m256h a = _mm512_cvtxps_ph((__m512)low), b = _mm512_cvtxps_ph((__m512)high);
  return _mm512_castpd_ph(
      _mm512_insertf64x4(_mm512_castpd256_pd512(_mm256_castph_pd(a)), _mm256_castph_pd(b), 1));
}

INLINE void store_bfloat16(TiledBFloat16* out, Vec<float> low, Vec<float> high) {
  _mm512_storeu_si512(out, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}

inline void to_halves(const float* values, int64_t count, uint16_t* halves) {
  for (int64_t i = 0; i < count; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(halves + i),
                        (__m256i)_mm512_cvtxps_ph(_mm512_loadu_ps(values + i)));
}
