// squeeze of depthwise outputs in half precision; others run as in ../squeeze_excite.h.

template <Activation kActivation>
void squeeze_halves(const Half* source, int64_t pixels, const float* scale, const float* shift, float* out) {
  constexpr int64_t kRun = 64;  // pixels that are added up in float
  double totals[kHalfLanes] = {};
  for (int64_t first = 0; first < pixels; first += kRun) {
    alignas(64) float sums[kHalfLanes];
    Vec<float> low{}, high{};
    for (int64_t p = first; p < std::min(first + kRun, pixels); ++p) {
      const Halves x = load_halves(source + p * kHalfLanes);
      low += activate<kActivation, float>(low_half(x) * load<float>(scale) + load<float>(shift));
      high += activate<kActivation, float>(high_half(x) * load<float>(scale + 16) + load<float>(shift + 16));
    }
    store<float>(sums, low);
    store<float>(sums + 16, high);
    for (int64_t c = 0; c < kHalfLanes; ++c) totals[c] += static_cast<double>(sums[c]);
  }
  for (int64_t c = 0; c < kHalfLanes; ++c)
    out[c] = static_cast<float>(totals[c] / static_cast<double>(pixels));
}

inline void squeeze_tiles(const Squeeze<TiledBFloat16>& s, int64_t first_slab, int64_t last_slab) {
  const ProjectInput<TiledBFloat16>& in = s.input;
  if (!in.halves) return squeeze<TiledBFloat16>(s, first_slab, last_slab);
  const int64_t hidden = row_channels<TiledBFloat16>(s.hidden_channels);
  for (int64_t slab = first_slab; slab < last_slab; ++slab) {
    const int64_t first_image = slab * in.slab_images;
    const int64_t images = std::min(in.slab_images, in.images - first_image);
    const auto* source = reinterpret_cast<const Half*>(in.depthwise) +
                         (slab - in.first_slab) * in.slab_images * in.image_pixels * hidden;
    for (int64_t channel = 0; channel < hidden; channel += kHalfLanes) {
      for (int64_t image = 0; image < images; ++image) {
        const Half* pixels = source + (channel * images + image * kHalfLanes) * in.image_pixels;
        float* out = s.output + (first_image + image) * hidden + channel;
        GREEDYNAS_WITH_ACTIVATION(in.activation,
                                  (squeeze_halves<kActivation>(pixels, in.image_pixels, in.scale + channel,
                                                               in.shift + channel, out)))
      }
    }
  }
}
