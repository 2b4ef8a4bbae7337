// expand_depthwise: the expanded map never reaches memory. For each slab and group of hidden channels the
// expanded, normalised and activated rows pass through a ring of a few rows, which stays in the cache, and
// the depthwise convolution reads them from there.
//
// The pixels of a slab are expanded one after the other in tiles of kTileRows, whatever their image and row;
// a row of the slab lies in the ring at its number modulo ring_rows. Columns of padding stay zero.

template <typename T>
struct Ring {
  using C = Compute<T>;
  C* rows;           // [ring_rows][row_width][channels of the group]
  int32_t* offsets;  // [ring_pixels + kTileRows]: where a pixel's channels begin, in channels of the group
  int64_t ring_rows, row_width, ring_pixels;
};

template <typename T>
struct FillRing {
  using C = Compute<T>;
  const T* input;  // first row of the tile
  int64_t in_stride, depth;
  const T* weight;  // or null: the group's channels of the input itself
  const C *scale, *shift;
  C* ring;
  const int32_t* offsets;
  int64_t count;  // rows of the tile that are stored
};

template <typename T, int kVectors, Activation kActivation>
void expand_tile(const FillRing<T>& f) {
  using C = Compute<T>;
  constexpr int kLanesEach = kVectorLanes<C>;
  Vec<C> sums[kTileRows][kVectors];
  clear(sums);
  multiply_rows<kTileRows, kVectors>(sums, f.input, f.in_stride, f.depth, f.weight);
  Vec<C> scale[kVectors], shift[kVectors];
  UNROLL
  for (int v = 0; v < kVectors; ++v) {
    scale[v] = load<C>(f.scale + v * kLanesEach);
    shift[v] = load<C>(f.shift + v * kLanesEach);
  }
  UNROLL
  for (int r = 0; r < kTileRows; ++r) {
    if (r >= f.count) break;
    C* out = f.ring + static_cast<int64_t>(f.offsets[r]) * (kVectors * kLanesEach);
    UNROLL
    for (int v = 0; v < kVectors; ++v) {
      store<C>(out + v * kLanesEach, activate<kActivation, C>(sums[r][v] * scale[v] + shift[v]));
    }
  }
}

template <typename T, int kVectors, Activation kActivation>
void copy_tile(const FillRing<T>& f) {
  using C = Compute<T>;
  constexpr int kLanesEach = kVectorLanes<C>;
  for (int64_t r = 0; r < f.count; ++r) {
    C* out = f.ring + static_cast<int64_t>(f.offsets[r]) * (kVectors * kLanesEach);
    UNROLL
    for (int v = 0; v < kVectors; ++v) {
      Vec<C> x = load_values<T>(f.input + r * f.in_stride + v * kLanesEach);
      if (f.scale) {
        x = activate<kActivation, C>(x * load<C>(f.scale + v * kLanesEach) +
                                     load<C>(f.shift + v * kLanesEach));
      }
      store<C>(out + v * kLanesEach, x);
    }
  }
}

template <typename T, int kVectors>
auto choose_fill(bool expands, int64_t activation) {
  using Fill = void (*)(const FillRing<T>&);
  Fill fill = nullptr;
  GREEDYNAS_WITH_ACTIVATION(activation, fill = expands
                                                   ? static_cast<Fill>(&expand_tile<T, kVectors, kActivation>)
                                                   : static_cast<Fill>(&copy_tile<T, kVectors, kActivation>))
  return fill;
}

template <typename T>
class ExpandDepthwiseRun {
  using C = Compute<T>;

 public:
  explicit ExpandDepthwiseRun(const ExpandDepthwise<T>& arguments)
      : a_(arguments),
        out_height_(ceil_div(a_.height, a_.stride)),
        out_width_(ceil_div(a_.width, a_.stride)),
        hidden_(row_channels<T>(a_.hidden_channels)),
        wide_(choose_fill<T, 2>(a_.expand_weight, a_.activation)),
        wide_row_(choose_row<T, 2>(a_.kernel, a_.stride, out_width_)) {
    if constexpr (kHasNarrowGroup<C>) narrow_ = choose_fill<T, 1>(a_.expand_weight, a_.activation);
    if constexpr (kHasNarrowGroup<C>) narrow_row_ = choose_row<T, 1>(a_.kernel, a_.stride, out_width_);
    const int64_t padding = a_.kernel / 2;
    ring_.ring_rows = a_.kernel + ceil_div(kTileRows - 1, a_.width) + 1;
    const int64_t columns = ceil_div(out_width_, wide_row_.columns) * wide_row_.columns;
    ring_.row_width = std::max(a_.width + 2 * padding, (columns - 1) * a_.stride + a_.kernel);
    ring_.ring_pixels = ring_.ring_rows * a_.width;
    thread_local Scratch<C> rows;
    thread_local Scratch<int32_t> offsets;
    thread_local Scratch<T> half_lines;
    thread_local Scratch<const C*> kernel_rows;
    kernel_rows_ = kernel_rows.get(a_.kernel);
    half_lines_ = half_lines.get(out_width_ * kVectorLanes<C>);
    ring_.rows = rows.get(ring_.ring_rows * ring_.row_width * kGroupWidth<C>);
    ring_.offsets = offsets.get(ring_.ring_pixels + kTileRows);
    for (int64_t p = 0; p < ring_.ring_pixels + kTileRows; ++p) {
      const int64_t row = p / a_.width % ring_.ring_rows;
      ring_.offsets[p] = static_cast<int32_t>(row * ring_.row_width + p % a_.width + padding);
    }
  }

