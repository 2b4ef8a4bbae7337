// Statistics of a group's depthwise outputs in half precision. Going to float and back takes longer than a
// small depthwise convolution, so that a tile's outputs, 16 at most, are added up in half precision first:
// their distances from a pilot, multiplied by a power of two, `range`, that makes them about 1, and the
// squares of those. Rounding costs 2^-11 of each number at most, in either direction; the sums go on in float
// and double. A tile whose squares leave the range of half precision is added up in float, and makes the
// range wider.
//
// At first the range is that of kMeasuredTiles tiles, which are added up in float. Should all others be so
// much closer to the pilot that their squares vanish, they add less to the variance than rounding does.
struct HalfSums {
  static constexpr int64_t kMeasuredTiles = 4;

  alignas(64) float pilot[kHalfLanes] = {};
  alignas(64) float sum[kHalfLanes] = {}, squares[kHalfLanes] = {};  // times range, and its square
  alignas(64) float range[kHalfLanes], inverse_range[kHalfLanes];
  alignas(64) Half half_range[kHalfLanes] = {}, half_origin[kHalfLanes] = {};  // range, and -pilot * range
  alignas(64) double total[kHalfLanes] = {}, total_squares[kHalfLanes] = {};
  int64_t tiles = 0, measured = 0;  // added up so far; outputs of the first ones

  HalfSums() {
    std::fill_n(range, kHalfLanes, 1.f);
    std::fill_n(inverse_range, kHalfLanes, 1.f);
  }

  // Whether the next tile is added up in float, from memory.
  bool measures() const { return tiles < kMeasuredTiles; }

  // The first `columns` outputs of each row, which lie in `stored` too.
  template <int kRows, int kColumns>
  INLINE void add(const Halves (&out)[2][kColumns], const Half* const (&stored)[2], int64_t columns) {
    if (tiles++ < kMeasuredTiles) return measure(stored, kRows, columns);
    const Halves by = load_halves(half_range), origin = load_halves(half_origin);
    Halves sums_of[2], squares_of[2];  // of even and odd ones: shorter chains
    sums_of[0] = sums_of[1] = squares_of[0] = squares_of[1] = _mm512_setzero_ph();
    UNROLL
    for (int r = 0; r < kRows; ++r) {
      UNROLL
      for (int c = 0; c < kColumns; ++c) {
        if (c >= columns) break;
        const int chain = (r * kColumns + c) % 2;
        const Halves distance = _mm512_fmadd_ph(out[r][c], by, origin);
        sums_of[chain] = _mm512_add_ph(sums_of[chain], distance);
        squares_of[chain] = _mm512_fmadd_ph(distance, distance, squares_of[chain]);
      }
    }
    const Halves s = _mm512_add_ph(sums_of[0], sums_of[1]), q = _mm512_add_ph(squares_of[0], squares_of[1]);
    if (_mm512_cmp_ph_mask(q, _mm512_set1_ph(32768), _CMP_NLT_UQ) != 0)
      return add_in_float(stored, kRows, columns);
    store<float>(sum, load<float>(sum) + low_half(s));
    store<float>(sum + 16, load<float>(sum + 16) + high_half(s));
    store<float>(squares, load<float>(squares) + low_half(q));
    store<float>(squares + 16, load<float>(squares + 16) + high_half(q));
  }

  void flush() {
    for (int64_t c = 0; c < kHalfLanes; c += 8) {
      const __m512d by = _mm512_cvtps_pd(_mm256_load_ps(inverse_range + c));
      const __m512d s = _mm512_mul_pd(_mm512_cvtps_pd(_mm256_load_ps(sum + c)), by);
      const __m512d q = _mm512_mul_pd(_mm512_cvtps_pd(_mm256_load_ps(squares + c)), _mm512_mul_pd(by, by));
      _mm512_store_pd(total + c, _mm512_add_pd(_mm512_load_pd(total + c), s));
      _mm512_store_pd(total_squares + c, _mm512_add_pd(_mm512_load_pd(total_squares + c), q));
      _mm256_store_ps(sum + c, _mm256_setzero_ps());
      _mm256_store_ps(squares + c, _mm256_setzero_ps());
    }
  }

