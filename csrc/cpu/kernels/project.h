// project, strided and patches: pointwise convolutions whose inputs are first laid out in a panel.

// Works through blocks of pixels: `fill(panel, first pixel, pixels)` lays out the input, pixels counted from
// `first_pixel` of the output.
template <typename T, typename Fill>
INLINE void pointwise_blocks(const PointwiseOutput<T>& out, int64_t first_pixel, int64_t total_pixels,
                             int64_t first_block, int64_t last_block, int64_t first_unit, const Fill& fill) {
  using C = Compute<T>;
  const int64_t stride = row_channels<T>(out.channels), depth_stride = row_channels<T>(out.depth);
  [[maybe_unused]] const Tiles tiles;
  thread_local Scratch<T> panel_memory;
  thread_local Scratch<C> sums_memory;
  Panel<T> panel{panel_memory.get((depth_stride + kGroupWidth<C>)*kPanelPixels<T>)};
  C* sums = out.partials ? sums_memory.get(3 * stride) : nullptr;
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t begin = block * kBlockPixels, end = std::min(begin + kBlockPixels, total_pixels);
    if (sums) std::fill_n(sums, 3 * stride, C(0));
    for (int64_t pixel = begin; pixel < end; pixel += kPanelPixels<T>) {
      const int64_t pixels = std::min(kPanelPixels<T>, end - pixel);
      fill(panel, pixel, pixels);
      for (int64_t channel = 0; channel < stride; channel += kGroupWidth<C>) {
        multiply_panel<T>(
            {out, panel, depth_stride, channel, first_pixel + pixel, pixels, sums, pixel == begin});
      }
    }
    if (!sums) continue;
    double* partial = out.partials + (first_unit + block) * 3 * stride;
    for (int64_t c = 0; c < 3 * stride; ++c) partial[c] = static_cast<double>(sums[c]);
  }
}

template <typename T, int kVectors, Activation kActivation>
INLINE void normalise_pixels(const ProjectInput<T>& in, const T* source, int64_t channel, int64_t pixels,
                             const Compute<T>* gates, int64_t first_pixel, int64_t hidden, T* out) {
  using C = Compute<T>;
  constexpr int kLanesEach = kVectorLanes<C>;
  constexpr int kWidth = kVectors * kLanesEach;
  UNROLL
  for (int v = 0; v < kVectors; ++v) {
    const Vec<C> scale = load<C>(in.scale + channel + v * kLanesEach);
    const Vec<C> shift = load<C>(in.shift + channel + v * kLanesEach);
    if (!gates) {
      for (int64_t p = 0; p < pixels; ++p) {
        const Vec<C> x = load_values<T>(source + p * kWidth + v * kLanesEach);
        store_values<T>(out + p * kWidth + v * kLanesEach, activate<kActivation, C>(x * scale + shift));
      }
      continue;
    }
    int64_t image = first_pixel / in.image_pixels, left = in.image_pixels - first_pixel % in.image_pixels;
    for (int64_t p = 0; p < pixels;) {
      const Vec<C> gate = load<C>(gates + image * hidden + channel + v * kLanesEach);
      const int64_t stop = std::min(pixels, p + left);
      for (; p < stop; ++p) {
        const Vec<C> x = load_values<T>(source + p * kWidth + v * kLanesEach);
        store_values<T>(out + p * kWidth + v * kLanesEach,
                        activate<kActivation, C>(x * scale + shift) * gate);
      }
      ++image;
      left = in.image_pixels;
    }
  }
}

template <typename T>
void project(const ProjectInput<T>& in, const PointwiseOutput<T>& out, int64_t slab, int64_t first_block,
             int64_t last_block) {
  using C = Compute<T>;
  const int64_t hidden = row_channels<T>(out.depth);
  const int64_t first_image = slab * in.slab_images;
  const int64_t slab_pixels = std::min(in.slab_images, in.images - first_image) * in.image_pixels;
  const int64_t blocks_per_slab = ceil_div(in.slab_images * in.image_pixels, kBlockPixels);
  const T* source = in.depthwise + (slab - in.first_slab) * in.slab_images * in.image_pixels * hidden;
  const C* gates = in.gates ? in.gates + first_image * hidden : nullptr;
  const auto fill = [&](Panel<T>& panel, int64_t pixel, int64_t pixels) __attribute__((always_inline)) {
    panel.source = source;
    panel.source_pixels = slab_pixels;
    panel.next_pixel = pixel + kPanelPixels<T>;
    for (int64_t channel = 0; channel < hidden; channel += kGroupWidth<C>) {
      const int64_t width = std::min<int64_t>(kGroupWidth<C>, hidden - channel);
      const T* group = source + channel * slab_pixels + pixel * width;
      T* target = panel.group(channel);
      if (kHasNarrowGroup<C> && width < kGroupWidth<C>) {
        GREEDYNAS_WITH_ACTIVATION(
            in.activation,
            (normalise_pixels<T, 1, kActivation>(in, group, channel, pixels, gates, pixel, hidden, target)))
      } else {
        GREEDYNAS_WITH_ACTIVATION(
            in.activation,
            (normalise_pixels<T, 2, kActivation>(in, group, channel, pixels, gates, pixel, hidden, target)))
      }
    }
  };
  pointwise_blocks<T>(out, first_image * in.image_pixels, slab_pixels, first_block, last_block,
                      slab * blocks_per_slab, fill);
}

