// project by matrix tiles: see ../project.h. The inputs of the next panel are fetched and normalised between
// the products of this one: the former waits for memory, the latter for the tiles.

class ProjectTiles {
  using T = TiledBFloat16;
  static constexpr int64_t kPixels = kPanelPixels<T>;
  static_assert(kPixels == kTilePixels && kBlockPixels % kPixels == 0);

 public:
  ProjectTiles(const ProjectInput<T>& in, const PointwiseOutput<T>& out, int64_t slab)
      : in_(in),
        out_(out),
        hidden_(row_channels<T>(out.depth)),
        stride_(row_channels<T>(out.channels)),
        first_image_(slab * in.slab_images),
        pixels_(std::min(in.slab_images, in.images - first_image_) * in.image_pixels),
        first_unit_(slab * ceil_div(in.slab_images * in.image_pixels, kBlockPixels)),
        source_(in.depthwise + (slab - in.first_slab) * in.slab_images * in.image_pixels * hidden_),
        gates_(in.gates ? in.gates + first_image_ * hidden_ : nullptr) {
    GREEDYNAS_WITH_ACTIVATION(in.activation, normalise_ = &normalise_tiles<kActivation>)
  }

  void run(int64_t first_block, int64_t last_block) {
    thread_local Scratch<T> panel_memory;
    thread_local Scratch<float> sums_memory;
    T* memory = panel_memory.get(2 * hidden_ * kPixels);
    Panel<T> panels[2] = {{memory}, {memory + hidden_ * kPixels}};
    float* sums = out_.partials ? sums_memory.get(3 * stride_) : nullptr;
    const int64_t begin = first_block * kBlockPixels, end = std::min(last_block * kBlockPixels, pixels_);
    for (int64_t group = 0; group < hidden_ / 32; ++group) fill(panels[0], begin, group);
    for (int64_t pixel = begin; pixel < end; pixel += kPixels) {
      const bool starts = pixel % kBlockPixels == 0;
      if (sums && starts) std::fill_n(sums, 3 * stride_, 0.f);
      const int64_t next = pixel + kPixels < end ? pixel + kPixels : -1;
      multiply(panels[0], pixel, sums, starts, panels[1], next);
      std::swap(panels[0], panels[1]);
      if (sums && (next < 0 || next % kBlockPixels == 0)) {
        double* partial = out_.partials + (first_unit_ + pixel / kBlockPixels) * 3 * stride_;
        for (int64_t c = 0; c < 3 * stride_; ++c) partial[c] = static_cast<double>(sums[c]);
      }
    }
  }

 private:
  INLINE void fill(const Panel<T>& panel, int64_t pixel, int64_t group) const {
    const int64_t channel = group * 32;
    normalise_(in_, source_ + channel * pixels_ + pixel * 32, channel, std::min(kPixels, pixels_ - pixel),
               gates_, pixel, hidden_, panel.group(channel));
  }

  // This panel's products with all output channels; meanwhile the next one, at pixel `next` unless that is
  // -1, is filled.
  INLINE void multiply(const Panel<T>& panel, int64_t pixel, float* sums, bool starts,
                       const Panel<T>& next_panel, int64_t next) const {
    const int64_t out_groups = stride_ / 32;
    int64_t step = 0;
    for (int64_t channel = 0; channel < stride_; channel += 32) {
      const PanelProduct<T> product{out_,
                                    panel,
                                    hidden_,
                                    channel,
                                    first_image_ * in_.image_pixels + pixel,
                                    std::min(kPixels, pixels_ - pixel),
                                    sums,
                                    starts};
      MultiplyTiles{product}.run([&](int64_t) __attribute__((always_inline)) {
        if (next >= 0 && step % out_groups == 0) fill(next_panel, next, step / out_groups);
        ++step;
      });
    }
  }

  const ProjectInput<T>& in_;
  const PointwiseOutput<T>& out_;
  int64_t hidden_, stride_, first_image_, pixels_, first_unit_;
  const T* source_;
  const float* gates_;
  void (*normalise_)(const ProjectInput<T>&, const T*, int64_t, int64_t, const float*, int64_t, int64_t, T*);
};

inline void project_tiles(const ProjectInput<TiledBFloat16>& in, const PointwiseOutput<TiledBFloat16>& out,
                          int64_t slab, int64_t first_block, int64_t last_block) {
  if (first_block >= last_block) return;
  const Tiles tiles;
  ProjectTiles(in, out, slab).run(first_block, last_block);
}
