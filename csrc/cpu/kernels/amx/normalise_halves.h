// The inputs of a projection, 32 channels of a panel, from depthwise outputs in half precision: affine map,
// activation, gate, and the factors (block_kernels.h), 2^-kTileExponent among them.
//
// A half's bits, shifted right by three, are those of a bfloat16 2^112 times as small: where nothing is
// negative and there is no gate, that is all it takes.

// Whether these pixels are done: what is not finite has other bits, and is left to normalise_slowly.
template <Activation kActivation>
INLINE bool normalise_by_shift(const ProjectInput<TiledBFloat16>& in, const Half* source, int64_t channel,
                               int64_t pixels, TiledBFloat16* out) {
  static_assert(kActivation == kRelu || kActivation == kRelu6);
  Vec<float> factor[2], scale[2], shift[2];
  for (int v = 0; v < 2; ++v) {
    factor[v] = load<float>(in.factor + channel + v * 16);
    scale[v] = load<float>(in.scale + channel + v * 16) * factor[v];
    shift[v] = load<float>(in.shift + channel + v * 16) * factor[v];
  }
  const Halves a = to_halves(scale[0], scale[1]), b = to_halves(shift[0], shift[1]);
  const Halves six = to_halves(factor[0] * 6.f, factor[1] * 6.f);
  constexpr int kNotFinite = 0x01 | 0x08 | 0x10 | 0x80;
  const __mmask32 no_halves = _mm512_fpclass_ph_mask(a, kNotFinite) | _mm512_fpclass_ph_mask(b, kNotFinite);
  if (no_halves != 0) return false;  // an affine map beyond half precision
  const __m512i half_unit = _mm512_set1_epi16(4);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t p = 0; p < pixels; ++p) {
    Halves x = _mm512_fmadd_ph(load_halves(source + p * kHalfLanes), a, b);
    x = _mm512_max_ph(_mm512_setzero_ph(), x);
    if constexpr (kActivation == kRelu6) x = _mm512_min_ph(six, x);
    const __m512i bits = _mm512_castph_si512(x);
    largest = _mm512_max_epu16(largest, bits);
    _mm512_store_si512(out + p * kHalfLanes, _mm512_srli_epi16(_mm512_add_epi16(bits, half_unit), 3));
  }
  return _mm512_cmpge_epu16_mask(largest, _mm512_set1_epi16(0x7c00)) == 0;
}

template <Activation kActivation>
void normalise_slowly(const ProjectInput<TiledBFloat16>& in, const void* source, int64_t channel,
                      int64_t pixels, const float* gates, int64_t first_pixel, int64_t hidden,
                      TiledBFloat16* out) {
  Vec<float> factor[2], scale[2], shift[2];
  for (int v = 0; v < 2; ++v) {
    factor[v] = load<float>(in.factor + channel + v * 16) * 0x1p-112f;
    scale[v] = load<float>(in.scale + channel + v * 16);
    shift[v] = load<float>(in.shift + channel + v * 16);
  }
  static_assert(kTileExponent == 112);
  const auto convert = [&](int64_t first, int64_t last,
                           const Vec<float>(&by)[2]) __attribute__((always_inline)) {
    for (int64_t p = first; p < last; ++p) {
      Vec<float> x[2];
      if (in.halves) {
        const Halves value = load_halves(static_cast<const Half*>(source) + p * kHalfLanes);
        x[0] = low_half(value);
        x[1] = high_half(value);
      } else {
        const auto* values = static_cast<const TiledBFloat16*>(source) + p * 32;
        x[0] = load_values<TiledBFloat16>(values);
        x[1] = load_values<TiledBFloat16>(values + 16);
      }
      for (int v = 0; v < 2; ++v) x[v] = activate<kActivation, float>(x[v] * scale[v] + shift[v]) * by[v];
      store_bfloat16(out + p * 32, x[0], x[1]);
    }
  };
  if (!gates) return convert(0, pixels, factor);
  int64_t image = first_pixel / in.image_pixels, left = in.image_pixels - first_pixel % in.image_pixels;
  for (int64_t p = 0; p < pixels;) {
    const float* gate = gates + image * hidden + channel;
    const Vec<float> by[2] = {load<float>(gate) * factor[0], load<float>(gate + 16) * factor[1]};
    const int64_t stop = std::min(pixels, p + left);
    convert(p, stop, by);
    p = stop;
    ++image;
    left = in.image_pixels;
  }
}

template <Activation kActivation>
void normalise_tiles(const ProjectInput<TiledBFloat16>& in, const TiledBFloat16* source, int64_t channel,
                     int64_t pixels, const float* gates, int64_t first_pixel, int64_t hidden,
                     TiledBFloat16* out) {
  if constexpr (kActivation == kRelu || kActivation == kRelu6) {
    if (in.halves && !gates &&
        normalise_by_shift<kActivation>(in, reinterpret_cast<const Half*>(source), channel, pixels, out))
      return;
  }
  normalise_slowly<kActivation>(in, source, channel, pixels, gates, first_pixel, hidden, out);
}