template <typename T>
void strided(const StridedInput<T>& in, const PointwiseOutput<T>& out, int64_t first_block,
             int64_t last_block) {
  using C = Compute<T>;
  const int64_t out_height = ceil_div(in.height, in.stride), out_width = ceil_div(in.width, in.stride);
  const int64_t stride = row_channels<T>(in.channels);
  const auto fill = [&](const Panel<T>& panel, int64_t pixel, int64_t pixels) __attribute__((always_inline)) {
    for (int64_t p = 0; p < pixels; ++p) {
      const int64_t x = (pixel + p) % out_width, row = (pixel + p) / out_width;
      const int64_t image = row / out_height, y = row % out_height;
      const T* source = in.input + ((image * in.height + y * in.stride) * in.width + x * in.stride) * stride;
      for (int64_t channel = 0; channel < stride; channel += kGroupWidth<C>) {
        const int64_t width = std::min<int64_t>(kGroupWidth<C>, stride - channel);
        std::copy_n(source + channel, width, panel.group(channel) + p * width);
      }
    }
  };
  pointwise_blocks<T>(out, 0, in.images * out_height * out_width, first_block, last_block, 0, fill);
}

// `count` values that are `step` elements apart, side by side.
template <typename T>
INLINE void copy_run(const Compute<T>* from, int64_t step, T* to, int64_t count) {
  using C = Compute<T>;
  int64_t i = 0;
  if (step == 1) {
    for (; i + kVectorLanes<C> <= count; i += kVectorLanes<C>) store_values<T>(to + i, load<C>(from + i));
  }
  for (; i < count; ++i) to[i] = from_compute<T>(from[i * step]);
}

template <typename T>
void patches(const PatchInput<T>& in, const PointwiseOutput<T>& out, int64_t first_block,
             int64_t last_block) {
  using C = Compute<T>;
  const int64_t out_height = ceil_div(in.height, in.stride), out_width = ceil_div(in.width, in.stride);
  const int64_t depth_stride = row_channels<T>(out.depth), padding = in.kernel / 2;
  const bool by_taps = takes_tap_by_tap(in.channels);
  const auto fill = [&](const Panel<T>& panel, int64_t pixel, int64_t pixels) __attribute__((always_inline)) {
    std::fill_n(panel.values, depth_stride * kPanelPixels<T>, T{});
    for (int64_t p = 0; p < pixels; ++p) {
      const int64_t x = (pixel + p) % out_width, row = (pixel + p) / out_width;
      const int64_t image = row / out_height, y = row % out_height;
      const C* source = in.input + image * in.strides[0];
      for (int64_t i = 0; i < in.kernel; ++i) {
        const int64_t in_y = y * in.stride - padding + i;
        for (int64_t j = 0; j < in.kernel; ++j) {
          const int64_t in_x = x * in.stride - padding + j;
          if (in_y < 0 || in_y >= in.height || in_x < 0 || in_x >= in.width) continue;
          const C* from = source + in_y * in.strides[2] + in_x * in.strides[3];
          const int64_t tap = i * in.kernel + j;
          for (int64_t c = 0; c < in.channels;) {
            const int64_t k = by_taps ? tap * in.channels + c : c * in.kernel * in.kernel + tap;
            const int64_t group = k / kGroupWidth<C> * kGroupWidth<C>;
            const int64_t width = std::min<int64_t>(kGroupWidth<C>, depth_stride - group);
            const int64_t count = by_taps ? std::min(group + width - k, in.channels - c) : 1;
            copy_run<T>(from + c * in.strides[1], in.strides[1], panel.group(group) + p * width + k - group,
                        count);
            c += count;
          }
        }
      }
    }
  };
  pointwise_blocks<T>(out, 0, in.images * out_height * out_width, first_block, last_block, 0, fill);
}
