// The products of a panel of inputs and a group of output channels. A panel holds kPanelPixels, ready to be
// multiplied, and stays in the cache: [group of input channels][pixel][channel of the group].

template <typename T>
struct Panel {
  T* values;
  // What panels are made from, laid out likewise with source_pixels pixels for each group; or null. From
  // next_pixel on it is fetched while this panel is multiplied.
  const T* source = nullptr;
  int64_t source_pixels = 0, next_pixel = 0;

  // Of an input channel group that begins at `channel`.
  T* group(int64_t channel) const { return values + channel * kPanelPixels<T>; }
};

template <typename T>
struct PanelProduct {
  const PointwiseOutput<T>& out;
  const Panel<T>& panel;
  int64_t depth_stride;  // padded depth of the panel
  int64_t channel;
  int64_t first_pixel;  // of the panel in the output
  int64_t pixels;
  Compute<T>* sums;  // [pilot, sum, squares][row_channels(channels)] or null
  bool sets_pilot;
};

template <typename T, int kVectors>
struct MultiplyPanel : PanelProduct<T> {
  using C = Compute<T>;
  static constexpr int kLanesEach = kVectorLanes<C>;
  static constexpr int kWidth = kVectors * kLanesEach;
  using PanelProduct<T>::out, PanelProduct<T>::panel, PanelProduct<T>::depth_stride, PanelProduct<T>::channel,
      PanelProduct<T>::first_pixel, PanelProduct<T>::pixels, PanelProduct<T>::sums,
      PanelProduct<T>::sets_pilot;

  void run() const {
    for (int64_t p = 0; p < pixels; p += kTileRows) {
      if (pixels - p >= kTileRows) {
        tile<true>(p, kTileRows);
      } else {
        tile<false>(p, pixels - p);
      }
    }
  }

 private:
  template <bool kFull>
  INLINE void tile(int64_t p, int64_t rows) const {
    Vec<C> acc[kTileRows][kVectors];
    clear(acc);
    const int64_t depth = packed_depth<T>(out.depth);
    const T* weight = out.weight + channel * depth;
    for (int64_t k = 0; k < depth; k += kGroupWidth<C>) {
      const int64_t width = std::min<int64_t>(kGroupWidth<C>, depth_stride - k);
      if (panel.source && channel == 0) {
        const T* pixels_ahead = panel.source + k * panel.source_pixels + (panel.next_pixel + p) * width;
        const char* next = reinterpret_cast<const char*>(pixels_ahead);
        for (int64_t line = 0; line < kTileRows * width * int64_t{sizeof(T)}; line += 64) {
          __builtin_prefetch(next + line, 0, 2);
        }
      }
      multiply_rows<kTileRows, kVectors>(acc, panel.group(k) + p * width, width, std::min(width, depth - k),
                                         weight + k * kWidth);
    }
    const int64_t stride = row_channels<T>(out.channels);
    T* output = out.output + (first_pixel + p) * stride + channel;
    if (sums) {
      store_raw<kFull>(acc, output, stride, p, rows);
    } else {
      GREEDYNAS_WITH_ACTIVATION(out.activation,
                                (store_mapped<kFull, kActivation>(acc, output, stride, p, rows)))
    }
  }

  template <bool kFull>
  INLINE void store_raw(Vec<C> (&acc)[kTileRows][kVectors], T* output, int64_t stride, int64_t p,
                        int64_t rows) const {
    C* part = sums + channel;
    UNROLL
    for (int v = 0; v < kVectors; ++v) {
      Vec<C> pilot = load<C>(part + v * kLanesEach);
      if (sets_pilot && p == 0) store<C>(part + v * kLanesEach, pilot = acc[0][v]);
      Vec<C> sum = load<C>(part + stride + v * kLanesEach),
             squares = load<C>(part + 2 * stride + v * kLanesEach);
      UNROLL
      for (int r = 0; r < kTileRows; ++r) {
        if (!kFull && r >= rows) break;
        store_values<T>(output + r * stride + v * kLanesEach, acc[r][v]);
        const Vec<C> distance = acc[r][v] - pilot;
        sum += distance;
        squares += distance * distance;
      }
      store<C>(part + stride + v * kLanesEach, sum);
      store<C>(part + 2 * stride + v * kLanesEach, squares);
    }
  }

  template <bool kFull, Activation kActivation>
  INLINE void store_mapped(Vec<C> (&acc)[kTileRows][kVectors], T* output, int64_t stride, int64_t p,
                           int64_t rows) const {
    const T* residual = out.residual ? out.residual + (first_pixel + p) * stride + channel : nullptr;
    UNROLL
    for (int v = 0; v < kVectors; ++v) {
      const Vec<C> scale = load<C>(out.scale + channel + v * kLanesEach);
      const Vec<C> shift = load<C>(out.shift + channel + v * kLanesEach);
      UNROLL
      for (int r = 0; r < kTileRows; ++r) {
        if (!kFull && r >= rows) break;
        Vec<C> x = activate<kActivation, C>(acc[r][v] * scale + shift);
        if (residual) x += load_values<T>(residual + r * stride + v * kLanesEach);
        store_values<T>(output + r * stride + v * kLanesEach, x);
      }
    }
  }
};

template <typename T>
void multiply_panel(const PanelProduct<T>& product) {
  using C = Compute<T>;
  if (kHasNarrowGroup<C> && row_channels<T>(product.out.channels) - product.channel < kGroupWidth<C>) {
    MultiplyPanel<T, 1>{product}.run();
  } else {
    MultiplyPanel<T, 2>{product}.run();
  }
}