 private:
  struct Squares {
    Vec<float> of[2];
  };

  // Adds a tile up in float; returns the sums of its squares.
  Squares sum_in_float(const Half* const (&stored)[2], int64_t rows, int64_t columns) {
    Squares result;
    for (int v = 0; v < 2; ++v) {
      const Vec<float> from = load<float>(pilot + v * 16), by = load<float>(range + v * 16);
      Vec<float> s{}, q{};
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; ++c) {
          const Halves x = load_halves(stored[r] + c * kHalfLanes);
          const Vec<float> distance = ((v == 0 ? low_half(x) : high_half(x)) - from) * by;
          s += distance;
          q += distance * distance;
        }
      }
      store<float>(sum + v * 16, load<float>(sum + v * 16) + s);
      store<float>(squares + v * 16, load<float>(squares + v * 16) + q);
      result.of[v] = q;
    }
    return result;
  }

  // A tile that left the range, and makes it wider.
  __attribute__((noinline)) void add_in_float(const Half* const (&stored)[2], int64_t rows, int64_t columns) {
    const Squares found = sum_in_float(stored, rows, columns);
    for (int v = 0; v < 2; ++v) {
      const Vec<float> variance = found.of[v] / static_cast<float>(rows * columns);
      change_range(v * 16, _mm512_cmp_ps_mask((__m512)variance, _mm512_set1_ps(1), _CMP_GT_OQ), variance);
    }
  }

  __attribute__((noinline)) void measure(const Half* const (&stored)[2], int64_t rows, int64_t columns) {
    if (measured == 0) {
      store<float>(pilot, low_half(load_halves(stored[0])));
      store<float>(pilot + 16, high_half(load_halves(stored[0])));
    }
    sum_in_float(stored, rows, columns);
    measured += rows * columns;
    if (tiles < kMeasuredTiles) return;
    for (int v = 0; v < 2; ++v)
      change_range(v * 16, 0xffff, load<float>(squares + v * 16) / static_cast<float>(measured));
  }

  // Makes numbers of the given variance, in the present range, about 1, in those channels from `c` on that
  // `mask` names. What was constant so far gets the narrowest range: its first tile that is not will make it
  // wider.
  INLINE void change_range(int64_t c, __mmask16 mask, Vec<float> variance) {
    const __m512 one = _mm512_set1_ps(1), from = _mm512_load_ps(pilot + c), old = _mm512_load_ps(range + c);
    mask &=
        _mm512_cmp_ps_mask((__m512)variance, _mm512_set1_ps(1e30f), _CMP_LT_OQ);  // not what is not finite
    const __m512 change =
        _mm512_floor_ps(_mm512_mul_ps(_mm512_getexp_ps((__m512)variance), _mm512_set1_ps(-0.5f)));
    // Neither the range nor the pilot may leave half precision.
    const __m512 most =
        _mm512_min_ps(_mm512_set1_ps(14), _mm512_sub_ps(_mm512_set1_ps(13), _mm512_getexp_ps(from)));
    const __m512 wanted = _mm512_add_ps(_mm512_getexp_ps(old), change);
    const __m512 exponent = _mm512_max_ps(_mm512_set1_ps(-14), _mm512_min_ps(most, wanted));
    const __m512 now = _mm512_mask_scalef_ps(old, mask, one, exponent), by = _mm512_div_ps(now, old);
    _mm512_store_ps(range + c, now);
    _mm512_store_ps(inverse_range + c, _mm512_div_ps(one, now));
    _mm512_store_ps(sum + c, _mm512_mul_ps(_mm512_load_ps(sum + c), by));
    _mm512_store_ps(squares + c, _mm512_mul_ps(_mm512_load_ps(squares + c), _mm512_mul_ps(by, by)));
    const auto halves = [](Half* to, __m512 x) {
      _mm256_store_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtxps_ph(x));
    };
    halves(half_range + c, now);
    halves(half_origin + c, _mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(from, now)));
  }
};