  void run(int64_t first_unit, int64_t last_unit) {
    const int64_t groups = ceil_div(hidden_, kGroupWidth<C>);
    int64_t clean_width = 0;
    for (int64_t unit = first_unit; unit < last_unit; ++unit) {
      const int64_t group = unit % groups;
      const int64_t width = std::min<int64_t>(kGroupWidth<C>, hidden_ - group * kGroupWidth<C>);
      if (width != clean_width) {
        std::fill_n(ring_.rows, ring_.ring_rows * ring_.row_width * width, C(0));
        clean_width = width;
      }
      one_group(unit / groups, group * kGroupWidth<C>, width);
    }
#if GREEDYNAS_LEVEL >= GREEDYNAS_AVX512
    if (a_.streams) _mm_sfence();
#endif
  }

 private:
  void one_group(int64_t slab, int64_t channel, int64_t width) {
    const int64_t first_image = slab * a_.slab_images;
    const int64_t images = std::min(a_.slab_images, a_.images - first_image);
    const int64_t image_pixels = a_.height * a_.width, out_pixels = out_height_ * out_width_;
    const int64_t pixels = images * image_pixels;
    const int64_t in_stride = row_channels<T>(a_.in_channels);
    const bool wide = width == kGroupWidth<C>;
    const auto fill = wide ? wide_ : narrow_;
    const RowKernel<T> row_kernel = wide ? wide_row_ : narrow_row_;
    const T* input = a_.input + first_image * image_pixels * in_stride;
    FillRing<T> tile{};
    tile.in_stride = in_stride;
    tile.depth = packed_depth<T>(a_.in_channels);
    tile.weight = a_.expand_weight ? a_.expand_weight + channel * tile.depth : nullptr;
    tile.scale = a_.scale ? a_.scale + channel : nullptr;
    tile.shift = a_.scale ? a_.shift + channel : nullptr;
    tile.ring = ring_.rows;
    const int64_t in_channel = a_.expand_weight ? 0 : channel;

    DepthwiseRow<T> row{};
    C sums[3 * kGroupWidth<C>] = {};
    double totals[2][kGroupWidth<C>] = {};
    row.weight = a_.depthwise + channel * a_.kernel * a_.kernel;
    row.columns = out_width_;
    row.sums = a_.partials ? sums : nullptr;
    row.half_lines = half_lines_;
    row.rows = kernel_rows_;
    row.kernel = a_.kernel;
    row.stride = a_.stride;
    // A slab of the output: the groups before this one are full.
    T* output = a_.output + (first_image - a_.first_slab * a_.slab_images) * out_pixels * hidden_ +
                channel * images * out_pixels;
    // In BFloat16 a slab can begin in the middle of a cache line: its channels are a multiple of half of one.
    row.streams = a_.streams && reinterpret_cast<uintptr_t>(output) % 64 == 0;

    const int64_t padding = a_.kernel / 2;
    int64_t done = 0, phase = 0, pending = 0;  // pixels expanded; the same modulo the ring; pixels in `sums`
    for (int64_t image = 0; image < images; ++image) {
      for (int64_t y = 0; y < out_height_; ++y) {
        const int64_t top = y * a_.stride - padding;
        const int64_t needed = (image * a_.height + std::min(a_.height, top + a_.kernel)) * a_.width;
        while (done < needed) {
          tile.input = input + done * in_stride + in_channel;
          tile.offsets = ring_.offsets + phase;
          tile.count = std::min<int64_t>(kTileRows, pixels - done);
          fill(tile);
          done += kTileRows;
          phase += kTileRows;
          if (phase >= ring_.ring_pixels) phase -= ring_.ring_pixels;
        }
        row.first_row = std::max<int64_t>(0, -top);
        row.last_row = std::min(a_.kernel, a_.height - top);
        for (int64_t k = row.first_row; k < row.last_row; ++k) {
          kernel_rows_[k] =
              ring_.rows + (image * a_.height + top + k) % ring_.ring_rows * ring_.row_width * width;
        }
        row.output = output + (image * out_height_ + y) * out_width_ * width;
        row.sets_pilot = image == 0 && y == 0;
        row_kernel.run(row);
        pending += out_width_;
        if (pending >= 64) {
          flush(sums, totals, width);
          pending = 0;
        }
      }
    }
    if (!a_.partials) return;
    flush(sums, totals, width);
    double* partial = a_.partials + slab * 3 * hidden_ + channel;
    for (int64_t c = 0; c < width; ++c) {
      partial[c] = static_cast<double>(sums[c]);
      partial[hidden_ + c] = totals[0][c];
      partial[2 * hidden_ + c] = totals[1][c];
    }
  }

  static void flush(C* sums, double (&totals)[2][kGroupWidth<C>], int64_t width) {
    for (int64_t part = 0; part < 2; ++part) {
      for (int64_t c = 0; c < width; ++c) {
        totals[part][c] += static_cast<double>(sums[(part + 1) * width + c]);
        sums[(part + 1) * width + c] = C(0);
      }
    }
  }

  const ExpandDepthwise<T>& a_;
  int64_t out_height_, out_width_, hidden_;
  void (*wide_)(const FillRing<T>&);
  void (*narrow_)(const FillRing<T>&) = nullptr;
  RowKernel<T> wide_row_, narrow_row_{};
  Ring<T> ring_{};
  T* half_lines_;
  const C** kernel_rows_;
};

template <typename T>
void expand_depthwise(const ExpandDepthwise<T>& arguments, int64_t first_unit, int64_t last_unit) {
  ExpandDepthwiseRun<T>(arguments).run(first_unit, last_unit);
}
