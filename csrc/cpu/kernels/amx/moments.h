// finish by matrix tiles: see ../moments.h. The second moments are products of the stored bfloat16 values
// themselves, exact in float; a pilot is taken away only where the driver sets one (block_runner.h).
//
// With two pixels side by side, a tile of 32 pixels and 16 channels serves as the weights of a product, and,
// its pairs transposed, as the rows.

inline constexpr int64_t kGramTiles = kGramPixels / kTilePixels;
inline constexpr int64_t kGramFlushedUnits = 4;  // that are added up in float

struct GramMemory {
  TiledBFloat16* pairs;  // [32 channels][tile of pixels][half][16 pairs of pixels][16 channels][2]
  TiledBFloat16* rows;   // likewise, transposed
  float* sums;           // [pair of 32 channels, the first not above the second][half, half][16][16]
};

// Interleaving works within quarters of a vector: lane l of half h of 32 channels is this one.
constexpr int64_t channel_of_half(int64_t half, int64_t lane) { return lane / 4 * 8 + half * 4 + lane % 4; }

template <Activation kActivation>
class FinishChannels {
  using T = TiledBFloat16;

 public:
  FinishChannels(const FinishMap<T>& f, int64_t channel)
      : raw_(f.raw + channel),
        output_(f.output + channel),
        residual_(f.residual ? f.residual + channel : nullptr),
        maps_(f.scale != nullptr),
        stride_(row_channels<T>(f.channels)) {
    for (int v = 0; v < 2; ++v) {
      const int64_t c = channel + v * 16;
      if (f.scale) {
        scale_[v] = load<float>(f.scale + c);
        shift_[v] = load<float>(f.shift + c);
      }
      if (!f.pilot) continue;
      pilot_[v] = load<float>(f.pilot + c);
      centres_ = centres_ || _mm512_cmpneq_ps_mask((__m512)pilot_[v], _mm512_setzero_ps()) != 0;
    }
  }

  // The finished values of a pixel, stored.
  INLINE __m512i finish(int64_t pixel) const {
    const int64_t place = pixel * stride_;
    if (!maps_) return _mm512_loadu_si512(raw_ + place);
    Vec<float> x[2];
    for (int v = 0; v < 2; ++v) {
      x[v] = activate<kActivation, float>(load_values<T>(raw_ + place + v * 16) * scale_[v] + shift_[v]);
      if (residual_) x[v] += load_values<T>(residual_ + place + v * 16);
    }
    const auto bits = (__m512i)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]);
    _mm512_storeu_si512(output_ + place, bits);
    return bits;
  }

  // The distances from the pilot of a finished pixel.
  INLINE __m512i centred(__m512i values) const {
    if (!centres_) return values;
    const __m512i low = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(values)), 16);
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(values, 1)), 16);
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)((Vec<float>)high - pilot_[1]),
                                        (__m512)((Vec<float>)low - pilot_[0]));
  }

 private:
  const T* raw_;
  T* output_;
  const T* residual_;
  bool maps_;
  int64_t stride_;
  Vec<float> scale_[2] = {}, shift_[2] = {}, pilot_[2] = {};
  bool centres_ = false;
};

// Finishes 32 channels of some pixels, lays their tiles out, and adds up their distances from the pilot.
template <Activation kActivation>
INLINE void finish_into_tiles(const FinishMap<TiledBFloat16>& f, int64_t first, int64_t count,
                              int64_t channel, const GramMemory& memory, double* sums) {
  const FinishChannels<kActivation> channels(f, channel);
  const auto ones = (__m512bh)_mm512_set1_epi16(0x3f80);
  __m512 sum[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  const int64_t tile = channel * kGramPixels;
  for (int64_t p = 0; p < count; p += kTilePixels) {
    TiledBFloat16* pairs = memory.pairs + tile + p * 32;
    for (int64_t i = 0; i < kTilePixels; i += 2) {
      __m512i a = _mm512_setzero_si512(), b = a;
      if (p + i < count) a = channels.centred(channels.finish(first + p + i));
      if (p + i + 1 < count) b = channels.centred(channels.finish(first + p + i + 1));
      const __m512i halves[2] = {_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b)};
      for (int half = 0; half < 2; ++half) {
        _mm512_store_si512(pairs + half * 512 + i * 16, halves[half]);
        sum[half] = _mm512_dpbf16_ps(sum[half], (__m512bh)halves[half], ones);
      }
    }
    for (int half = 0; half < 2; ++half)
      transpose_pairs(pairs + half * 512, memory.rows + tile + p * 32 + half * 512);
  }
  for (int half = 0; half < 2; ++half) {
    for (int64_t lane = 0; lane < 16; ++lane)
      sums[channel + channel_of_half(half, lane)] += static_cast<double>(sum[half][lane]);
  }
}

