// Vectors of one instruction set. Every file in this folder is included by one kernels_*.cpp per instruction
// set, inside its namespace and its target pragma; GREEDYNAS_VECTOR_BYTES and GREEDYNAS_LEVEL say
// which, GREEDYNAS_BF16 the type of bfloat16 where there are products of it.

#define UNROLL _Pragma("GCC unroll 16")

template <typename C>
struct VectorOf {
  typedef C type __attribute__((vector_size(GREEDYNAS_VECTOR_BYTES), aligned(alignof(C)), may_alias));
};
template <typename C>
using Vec = typename VectorOf<C>::type;

template <typename C>
inline constexpr int kVectorLanes = GREEDYNAS_VECTOR_BYTES / static_cast<int>(sizeof(C));

// A group of channels is two vectors; where kLanes channels are one vector, a last group can be one vector.
template <typename C>
inline constexpr int kGroupWidth = 2 * kVectorLanes<C>;
template <typename C>
inline constexpr bool kHasNarrowGroup = kVectorLanes<C> == kLanes;

#if GREEDYNAS_LEVEL >= GREEDYNAS_AVX512
inline constexpr int kTileRows =
    12;  // 12 rows of two vectors of sums, two vectors of weights: 26 of 32 registers
#else
inline constexpr int kTileRows = 6;
#endif
static_assert(kTileRows <= kSlackRows);

#define INLINE inline __attribute__((always_inline))

template <typename C>
INLINE Vec<C> load(const C* p) {
  return *reinterpret_cast<const Vec<C>*>(p);
}
template <typename C>
INLINE void store(C* p, Vec<C> v) {
  *reinterpret_cast<Vec<C>*>(p) = v;
}
template <typename C>
INLINE Vec<C> broadcast(C x) {
  return x - Vec<C>{};
}

// max(0, x) and min(6, x) that keep NaN: the instructions return their second operand where one is NaN.
template <typename C>
INLINE Vec<C> positive(Vec<C> x) {
  return x < C(0) ? Vec<C>{} : x;
}
template <typename C>
INLINE Vec<C> at_most_six(Vec<C> x) {
  return x > C(6) ? broadcast(C(6)) : x;
}
#if GREEDYNAS_LEVEL >= GREEDYNAS_AVX512
template <>
INLINE Vec<float> positive<float>(Vec<float> x) {
  return (Vec<float>)_mm512_max_ps(_mm512_setzero_ps(), (__m512)x);
}
template <>
INLINE Vec<float> at_most_six<float>(Vec<float> x) {
  return (Vec<float>)_mm512_min_ps(_mm512_set1_ps(6.f), (__m512)x);
}
#elif GREEDYNAS_LEVEL == GREEDYNAS_AVX2
template <>
INLINE Vec<float> positive<float>(Vec<float> x) {
  return (Vec<float>)_mm256_max_ps(_mm256_setzero_ps(), (__m256)x);
}
template <>
INLINE Vec<float> at_most_six<float>(Vec<float> x) {
  return (Vec<float>)_mm256_min_ps(_mm256_set1_ps(6.f), (__m256)x);
}
#endif

// exp(x): in float the Cephes polynomial after reduction by multiples of ln 2, within 2 units in the last
// place.
template <typename C>
INLINE Vec<C> exponential(Vec<C> x) {
  Vec<C> result;
  for (int lane = 0; lane < kVectorLanes<C>; ++lane) result[lane] = std::exp(x[lane]);
  return result;
}
template <>
INLINE Vec<float> exponential<float>(Vec<float> x) {
  typedef int32_t Ints __attribute__((vector_size(GREEDYNAS_VECTOR_BYTES)));
  Vec<float> clamped = x > 88.f ? broadcast(88.f) : x;
  clamped = clamped < -87.f ? broadcast(-87.f) : clamped;
  const Vec<float> scaled = clamped * 1.44269504088896341f;
  const Vec<float> half = scaled < 0.f ? broadcast(-0.5f) : broadcast(0.5f);
  const Ints power = __builtin_convertvector(scaled + half, Ints);  // rounds to the nearest
  const Vec<float> n = __builtin_convertvector(power, Vec<float>);
  const Vec<float> r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  Vec<float> y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.f;
  const Vec<float> exponent = (Vec<float>)((power + 127) << 23);
  y = y * exponent;
  y = x > 88.7f ? broadcast(__builtin_inff()) : y;
  y = x < -103.f ? Vec<float>{} : y;
  return x != x ? x : y;
}

template <Activation kActivation, typename C>
INLINE Vec<C> activate(Vec<C> x) {
  if constexpr (kActivation == kRelu) return positive<C>(x);
  if constexpr (kActivation == kRelu6) return at_most_six<C>(positive<C>(x));
  if constexpr (kActivation == kHswish) return x * at_most_six<C>(positive<C>(x + C(3))) * C(1.0 / 6.0);
  if constexpr (kActivation == kSilu) return x / (C(1) + exponential<C>(-x));
  return x;
}

// Calls function<activation>(arguments...) for the activation that is known at run time.
#define GREEDYNAS_WITH_ACTIVATION(value, call)    \
  switch (value) {                                \
    case kRelu: {                                 \
      constexpr Activation kActivation = kRelu;   \
      call;                                       \
      break;                                      \
    }                                             \
    case kRelu6: {                                \
      constexpr Activation kActivation = kRelu6;  \
      call;                                       \
      break;                                      \
    }                                             \
    case kHswish: {                               \
      constexpr Activation kActivation = kHswish; \
      call;                                       \
      break;                                      \
    }                                             \
    case kSilu: {                                 \
      constexpr Activation kActivation = kSilu;   \
      call;                                       \
      break;                                      \
    }                                             \
    default: {                                    \
      constexpr Activation kActivation = kLinear; \
      call;                                       \
    }                                             \
  }

// Values of type T in memory, C = Compute<T> in registers.
template <typename T>
INLINE Vec<Compute<T>> load_values(const T* p) {
  return load<T>(p);
}
template <typename T>
INLINE void store_values(T* p, Vec<Compute<T>> v) {
  store<T>(p, v);
}
template <typename T>
INLINE T from_compute(Compute<T> x) {
  return x;
}
#ifdef GREEDYNAS_BF16
using Bf16 = GREEDYNAS_BF16;
template <>
INLINE Vec<float> load_values<Bf16>(const Bf16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return (Vec<float>)_mm512_slli_epi32(wide, 16);
}
template <>
INLINE void store_values<Bf16>(Bf16* p, Vec<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
}
template <>
INLINE Bf16 from_compute<Bf16>(float x) {
  return {static_cast<uint16_t>(((__v8hi)_mm_cvtneps_pbh(_mm_set1_ps(x)))[0])};
}
#endif

// Memory of a thread that stays allocated from call to call.
template <typename C>
class Scratch {
 public:
  C* get(int64_t size) {
    if (size > size_) {
      buffer_ = make_buffer<C>(size);
      size_ = size;
    }
    return buffer_.get();
  }

 private:
  Buffer<C> buffer_;
  int64_t size_ = 0;
};
