// head_pool by matrix tiles: see ../head.h.

// Adds rows of activated products to the sums of the images that they belong to.
template <Activation kActivation>
class PoolRows {
 public:
  PoolRows(const HeadPool<TiledBFloat16>& head, int64_t first_image, int64_t channel)
      : pixels_(head.image_pixels),
        stride_(row_channels<TiledBFloat16>(head.channels)),
        output_(head.output + first_image * stride_ + channel),
        left_(head.image_pixels) {
    for (int v = 0; v < 2; ++v) {
      scale_[v] = load<float>(head.scale + channel + v * 16);
      shift_[v] = load<float>(head.shift + channel + v * 16);
    }
  }

  INLINE void add(const float* products, int64_t rows) {
    for (int64_t r = 0; r < rows;) {
      const int64_t run = std::min(rows - r, left_);
      for (int64_t i = r; i < r + run; ++i) {
        for (int v = 0; v < 2; ++v)
          sum_[v] +=
              activate<kActivation, float>(load<float>(products + i * 32 + v * 16) * scale_[v] + shift_[v]);
      }
      r += run;
      left_ -= run;
      flush();
      if (left_ == 0) finish_image();
    }
  }

 private:
  // A tile's rows are added up in float.
  INLINE void flush() {
    alignas(64) float sums[32];
    for (int v = 0; v < 2; ++v) {
      store<float>(sums + v * 16, sum_[v]);
      sum_[v] = Vec<float>{};
    }
    for (int c = 0; c < 32; ++c) totals_[c] += static_cast<double>(sums[c]);
  }

  INLINE void finish_image() {
    for (int c = 0; c < 32; ++c) {
      output_[c] = static_cast<float>(totals_[c] / static_cast<double>(pixels_));
      totals_[c] = 0;
    }
    output_ += stride_;
    left_ = pixels_;
  }

  int64_t pixels_, stride_;
  float* output_;
  int64_t left_;  // pixels of the present image
  Vec<float> scale_[2], shift_[2], sum_[2] = {};
  alignas(64) double totals_[32] = {};
};

template <Activation kActivation>
void pool_tiles(const HeadPool<TiledBFloat16>& h, int64_t slab, int64_t channel) {
  const int64_t stride = row_channels<TiledBFloat16>(h.in_channels), first_image = slab * h.slab_images;
  const int64_t pixels = std::min(h.slab_images, h.images - first_image) * h.image_pixels;
  const TiledBFloat16* input = h.input + first_image * h.image_pixels * stride;
  PoolRows<kActivation> pool(h, first_image, channel);
  for (int64_t p = 0; p < pixels; p += kTilePixels) {
    alignas(64) float products[kTilePixels * 32];
    multiply_pixels(input + p * stride, stride, stride, h.weight + channel * stride, products);
    pool.add(products, std::min(kTilePixels, pixels - p));
  }
}

inline void head_pool_tiles(const HeadPool<TiledBFloat16>& h, int64_t first_unit, int64_t last_unit) {
  const Tiles tiles;
  const int64_t groups = row_channels<TiledBFloat16>(h.channels) / 32;
  for (int64_t unit = first_unit; unit < last_unit; ++unit)
    GREEDYNAS_WITH_ACTIVATION(h.activation, (pool_tiles<kActivation>(h, unit / groups, unit % groups * 32)))
}
