// patches of few channels by matrix tiles: see ../project.h. Sixteen neighbouring outputs of a row are
// gathered tap by tap, and pairs of taps transposed into the rows of the panel.

class FillPatches {
  using T = TiledBFloat16;

 public:
  explicit FillPatches(const PatchInput<T>& in)
      : in_(in), out_height_(ceil_div(in.height, in.stride)), out_width_(ceil_div(in.width, in.stride)) {}

  // Whether offsets of a row's columns fit into the gathering instruction.
  bool possible() const { return in_.width * std::abs(in_.strides[3]) < (int64_t{1} << 31); }

  INLINE void operator()(const Panel<T>& panel, int64_t pixel, int64_t pixels) const {
    const int64_t taps = in_.channels * in_.kernel * in_.kernel;
    // What a segment writes behind its own rows belongs to the next segment, or to the next group.
    for (int64_t first_tap = 0; first_tap < taps; first_tap += 32) {
      T* rows = panel.group(first_tap);
      for (int64_t p = 0; p < pixels;) {
        const int64_t x = (pixel + p) % out_width_, row = (pixel + p) / out_width_;
        const int64_t count = std::min({int64_t{16}, out_width_ - x, pixels - p});
        segment(rows + p * 32, row / out_height_, row % out_height_, x, count, first_tap,
                std::min(first_tap + 32, taps));
        p += count;
      }
    }
  }

 private:
  INLINE void segment(T* rows, int64_t image, int64_t y, int64_t x, int64_t count, int64_t first_tap,
                      int64_t last_tap) const {
    alignas(64) __m512i pairs[16];
    for (__m512i& pair : pairs) pair = _mm512_setzero_si512();
    const int64_t padding = in_.kernel / 2, first_column = x * in_.stride - padding;
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i columns =
        _mm512_add_epi32(_mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int>(in_.stride))),
                         _mm512_set1_epi32(static_cast<int>(first_column)));
    const auto real = static_cast<__mmask16>((1u << count) - 1);
    const __m512i column_stride = _mm512_set1_epi32(static_cast<int>(in_.strides[3]));
    const float* source = in_.input + image * in_.strides[0];
    for (int64_t tap = first_tap; tap < last_tap; ++tap) {
      const int64_t in_row = tap / in_.kernel, i = in_row % in_.kernel, j = tap % in_.kernel;
      const int64_t in_y = y * in_.stride - padding + i;
      if (in_y < 0 || in_y >= in_.height) continue;
      const float* values = source + in_row / in_.kernel * in_.strides[1] + in_y * in_.strides[2];
      const __m512i column = _mm512_add_epi32(columns, _mm512_set1_epi32(static_cast<int>(j)));
      const __mmask16 inside =
          _mm512_mask_cmplt_epu32_mask(real, column, _mm512_set1_epi32(static_cast<int>(in_.width)));
      const __m512 x_values = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), inside,
                                                       _mm512_mullo_epi32(column, column_stride), values, 4);
      const __m512i bits = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x_values));
      __m512i& pair = pairs[(tap - first_tap) / 2];
      pair = _mm512_or_si512(pair, tap % 2 == 0 ? bits : _mm512_slli_epi32(bits, 16));
    }
    transpose_pairs(pairs, rows);
  }

  const PatchInput<T>& in_;
  int64_t out_height_, out_width_;
};

inline void patches_tiles(const PatchInput<TiledBFloat16>& in, const PointwiseOutput<TiledBFloat16>& out,
                          int64_t first_block, int64_t last_block) {
  const FillPatches fill(in);
  if (takes_tap_by_tap(in.channels) || !fill.possible())
    return patches<TiledBFloat16>(in, out, first_block, last_block);
  const int64_t pixels = in.images * ceil_div(in.height, in.stride) * ceil_div(in.width, in.stride);
  pointwise_blocks<TiledBFloat16>(out, 0, pixels, first_block, last_block, 0, fill);
}
