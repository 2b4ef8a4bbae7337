// Runs a loop nest in the widest form that this machine's instruction set allows, chosen at run time: wheels
// are built for any x86-64 (or other) machine, and the loops are four times faster with AVX2 and FMA.
#pragma once

#define GREEDYNAS_INLINE inline __attribute__((always_inline))

// Before a loop: unroll all of its few iterations; its iterations are independent although pointers may be
// equal.
#ifdef __clang__
#define GREEDYNAS_UNROLL _Pragma("clang loop unroll(full)")
#define GREEDYNAS_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define GREEDYNAS_UNROLL _Pragma("GCC unroll 8")
#define GREEDYNAS_INDEPENDENT _Pragma("GCC ivdep")
#endif

#if defined(__x86_64__) && !defined(GREEDYNAS_BASELINE_ONLY)
#define GREEDYNAS_TARGET_AVX2 __attribute__((target("avx2,fma")))
#define GREEDYNAS_HAS_AVX2 1
#else
#define GREEDYNAS_HAS_AVX2 0
#endif

namespace greedynas::cpu {

// The vector types of GCC and Clang: arithmetic is written as on scalars. Loads and stores need no alignment.
template <typename T, int kBytes>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes), aligned(alignof(T)), may_alias));
};

template <typename T, int kBytes>
using Vector = typename VectorOf<T, kBytes>::type;

template <typename T, int kBytes>
inline constexpr int kVectorLanes = kBytes / static_cast<int>(sizeof(T));

#if GREEDYNAS_HAS_AVX2
template <typename Loops, typename... Arguments>
GREEDYNAS_TARGET_AVX2 void run_avx2(Arguments... arguments) {
  Loops::template run<32>(arguments...);
}

inline bool machine_has_avx2() {
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return has;
}
#endif

// Loops::run<bytes of a vector>(arguments...) is a static GREEDYNAS_INLINE function, so that it is compiled
// anew within each variant.
template <typename Loops, typename... Arguments>
void run_vectorised(Arguments... arguments) {
#if GREEDYNAS_HAS_AVX2
  if (machine_has_avx2()) return run_avx2<Loops>(arguments...);
#endif
  Loops::template run<16>(arguments...);
}

}  // namespace greedynas::cpu
