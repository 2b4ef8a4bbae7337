// CUDA's functions on numbers that C++ does not have, and loads that have a function.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<std::uint64_t>(a) * b) >> 32);
}

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline long min(long a, long b) { return a < b ? a : b; }  // without these int64_t would become int
inline long max(long a, long b) { return a > b ? a : b; }

inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float f) { return std::bit_cast<unsigned>(f); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline int __float_as_int(float f) { return std::bit_cast<int>(f); }

// The device's are less exact.
inline float __expf(float x) { return std::exp(x); }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x != x || x < 0.f ? 0.f : x > 1.f ? 1.f : x; }

template <typename T>
T __ldg(const T* address) {
  return *address;
}