// Adds the products of two times 32 channels to their sums.
inline void multiply_gram(const TiledBFloat16* rows, const TiledBFloat16* pairs, int64_t tiles, float* sums) {
  TILE_LOAD(0, sums, 64);
  TILE_LOAD(1, sums + 256, 64);
  TILE_LOAD(2, sums + 512, 64);
  TILE_LOAD(3, sums + 768, 64);
  for (int64_t t = 0; t < tiles; ++t) {
    TILE_LOAD(4, rows + t * 1024, 64);
    TILE_LOAD(6, pairs + t * 1024, 64);
    TILE_MULTIPLY(0, 4, 6);
    TILE_LOAD(7, pairs + t * 1024 + 512, 64);
    TILE_MULTIPLY(1, 4, 7);
    TILE_LOAD(5, rows + t * 1024 + 512, 64);
    TILE_MULTIPLY(2, 5, 6);
    TILE_MULTIPLY(3, 5, 7);
  }
  TILE_STORE(0, sums, 64);
  TILE_STORE(1, sums + 256, 64);
  TILE_STORE(2, sums + 512, 64);
  TILE_STORE(3, sums + 768, 64);
}

// Moves sums of 32 times 32 channels to `gram`, at its place in rows of `stride`.
inline void flush_gram(float* sums, double* gram, int64_t stride) {
  for (int64_t half = 0; half < 4; ++half) {
    for (int64_t row = 0; row < 16; ++row) {
      double* out = gram + channel_of_half(half / 2, row) * stride;
      float* in = sums + half * 256 + row * 16;
      for (int64_t quarter = 0; quarter < 4; ++quarter) {
        double* to = out + channel_of_half(half % 2, quarter * 4);
        const __m256d more = _mm256_cvtps_pd(_mm_load_ps(in + quarter * 4));
        _mm256_storeu_pd(to, _mm256_add_pd(_mm256_loadu_pd(to), more));
      }
      _mm512_store_ps(in, _mm512_setzero_ps());
    }
  }
}

inline void finish_tiles(const FinishMap<TiledBFloat16>& f, int64_t first_unit, int64_t last_unit,
                         double* gram, double* sums) {
  if (!f.pilot) return finish<TiledBFloat16>(f, first_unit, last_unit, gram, sums);
  const Tiles tiles;
  const int64_t stride = row_channels<TiledBFloat16>(f.channels), blocks = stride / 32;
  const int64_t all_sums = blocks * (blocks + 1) / 2 * 1024;
  thread_local Scratch<TiledBFloat16> pairs, rows;
  thread_local Scratch<float> sums_memory;
  const GramMemory memory{pairs.get(kGramPixels * stride), rows.get(kGramPixels * stride),
                          sums_memory.get(all_sums)};
  std::fill_n(memory.sums, all_sums, 0.f);
  const auto for_pairs = [&](const auto& body) {
    float* part = memory.sums;
    for (int64_t i = 0; i < blocks; ++i) {
      for (int64_t j = i; j < blocks; ++j, part += 1024) body(i, j, part);
    }
  };
  for (int64_t unit = first_unit; unit < last_unit; ++unit) {
    const int64_t first = unit * kGramPixels, count = std::min(kGramPixels, f.pixels - first);
    for (int64_t channel = 0; channel < stride; channel += 32) {
      GREEDYNAS_WITH_ACTIVATION(f.activation,
                                (finish_into_tiles<kActivation>(f, first, count, channel, memory, sums)))
    }
    for_pairs([&](int64_t i, int64_t j, float* part) {
      multiply_gram(memory.rows + i * 32 * kGramPixels, memory.pairs + j * 32 * kGramPixels,
                    ceil_div(count, kTilePixels), part);
    });
    if ((unit - first_unit + 1) % kGramFlushedUnits != 0 && unit + 1 < last_unit) continue;
    for_pairs([&](int64_t i, int64_t j, float* part) {
      flush_gram(part, gram + i * 32 * stride + j * 32, stride);
    });
  }
}
