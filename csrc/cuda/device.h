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

// ---- copies from global to shared memory that the thread does not wait for: 16 bytes, 16-byte aligned

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
__device__ __forceinline__ unsigned pack_half(float low, float high) {
  unsigned r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
// The same of max(x, 0); NaN stays NaN.
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

}  // namespace greedynas::cuda
