// expand_depthwise with matrix tiles and a ring of half-precision numbers: half the instructions, and half
// the cache, of float. What has no half_depthwise runs as in ../expand_depthwise.h.
//
// Measured, per pixel and group of 32 channels (56x56, 32 -> 192 channels, one core of a Xeon at about 3.7
// GHz): 22 cycles with a kernel of 3, 44 with 7. Of these 5 are the tiles' if nothing else runs, 4.5 the
// normalising, 4.5 and 24.5 the products of the depthwise convolution, 2 the statistics, the rest loads and
// stores. A third of the tiles' time hides behind the vector units. Tried and left: 32 pixels at a time in
// one set of registers (storing a tile and multiplying the next do not overlap), fetching the output ahead,
// two rows of outputs at once where rows are long.

// 32 pixels of a group: where they come from and where in the ring they go.
struct FillHalves {
  const TiledBFloat16* input;  // the map, from the slab's first pixel on
  int64_t in_stride, depth;
  const TiledBFloat16* weight;  // of the group; or null: its channels of the input itself
  Half* ring;
  const int32_t* offsets;      // of the pixels in the ring, in pixels
  const float *scale, *shift;  // of the group
  const float* factor;
};

// Constants of a group in registers. Factors are powers of two: activations that commute with them take them
// in the affine map.
template <Activation kActivation>
struct NormaliseHalves {
  static constexpr bool kCommutes = kActivation == kLinear || kActivation == kRelu || kActivation == kRelu6;
  Vec<float> scale[2], shift[2], factor[2];
  Halves six;

  INLINE explicit NormaliseHalves(const FillHalves& f) {
    for (int v = 0; v < 2; ++v) {
      factor[v] = load<float>(f.factor + v * 16);
      scale[v] = load<float>(f.scale + v * 16);
      shift[v] = load<float>(f.shift + v * 16);
      if (!kCommutes) continue;
      scale[v] *= factor[v];
      shift[v] *= factor[v];
    }
    six = to_halves(factor[0] * 6.f, factor[1] * 6.f);
  }

  INLINE Halves operator()(Vec<float> low, Vec<float> high) const {
    low = low * scale[0] + shift[0];
    high = high * scale[1] + shift[1];
    if constexpr (!kCommutes)
      return to_halves(activate<kActivation, float>(low) * factor[0],
                       activate<kActivation, float>(high) * factor[1]);
    Halves x = to_halves(low, high);
    // The second operand is what these return where one is NaN.
    if constexpr (kActivation == kRelu || kActivation == kRelu6) x = _mm512_max_ph(_mm512_setzero_ph(), x);
    if constexpr (kActivation == kRelu6) x = _mm512_min_ph(six, x);
    return x;
  }
};

// Expands pixels one after the other into the ring, in pieces of 16: while the vector units normalise a
// piece, the tiles of the next one are stored and those of the one after it multiplied, in registers of their
// own.
template <Activation kActivation>
class RingOfProducts {
  static constexpr int64_t kPiece = 16;

 public:
  RingOfProducts(const FillHalves& fill, int64_t pixels)
      : f_(fill), normalise_(fill), pixels_(pixels), stays_(fill.depth == kTileDepth) {
    if (stays_) {
      TILE_LOAD(6, f_.weight, 128);
      TILE_LOAD(7, f_.weight + 32, 128);
    }
    multiply<0>(0);
    if (kPiece < pixels_) multiply<1>(kPiece);
    store<0>();
  }

  // The next 32 pixels, those that there are, at `phase` of the ring.
  INLINE void next(int64_t phase) {
    piece<0>(phase);
    if (done_ < pixels_) piece<1>(phase + kPiece);
  }

 private:
  template <int kSet>
  INLINE void piece(int64_t phase) {
    if (done_ + 2 * kPiece < pixels_) multiply<kSet>(done_ + 2 * kPiece);
    if (done_ + kPiece < pixels_) store<1 - kSet>();
    normalise(products_[kSet], f_.offsets + phase, std::min(kPiece, pixels_ - done_));
    done_ += kPiece;
  }

  INLINE void normalise(const float* products, const int32_t* offsets, int64_t rows) const {
    const NormaliseHalves<kActivation> constants =
        normalise_;  // in registers: the stores might change a member
    Half* const ring = f_.ring;
    const auto row = [&](int64_t i) __attribute__((always_inline)) {
      const Halves x = constants(load<float>(products + i * 32), load<float>(products + i * 32 + 16));
      _mm512_store_ph(ring + static_cast<int64_t>(offsets[i]) * kHalfLanes, x);
    };
    if (rows == kPiece) {
      _Pragma("GCC unroll 4") for (int64_t i = 0; i < kPiece; ++i) row(i);
    } else {
      for (int64_t i = 0; i < rows; ++i) row(i);
    }
  }

