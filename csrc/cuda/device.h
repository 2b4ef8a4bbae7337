// What kernels are written in: CUDA as nvcc compiles it, or, for every other compiler, its emulation on the
// host (tests/emulation/emulation.h), which has the same names.
#pragma once

#ifdef __CUDACC__

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

// Shared memory: a variable, or all that the launch asked for.
#define GREEDYNAS_SHARED(Type, name, ...) __shared__ Type name __VA_ARGS__
#define GREEDYNAS_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define GREEDYNAS_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                \
  do {                                                                                  \
    greedynas::cuda::allow_shared(reinterpret_cast<const void*>(kernel), shared_bytes); \
    kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__);                 \
    greedynas::cuda::check(cudaGetLastError(), #kernel);                                \
  } while (false)

namespace greedynas::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// More than 48 KB a block has to be allowed first.
inline void allow_shared(const void* kernel, std::size_t bytes) {
  if (bytes <= 48 * 1024) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        "cudaFuncSetAttribute");
}

// Of the current device.
inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}
inline int shared_bytes_per_block() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  return bytes;
}

// Whether the code is compiled for compute capability 8.0 or later.
#ifdef __CUDA_ARCH__
__device__ constexpr bool since_sm80() { return __CUDA_ARCH__ >= 800; }
#else
__device__ constexpr bool since_sm80() { return true; }
#endif

// ---- copies from global to shared memory that the thread does not wait for (since 8.0)

__device__ __forceinline__ void copy_async16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
}
__device__ __forceinline__ void commit_async() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most kPending groups of this thread's copies are on the way.
template <int kPending>
__device__ __forceinline__ void wait_async() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- matrix tiles (PTX ISA, mma.m16n8k16; lane = 4 * g + t)
//   A 16x16: a[0] rows g, k 2t and 2t+1; a[1] rows g+8; a[2] rows g, k+8; a[3] rows g+8, k+8
//   B 16x8:  b0 k 2t and 2t+1, column g; b1 k+8
//   C 16x8:  c[0], c[1] row g, columns 2t and 2t+1; c[2], c[3] row g+8

// What the emulation compares between the lanes of a warp: where they were called.
#define GREEDYNAS_PLACE
#define GREEDYNAS_SAME_PLACE

#define GREEDYNAS_MULTIPLY(name, type)                                                                    \
  __device__ __forceinline__ void name(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) { \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                   \
                 ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"                                \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                         \
  }                                                                                                       \
  /* C = A B: no registers to clear first */                                                              \
  __device__ __forceinline__ void name##_first(float (&c)[4], const unsigned (&a)[4], unsigned b0,        \
                                               unsigned b1) {                                             \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                   \
                 ".f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%10,%10,%10};"                            \
                 : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.f));               \
  }
GREEDYNAS_MULTIPLY(multiply_bf16, "bf16")
GREEDYNAS_MULTIPLY(multiply_f16, "f16")
#undef GREEDYNAS_MULTIPLY

// mma.m16n8k8, which compute capability 7.5 has too: half of A and B.
__device__ __forceinline__ void multiply_f16_k8(float (&c)[4], unsigned a0, unsigned a1, unsigned b) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5},{%6},{%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(b));
}

// Four 8x8 matrices of 16-bit elements from shared memory; lane l gives the address of row l % 8 of matrix l
// / 8, and gets elements 2t and 2t+1 of row g of each (transposed: of column g).
__device__ __forceinline__ void load_matrices(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(unsigned (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
}

// ---- two numbers of 16 bits in a register, the first one in the low half

__device__ __forceinline__ unsigned pack_bf16(float low, float high) {
  unsigned r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
// a - b of two bfloat16 each.
__device__ __forceinline__ unsigned subtract_bf16(unsigned a, unsigned b) {
  constexpr unsigned kMinusOnes = 0xbf80bf80u;
  unsigned r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(b), "r"(kMinusOnes), "r"(a));
  return r;
}
__device__ __forceinline__ unsigned pack_half(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  unsigned r;
  memcpy(&r, &pair, 4);
  return r;
}
// Of max(x, 0); NaN stays NaN (since 8.0).
__device__ __forceinline__ unsigned pack_half_relu(float low, float high) {
  unsigned r;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}

}  // namespace greedynas::cuda

#else
#include "emulation.h"
#endif

namespace greedynas::cuda {

__device__ __forceinline__ __half2 as_half2(unsigned bits) {
  __half2 h;
  memcpy(&h, &bits, 4);
  return h;
}
__device__ __forceinline__ unsigned as_bits(__half2 h) {
  unsigned bits;
  memcpy(&bits, &h, 4);
  return bits;
}
__device__ __forceinline__ float low_bf16(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }

// ---- what is done in one way since 8.0 and in another before

// Whether a block has no more than 64 KB of shared memory; since 8.0 it has at least 99.
inline bool little_shared_memory() { return shared_bytes_per_block() < 99 * 1024; }

// From global to shared memory, 16 bytes, 16-byte aligned; complete once they have been waited for.
__device__ __forceinline__ void start_copy16(void* shared, const void* global) {
  if (since_sm80()) {
    copy_async16(shared, global);
  } else {
    *static_cast<uint4*>(shared) = *static_cast<const uint4*>(global);
    asm volatile("" ::: "memory");  // one after the other: together they would need more registers
  }
}
// What this thread has started since the last time becomes a group of copies.
__device__ __forceinline__ void commit_copies() {
  if (since_sm80()) commit_async();
}
// Until at most kPending groups of this thread's copies are on the way.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  if (since_sm80()) wait_async<kPending>();
}

__device__ __forceinline__ void multiply_half(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                              unsigned b1 GREEDYNAS_PLACE) {
  if (since_sm80()) {
    multiply_f16(c, a, b0, b1 GREEDYNAS_SAME_PLACE);
  } else {
    multiply_f16_k8(c, a[0], a[1], b0 GREEDYNAS_SAME_PLACE);
    multiply_f16_k8(c, a[2], a[3], b1 GREEDYNAS_SAME_PLACE);
  }
}
__device__ __forceinline__ void multiply_half_first(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                                    unsigned b1 GREEDYNAS_PLACE) {
  if (since_sm80()) {
    multiply_f16_first(c, a, b0, b1 GREEDYNAS_SAME_PLACE);
  } else {
    c[0] = c[1] = c[2] = c[3] = 0.f;
    multiply_half(c, a, b0, b1 GREEDYNAS_SAME_PLACE);
  }
}

// Two halves of max(x, 0), and of min(max(x, 0), bound). NaN stays NaN.
__device__ __forceinline__ unsigned pack_relu(float low, float high) {
  if (since_sm80()) return pack_half_relu(low, high);
  return pack_half(low < 0.f ? 0.f : low, high < 0.f ? 0.f : high);
}
__device__ __forceinline__ unsigned pack_relu6(float low, float high, float low_bound, float high_bound) {
  if (since_sm80()) {
    const __half2 bounds = as_half2(pack_half(low_bound, high_bound));
    return as_bits(__hmin2_nan(as_half2(pack_half_relu(low, high)), bounds));
  }
  return pack_relu(low > low_bound ? low_bound : low, high > high_bound ? high_bound : high);
}

}  // namespace greedynas::cuda
