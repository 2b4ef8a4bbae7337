// What CUDA adds to the language: qualifiers, vector types, and what they are spelled with.
#pragma once

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

using cudaStream_t = struct CUstream_st*;

inline constexpr int warpSize = 32;

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Devices copy vectors as a whole. The compiler copies the members that it needs, which a tracing build has
// to prevent.
#if defined(EMULATION_TRACE)
namespace emu {
using Words2 __attribute__((vector_size(8), may_alias)) = float;
using Words4 __attribute__((vector_size(16), may_alias)) = float;
// No templates: their arguments lose may_alias.
#define EMULATION_COPY_WHOLE(Words)                                                     \
  __attribute__((always_inline)) inline void copy_whole(Words* to, const Words* from) { \
    Words words = *from;                                                                \
    asm("" : "+x"(words));                                                              \
    *to = words;                                                                        \
  }
EMULATION_COPY_WHOLE(Words2)
EMULATION_COPY_WHOLE(Words4)
#undef EMULATION_COPY_WHOLE
}  // namespace emu
#define EMULATION_VECTOR(Type, Words)                                                        \
  __attribute__((always_inline)) Type(const Type& other) { *this = other; }                  \
  __attribute__((always_inline)) Type& operator=(const Type& other) {                        \
    emu::copy_whole(reinterpret_cast<Words*>(this), reinterpret_cast<const Words*>(&other)); \
    return *this;                                                                            \
  }                                                                                          \
  Type() = default;
#define EMULATION_VECTOR2(Type, Scalar) \
  EMULATION_VECTOR(Type, emu::Words2)   \
  Type(Scalar x, Scalar y) : x(x), y(y) {}
#define EMULATION_VECTOR4(Type, Scalar) \
  EMULATION_VECTOR(Type, emu::Words4)   \
  Type(Scalar x, Scalar y, Scalar z, Scalar w) : x(x), y(y), z(z), w(w) {}
#else
#define EMULATION_VECTOR2(Type, Scalar)
#define EMULATION_VECTOR4(Type, Scalar)
#endif

struct alignas(8) float2 {
  float x, y;
  EMULATION_VECTOR2(float2, float)
};
struct alignas(16) float4 {
  float x, y, z, w;
  EMULATION_VECTOR4(float4, float)
};
struct alignas(8) uint2 {
  unsigned x, y;
  EMULATION_VECTOR2(uint2, unsigned)
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
  EMULATION_VECTOR4(uint4, unsigned)
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