  template <int kSet>
  INLINE void multiply(int64_t pixel) {
    const TiledBFloat16* in = f_.input + pixel * f_.in_stride;
    if constexpr (kSet == 0) {
      TILE_ZERO(0);
      TILE_ZERO(1);
    } else {
      TILE_ZERO(2);
      TILE_ZERO(3);
    }
    for (int64_t k = 0; k < f_.depth; k += kTileDepth) {
      if (!stays_) {
        TILE_LOAD(6, f_.weight + k * 32, 128);
        TILE_LOAD(7, f_.weight + k * 32 + 32, 128);
      }
      if constexpr (kSet == 0) {
        TILE_LOAD(4, in + k, f_.in_stride * 2);
        TILE_MULTIPLY(0, 4, 6);
        TILE_MULTIPLY(1, 4, 7);
      } else {
        TILE_LOAD(5, in + k, f_.in_stride * 2);
        TILE_MULTIPLY(2, 5, 6);
        TILE_MULTIPLY(3, 5, 7);
      }
    }
  }

  template <int kSet>
  INLINE void store() {
    if constexpr (kSet == 0) {
      TILE_STORE(0, products_[0], 128);
      TILE_STORE(1, products_[0] + 16, 128);
    } else {
      TILE_STORE(2, products_[1], 128);
      TILE_STORE(3, products_[1] + 16, 128);
    }
  }

  const FillHalves& f_;
  const NormaliseHalves<kActivation> normalise_;
  int64_t pixels_, done_ = 0;
  bool stays_;  // whether the weights are in registers all the time
  alignas(64) float products_[2][kPiece * 32];
};

// Likewise without an expansion: the input's own channels.
template <Activation kActivation>
class RingOfInputs {
 public:
  RingOfInputs(const FillHalves& fill, int64_t pixels) : f_(fill), normalise_(fill), pixels_(pixels) {}

  INLINE void next(int64_t phase) {
    const NormaliseHalves<kActivation> constants = normalise_;  // in registers, as above
    const FillHalves f = f_;
    const int64_t rows = std::min(kTilePixels, pixels_ - done_);
    for (int64_t i = 0; i < rows; ++i) {
      const TiledBFloat16* in = f.input + (done_ + i) * f.in_stride;
      const Halves x = constants(load_values<TiledBFloat16>(in), load_values<TiledBFloat16>(in + 16));
      _mm512_store_ph(f.ring + static_cast<int64_t>(f.offsets[phase + i]) * kHalfLanes, x);
    }
    done_ += kTilePixels;
  }

 private:
  const FillHalves& f_;
  const NormaliseHalves<kActivation> normalise_;
  int64_t pixels_, done_ = 0;
};

class HalfExpandDepthwise {
  static constexpr int64_t kWidth = kHalfLanes;   // channels of a group
  static constexpr int64_t kFlushedPixels = 512;  // that are added up in float

 public:
  explicit HalfExpandDepthwise(const ExpandDepthwise<TiledBFloat16>& arguments)
      : a_(arguments),
        out_height_(ceil_div(a_.height, a_.stride)),
        out_width_(ceil_div(a_.width, a_.stride)),
        hidden_(row_channels<TiledBFloat16>(a_.hidden_channels)),
        padding_(a_.kernel / 2),
        row_kernels_(choose_half_rows(a_.kernel, a_.stride, out_width_)) {
    // The rows that the rows of outputs see that are computed at once, and those that a tile of pixels
    // reaches into behind them.
    rows_at_once_ = row_kernels_.two ? 2 : 1;
    ring_rows_ = a_.kernel + (rows_at_once_ - 1) * a_.stride + ceil_div(kTilePixels - 1, a_.width);
    const int64_t columns = ceil_div(out_width_, row_kernels_.columns) * row_kernels_.columns;
    row_width_ = std::max(a_.width + 2 * padding_, (columns - 1) * a_.stride + a_.kernel);
    ring_pixels_ = ring_rows_ * a_.width;
    thread_local Scratch<Half> ring;
    thread_local Scratch<int32_t> offsets;
    ring_ = ring.get(ring_rows_ * row_width_ * kWidth);
    std::fill_n(ring_, ring_rows_ * row_width_ * kWidth, Half(0));
    offsets_ = offsets.get(ring_pixels_ + kTilePixels);
    for (int64_t p = 0; p < ring_pixels_ + kTilePixels; ++p)
      offsets_[p] = static_cast<int32_t>(p / a_.width % ring_rows_ * row_width_ + p % a_.width + padding_);
  }

