// The products of one panel (../project.h) and a group of 32 output channels by matrix tiles.

struct MultiplyTiles : PanelProduct<TiledBFloat16> {
  static constexpr int kWidth = 32;
  using T = TiledBFloat16;

  // Calls between(step) after each tile's depth of each 32 pixels.
  template <typename Between>
  INLINE void run(const Between& between) const {
    for (int64_t p = 0; p < pixels; p += kTilePixels) {
      alignas(64) float products[kTilePixels * kWidth];
      multiply(p, products, between);
      const int64_t rows = std::min(kTilePixels, pixels - p);
      const int64_t stride = row_channels<T>(out.channels);
      T* output = out.output + (first_pixel + p) * stride + channel;
      Vec<float> factor[2] = {broadcast(1.f), broadcast(1.f)};
      for (int v = 0; out.factor && v < 2; ++v) factor[v] = load<float>(out.factor + channel + v * 16);
      if (sums) {
        store_raw(products, factor, output, stride, rows, sets_pilot && p == 0);
      } else {
        GREEDYNAS_WITH_ACTIVATION(out.activation,
                                  (store_mapped<kActivation>(products, factor, output, stride, p, rows)))
      }
    }
  }

 private:
  template <typename Between>
  INLINE void multiply(int64_t p, float* products, const Between& between) const {
    const T* rows = panel.values + p * 32;
    const T* pairs = out.weight + channel * depth_stride;
    const bool wide = out.channels - channel > 16;  // else the second half of the outputs is padding, and 0
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    for (int64_t k = 0; k < depth_stride; k += kTileDepth) {
      TILE_LOAD(4, rows, 64);
      TILE_LOAD(6, pairs, 128);
      TILE_MULTIPLY(0, 4, 6);
      if (wide) {
        TILE_LOAD(7, pairs + 32, 128);
        TILE_MULTIPLY(1, 4, 7);
      }
      TILE_LOAD(5, rows + 16 * 32, 64);
      TILE_MULTIPLY(2, 5, 6);
      if (wide) TILE_MULTIPLY(3, 5, 7);
      rows += kPanelPixels<T> * 32;
      pairs += kTileDepth * 32;
      between(k / kTileDepth);
    }
    TILE_STORE(0, products, 128);
    TILE_STORE(1, products + 16, 128);
    TILE_STORE(2, products + 16 * 32, 128);
    TILE_STORE(3, products + 16 * 32 + 16, 128);
  }

  INLINE void store_raw(const float* products, const Vec<float> (&factor)[2], T* output, int64_t stride,
                        int64_t rows, bool first) const {
    float* part = sums + channel;
    Vec<float> pilot[2], sum[2], squares[2];
    for (int v = 0; v < 2; ++v) {
      if (first) store<float>(part + v * 16, load<float>(products + v * 16) * factor[v]);
      pilot[v] = load<float>(part + v * 16);
      sum[v] = load<float>(part + stride + v * 16);
      squares[v] = load<float>(part + 2 * stride + v * 16);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const Vec<float> low = load<float>(products + r * kWidth) * factor[0];
      const Vec<float> high = load<float>(products + r * kWidth + 16) * factor[1];
      store_bfloat16(output + r * stride, low, high);
      const Vec<float> d0 = low - pilot[0], d1 = high - pilot[1];
      sum[0] += d0;
      sum[1] += d1;
      squares[0] += d0 * d0;
      squares[1] += d1 * d1;
    }
    for (int v = 0; v < 2; ++v) {
      store<float>(part + stride + v * 16, sum[v]);
      store<float>(part + 2 * stride + v * 16, squares[v]);
    }
  }

  template <Activation kActivation>
  INLINE void store_mapped(const float* products, const Vec<float> (&factor)[2], T* output, int64_t stride,
                           int64_t p, int64_t rows) const {
    const T* residual = out.residual ? out.residual + (first_pixel + p) * stride + channel : nullptr;
    Vec<float> scale[2], shift[2];
    for (int v = 0; v < 2; ++v) {
      scale[v] = load<float>(out.scale + channel + v * 16) * factor[v];
      shift[v] = load<float>(out.shift + channel + v * 16);
    }
    for (int64_t r = 0; r < rows; ++r) {
      Vec<float> x[2];
      for (int v = 0; v < 2; ++v) {
        x[v] =
            activate<kActivation, float>(load<float>(products + r * kWidth + v * 16) * scale[v] + shift[v]);
        if (residual) x[v] += load_values<T>(residual + r * stride + v * 16);
      }
      store_bfloat16(output + r * stride, x[0], x[1]);
    }
  }
};

template <>
inline void multiply_panel<TiledBFloat16>(const PanelProduct<TiledBFloat16>& product) {
  MultiplyTiles{product}.run([](int64_t) {});
}
