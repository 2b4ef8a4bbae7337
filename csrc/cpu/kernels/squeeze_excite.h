// squeeze: means over each image of the activated depthwise output; its two small products are `linear`.

template <typename T, int kVectors, Activation kActivation>
void squeeze_pixels(const T* source, int64_t pixels, const Compute<T>* scale, const Compute<T>* shift,
                    Compute<T>* out) {
  using C = Compute<T>;
  constexpr int kLanesEach = kVectorLanes<C>;
  constexpr int kWidth = kVectors * kLanesEach;
  constexpr int64_t kRun = 64;  // pixels that are added up in C
  for (int v = 0; v < kVectors; ++v) {
    double totals[kLanesEach] = {};
    for (int64_t first = 0; first < pixels; first += kRun) {
      Vec<C> sum{};
      const int64_t last = std::min(first + kRun, pixels);
      for (int64_t p = first; p < last; ++p) {
        sum += activate<kActivation, C>(load_values<T>(source + p * kWidth + v * kLanesEach) *
                                            load<C>(scale + v * kLanesEach) +
                                        load<C>(shift + v * kLanesEach));
      }
      for (int lane = 0; lane < kLanesEach; ++lane) totals[lane] += static_cast<double>(sum[lane]);
    }
    for (int lane = 0; lane < kLanesEach; ++lane) {
      out[v * kLanesEach + lane] = static_cast<C>(totals[lane] / static_cast<double>(pixels));
    }
  }
}

template <typename T>
void squeeze(const Squeeze<T>& s, int64_t first_slab, int64_t last_slab) {
  using C = Compute<T>;
  const ProjectInput<T>& in = s.input;
  const int64_t hidden = row_channels<T>(s.hidden_channels);
  for (int64_t slab = first_slab; slab < last_slab; ++slab) {
    const int64_t first_image = slab * in.slab_images;
    const int64_t images = std::min(in.slab_images, in.images - first_image);
    const T* source = in.depthwise + (slab - in.first_slab) * in.slab_images * in.image_pixels * hidden;
    for (int64_t channel = 0; channel < hidden; channel += kGroupWidth<C>) {
      const int64_t width = std::min<int64_t>(kGroupWidth<C>, hidden - channel);
      for (int64_t image = 0; image < images; ++image) {
        const T* pixels = source + (channel * images + image * width) * in.image_pixels;
        C* out = s.output + (first_image + image) * hidden + channel;
        if (kHasNarrowGroup<C> && width < kGroupWidth<C>) {
          GREEDYNAS_WITH_ACTIVATION(
              in.activation, (squeeze_pixels<T, 1, kActivation>(pixels, in.image_pixels, in.scale + channel,
                                                                in.shift + channel, out)))
        } else {
          GREEDYNAS_WITH_ACTIVATION(
              in.activation, (squeeze_pixels<T, 2, kActivation>(pixels, in.image_pixels, in.scale + channel,
                                                                in.shift + channel, out)))
        }
      }
    }
  }
}