  void run(int64_t first_unit, int64_t last_unit) {
    const int64_t groups = hidden_ / kWidth;
    for (int64_t unit = first_unit; unit < last_unit; ++unit) {
      if (a_.expand_weight) {
        GREEDYNAS_WITH_ACTIVATION(
            a_.activation, (one_group<RingOfProducts<kActivation>>(unit / groups, unit % groups * kWidth)))
      } else {
        GREEDYNAS_WITH_ACTIVATION(
            a_.activation, (one_group<RingOfInputs<kActivation>>(unit / groups, unit % groups * kWidth)))
      }
    }
    if (a_.streams) _mm_sfence();
  }

 private:
  template <typename Filler>
  void one_group(int64_t slab, int64_t channel) {
    const int64_t first_image = slab * a_.slab_images;
    const int64_t images = std::min(a_.slab_images, a_.images - first_image);
    const int64_t out_pixels = out_height_ * out_width_, taps = a_.kernel * a_.kernel;
    FillHalves fill{};
    fill.in_stride = row_channels<TiledBFloat16>(a_.in_channels);
    fill.depth = fill.in_stride;
    fill.input = a_.input + first_image * a_.height * a_.width * fill.in_stride;
    if (a_.expand_weight) {
      fill.weight = a_.expand_weight + channel * fill.depth;
    } else {
      fill.input += channel;
    }
    fill.ring = ring_;
    fill.offsets = offsets_;
    fill.scale = a_.scale + channel;
    fill.shift = a_.shift + channel;
    fill.factor = a_.factor + channel;
    Filler filler(fill, images * a_.height * a_.width);

    HalfSums sums;
    const Half* inputs[16];
    HalfRows rows{};
    rows.inputs = inputs;
    rows.weight = reinterpret_cast<const Half*>(a_.half_depthwise) + channel * taps;
    rows.columns = out_width_;
    rows.sums = a_.partials ? &sums : nullptr;
    rows.streams = a_.streams;
    Half* output = reinterpret_cast<Half*>(a_.output) +
                   (first_image - a_.first_slab * a_.slab_images) * out_pixels * hidden_ +
                   channel * images * out_pixels;

    int64_t done = 0, phase = 0, pending = 0;  // pixels expanded; the same modulo the ring; pixels in `sums`
    for (int64_t image = 0; image < images; ++image) {
      for (int64_t y = 0; y < out_height_;) {
        const int64_t at_once = std::min(rows_at_once_, out_height_ - y);
        const int64_t top = y * a_.stride - padding_;
        const int64_t bottom = top + a_.kernel + (at_once - 1) * a_.stride;
        const int64_t needed = (image * a_.height + std::min(a_.height, bottom)) * a_.width;
        while (done < needed) {
          filler.next(phase);
          done += kTilePixels;
          phase += kTilePixels;
          if (phase >= ring_pixels_) phase -= ring_pixels_;
        }
        rows.first_input = std::max<int64_t>(0, -top);
        rows.last_input = std::min(bottom, a_.height) - top;
        for (int64_t k = rows.first_input; k < rows.last_input; ++k)
          inputs[k] = ring_ + (image * a_.height + top + k) % ring_rows_ * row_width_ * kWidth;
        for (int64_t r = 0; r < at_once; ++r)
          rows.outputs[r] = output + (image * out_height_ + y + r) * out_width_ * kWidth;
        (at_once == 2 ? row_kernels_.two : row_kernels_.one)(rows);
        y += at_once;
        pending += at_once * out_width_;
        if (pending >= kFlushedPixels) {
          sums.flush();
          pending = 0;
        }
      }
    }
    if (!a_.partials) return;
    sums.flush();
    double* partial = a_.partials + slab * 3 * hidden_ + channel;
    for (int64_t c = 0; c < kWidth; ++c) {
      partial[c] = static_cast<double>(sums.pilot[c]);
      partial[hidden_ + c] = sums.total[c];
      partial[2 * hidden_ + c] = sums.total_squares[c];
    }
  }

  const ExpandDepthwise<TiledBFloat16>& a_;
  int64_t out_height_, out_width_, hidden_, padding_;
  HalfRowKernels row_kernels_;
  int64_t rows_at_once_, ring_rows_, row_width_, ring_pixels_;
  Half* ring_;
  int32_t* offsets_;
};

inline void expand_depthwise_tiles(const ExpandDepthwise<TiledBFloat16>& arguments, int64_t first_unit,
                                   int64_t last_unit) {
  if (!arguments.half_depthwise) return expand_depthwise<TiledBFloat16>(arguments, first_unit, last_unit);
  const Tiles tiles;
  HalfExpandDepthwise(arguments).run(first_unit, last_unit);
}
