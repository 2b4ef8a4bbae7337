// head_pool: pointwise convolution -> affine -> activation -> mean over the image, the map never stored; and
// linear, the classifier.

template <typename C>
INLINE Vec<C> activate_linear(Vec<C> x, int64_t activation) {
  switch (activation) {
    case kLinearRelu:
      return positive<C>(x);
    case kLinearHsigmoid:
      return at_most_six<C>(positive<C>(x + C(3))) * C(1.0 / 6.0);
    case kLinearSigmoid:
      return C(1) / (C(1) + exponential<C>(-x));
    default:
      return x;
  }
}

template <typename C, int kVectors>
void linear_group(const Linear<C>& l, int64_t channel) {
  constexpr int kLanesEach = kVectorLanes<C>;
  constexpr int kWidth = kVectors * kLanesEach;
  constexpr int kRows = kTileRows / 2;
  const C* weight = l.weight + channel * l.depth;
  const int64_t written = l.padded_output ? padded(l.channels) : l.channels;
  const int64_t width = std::min<int64_t>(kWidth, written - channel);
  for (int64_t row = 0; row < l.rows;) {
    Vec<C> acc[kRows][kVectors];
    clear(acc);
    const int64_t rows = l.rows - row >= kRows ? kRows : 1;
    const C* in = l.input + row * l.in_stride;
    if (rows == kRows) {
      multiply_rows<kRows, kVectors>(acc, in, l.in_stride, l.depth, weight);
    } else {
      Vec<C> one[1][kVectors];
      clear(one);
      multiply_rows<1, kVectors>(one, in, l.in_stride, l.depth, weight);
      UNROLL
      for (int v = 0; v < kVectors; ++v) acc[0][v] = one[0][v];
    }
    for (int64_t r = 0; r < rows; ++r) {
      C values[kWidth];
      for (int v = 0; v < kVectors; ++v) {
        Vec<C> x = acc[r][v];
        if (l.bias) x += load<C>(l.bias + channel + v * kLanesEach);
        store<C>(values + v * kLanesEach, activate_linear<C>(x, l.activation));
      }
      std::copy_n(values, width, l.output + (row + r) * l.out_stride + channel);
    }
    row += rows;
  }
}

template <typename C>
void linear(const Linear<C>& l, int64_t first_group, int64_t last_group) {
  for (int64_t group = first_group; group < last_group; ++group) {
    const int64_t channel = group * kGroupWidth<C>;
    if (kHasNarrowGroup<C> && padded(l.channels) - channel < kGroupWidth<C>) {
      linear_group<C, 1>(l, channel);
    } else {
      linear_group<C, 2>(l, channel);
    }
  }
}

template <typename T, int kVectors, Activation kActivation>
void pool_group(const HeadPool<T>& h, int64_t slab, int64_t channel) {
  using C = Compute<T>;
  constexpr int kLanesEach = kVectorLanes<C>;
  constexpr int kWidth = kVectors * kLanesEach;
  const int64_t stride = row_channels<T>(h.in_channels), depth = packed_depth<T>(h.in_channels);
  const int64_t first_image = slab * h.slab_images;
  const int64_t images = std::min(h.slab_images, h.images - first_image);
  const int64_t pixels = images * h.image_pixels;
  const T* input = h.input + first_image * h.image_pixels * stride;
  const T* weight = h.weight + channel * depth;
  C* output = h.output + first_image * row_channels<T>(h.channels) + channel;
  Vec<C> scale[kVectors], shift[kVectors], sum[kVectors];
  double totals[kWidth] = {};
  UNROLL
  for (int v = 0; v < kVectors; ++v) {
    scale[v] = load<C>(h.scale + channel + v * kLanesEach);
    shift[v] = load<C>(h.shift + channel + v * kLanesEach);
    sum[v] = Vec<C>{};
  }
  int64_t image = 0, left = h.image_pixels;
  for (int64_t p = 0; p < pixels; p += kTileRows) {
    Vec<C> acc[kTileRows][kVectors];
    clear(acc);
    multiply_rows<kTileRows, kVectors>(acc, input + p * stride, stride, depth, weight);
    C values[kTileRows][kWidth];
    UNROLL
    for (int r = 0; r < kTileRows; ++r) {
      UNROLL
      for (int v = 0; v < kVectors; ++v) {
        store<C>(values[r] + v * kLanesEach, activate<kActivation, C>(acc[r][v] * scale[v] + shift[v]));
      }
    }
    const int64_t rows = std::min<int64_t>(kTileRows, pixels - p);
    for (int64_t r = 0; r < rows;) {
      const int64_t run = std::min(rows - r, left);
      for (int64_t i = 0; i < run; ++i) {
        UNROLL
        for (int v = 0; v < kVectors; ++v) sum[v] += load<C>(values[r + i] + v * kLanesEach);
      }
      r += run;
      left -= run;
      if (left > 0 && r < rows) continue;
      for (int v = 0; v < kVectors; ++v) {
        for (int lane = 0; lane < kLanesEach; ++lane)
          totals[v * kLanesEach + lane] += static_cast<double>(sum[v][lane]);
        sum[v] = Vec<C>{};
      }
      if (left > 0) continue;
      for (int c = 0; c < kWidth; ++c) {
        output[image * row_channels<T>(h.channels) + c] =
            static_cast<C>(totals[c] / static_cast<double>(h.image_pixels));
        totals[c] = 0;
      }
      ++image;
      left = h.image_pixels;
    }
  }
}

template <typename T>
void head_pool(const HeadPool<T>& h, int64_t first_unit, int64_t last_unit) {
  using C = Compute<T>;
  const int64_t channels = row_channels<T>(h.channels), groups = ceil_div(channels, kGroupWidth<C>);
  for (int64_t unit = first_unit; unit < last_unit; ++unit) {
    const int64_t slab = unit / groups, channel = unit % groups * kGroupWidth<C>;
    if (kHasNarrowGroup<C> && channels - channel < kGroupWidth<C>) {
      GREEDYNAS_WITH_ACTIVATION(h.activation, (pool_group<T, 1, kActivation>(h, slab, channel)))
    } else {
      GREEDYNAS_WITH_ACTIVATION(h.activation, (pool_group<T, 2, kActivation>(h, slab, channel)))
    }
  }
}
