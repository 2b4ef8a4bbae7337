// Kernels whose memory traffic is known: tests of the tracer (test_trace.py).
//
//   traced NAME   executes a kernel and prints what was counted, as emulation_trace_stop() gives it
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>

#include "device.h"

extern "C" {
void emulation_trace_start();
bool emulation_trace_name(const char* name, const void* start, std::size_t bytes);
const char* emulation_trace_stop();
}

namespace {

using namespace greedynas::cuda;

constexpr int kFloats = 4096;

// ---- global memory

__global__ void copy_vectors(const float4* x, float4* y) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  float4 v = x[i];
  v.x *= 2.f;  // members are used, and yet it is loaded as a whole
  v.w += v.y;
  y[i] = v;
}

__global__ void copy_strided(const float* x, float* y, int stride) {
  const int i = (blockIdx.x * blockDim.x + threadIdx.x) * stride;
  y[i] = x[i];
}

__global__ void copy_shifted(const float* x, float* y) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = x[i + 1];
}

// Every block reads `halo` floats of its neighbours, on both sides.
__global__ void copy_with_halo(const float* x, float* y, int halo) {
  const int first = blockIdx.x * blockDim.x, n = gridDim.x * blockDim.x;
  float sum = 0.f;
  for (int i = first - halo + static_cast<int>(threadIdx.x); i < first + static_cast<int>(blockDim.x) + halo;
       i += blockDim.x) {
    if (i >= 0 && i < n) sum += x[i];
  }
  y[first + threadIdx.x] = sum;
}

__global__ void read_and_write_again(float* y) {
  const int i = threadIdx.x;
  for (int turn = 0; turn < 3; ++turn) {
    y[i] += 1.f;
    __syncthreads();
  }
}

__global__ void same_word(const float* x, float* y) { y[threadIdx.x] = x[5]; }

__global__ void few_halves(const unsigned short* x, unsigned short* y) {
  if (threadIdx.x < 5) y[2 * threadIdx.x] = x[threadIdx.x];
}

__global__ void add(float* y) { atomicAdd(y + threadIdx.x % 8, 1.f); }

__global__ void unnamed(const float* hidden, float* y) { y[threadIdx.x] = hidden[threadIdx.x]; }

// ---- divergence

__global__ void branches(const float* x, float* y) {
  const int i = threadIdx.x;
  float v;
  if (i % 2 == 0) {
    v = x[i];
  } else {
    v = x[32 + i];
  }
  y[i] = v;
}

// Lane i goes round i + 1 times; a load and a store in each turn.
__global__ void different_turns(const float* x, float* y) {
  const int i = threadIdx.x;
  for (int turn = 0; turn <= i; ++turn) y[turn * 32 + i] = x[turn * 32 + i];
}

__device__ __attribute__((noinline)) float fetch(const float* x, int i) { return x[i]; }
__global__ void calls(const float* x, float* y) {
  const int i = threadIdx.x;
  float v = fetch(x, i);
  v += fetch(x, 2 * i);
  y[i] = v;
}

// ---- shared memory

template <int kStride>
__global__ void shared_strided(const float* x, float* y) {
  GREEDYNAS_SHARED(float, values, [32 * kStride]);
  const int i = threadIdx.x;
  values[i * kStride] = x[i];
  __syncthreads();
  y[i] = values[(31 - i) * kStride];
}

template <int kPadding>
__global__ void transpose(const float* x, float* y) {
  GREEDYNAS_SHARED(float, tile, [32][32 + kPadding]);
  const int i = threadIdx.x % 32, j = threadIdx.x / 32;
  for (int row = j; row < 32; row += 8) tile[row][i] = x[row * 32 + i];
  __syncthreads();
  for (int row = j; row < 32; row += 8) y[row * 32 + i] = tile[i][row];
}

__global__ void shared_vectors(const float4* x, float4* y) {
  GREEDYNAS_SHARED(float4, values, [64]);
  const int i = threadIdx.x;
  values[i] = x[i];
  values[i + 32] = x[i];
  __syncthreads();
  const float4 next = values[i], second = values[2 * i], same = values[7];
  y[i] = float4{next.x + second.x, next.y, second.z, same.w};
}

__global__ void shared_pairs(const float2* x, float2* y) {
  GREEDYNAS_SHARED(float2, values, [64]);
  const int i = threadIdx.x;
  values[i] = x[i];
  values[i + 32] = x[i];
  __syncthreads();
  const float2 next = values[i], second = values[2 * i];
  y[i] = float2{next.x, second.y};
}

template <int kRowBytes>
__global__ void matrices(const uint4* x, unsigned* y) {
  GREEDYNAS_DYNAMIC_SHARED(memory);
  const int i = threadIdx.x;
  uint4* const row = reinterpret_cast<uint4*>(memory + i * kRowBytes);
  copy_async16(row, x + i);
  commit_async();
  wait_async<0>();
  __syncthreads();
  unsigned r[4], t[4];
  load_matrices(r, row);
  load_matrices_transposed(t, row);
  for (int k = 0; k < 4; ++k) y[k * 32 + i] = r[k] + t[k];
}

__global__ void operations(const float* x, float* y) {
  const int i = threadIdx.x;
  const unsigned a[4] = {};
  float sums[4];
  multiply_f16_first(sums, a, 0, 0);
  float v = x[i] + sums[0];
  v += __shfl_xor_sync(~0u, v, 1);
  v += __shfl_xor_sync(~0u, v, 2);
  __syncwarp();
  __syncthreads();
  __syncthreads();
  y[i] = v;
}

// ---- what they are launched with

alignas(256) float x_memory[2 * kFloats], y_memory[2 * kFloats];
float* const hidden_memory = static_cast<float*>(std::aligned_alloc(32, 32 * sizeof(float)));

template <typename T>
T* x() {
  return reinterpret_cast<T*>(x_memory);
}
template <typename T>
T* y() {
  return reinterpret_cast<T*>(y_memory);
}

template <typename Kernel, typename... Arguments>
std::function<void()> with(Kernel kernel, int blocks, int threads, int bytes, Arguments... arguments) {
  return [=] { GREEDYNAS_LAUNCH(kernel, dim3(blocks), dim3(threads), bytes, nullptr, arguments...); };
}

const std::map<std::string, std::function<void()>> kCases = {
    {"copy_vectors", with(copy_vectors, 4, 256, 0, x<float4>(), y<float4>())},
    {"copy_strided_1", with(copy_strided, 4, 256, 0, x<float>(), y<float>(), 1)},
    {"copy_strided_2", with(copy_strided, 4, 256, 0, x<float>(), y<float>(), 2)},
    {"copy_strided_8", with(copy_strided, 4, 256, 0, x<float>(), y<float>(), 8)},
    {"copy_shifted", with(copy_shifted, 4, 256, 0, x<float>(), y<float>())},
    {"copy_with_halo", with(copy_with_halo, 8, 64, 0, x<float>(), y<float>(), 16)},
    {"read_and_write_again", with(read_and_write_again, 1, 64, 0, y<float>())},
    {"same_word", with(same_word, 1, 32, 0, x<float>(), y<float>())},
    {"few_halves", with(few_halves, 1, 32, 0, x<unsigned short>(), y<unsigned short>())},
    {"add", with(add, 2, 64, 0, y<float>())},
    {"unnamed", with(unnamed, 1, 32, 0, static_cast<const float*>(hidden_memory), y<float>())},
    {"branches", with(branches, 1, 32, 0, x<float>(), y<float>())},
    {"different_turns", with(different_turns, 1, 32, 0, x<float>(), y<float>())},
    {"calls", with(calls, 1, 32, 0, x<float>(), y<float>())},
    {"shared_strided_1", with(shared_strided<1>, 1, 32, 0, x<float>(), y<float>())},
    {"shared_strided_2", with(shared_strided<2>, 1, 32, 0, x<float>(), y<float>())},
    {"shared_strided_32", with(shared_strided<32>, 1, 32, 0, x<float>(), y<float>())},
    {"shared_strided_33", with(shared_strided<33>, 1, 32, 0, x<float>(), y<float>())},
    {"transpose_0", with(transpose<0>, 1, 256, 0, x<float>(), y<float>())},
    {"transpose_1", with(transpose<1>, 1, 256, 0, x<float>(), y<float>())},
    {"shared_vectors", with(shared_vectors, 1, 32, 0, x<float4>(), y<float4>())},
    {"shared_pairs", with(shared_pairs, 1, 32, 0, x<float2>(), y<float2>())},
    {"matrices_16", with(matrices<16>, 1, 32, 32 * 16, x<uint4>(), y<unsigned>())},
    {"matrices_32", with(matrices<32>, 1, 32, 32 * 32, x<uint4>(), y<unsigned>())},
    {"matrices_128", with(matrices<128>, 1, 32, 32 * 128, x<uint4>(), y<unsigned>())},
    {"matrices_144", with(matrices<144>, 1, 32, 32 * 144, x<uint4>(), y<unsigned>())},
    {"operations", with(operations, 3, 64, 0, x<float>(), y<float>())},
};

}  // namespace

int main(int count, char** arguments) {
  const auto found = kCases.find(count == 2 ? arguments[1] : "");
  if (found == kCases.end()) {
    std::fprintf(stderr, "usage: traced NAME\n");
    return 2;
  }
  emulation_trace_start();
  if (!emulation_trace_name("x", x_memory, sizeof x_memory) ||
      !emulation_trace_name("y", y_memory, sizeof y_memory) ||
      emulation_trace_name("again", y_memory + 8, 4) || emulation_trace_name("askew", hidden_memory + 1, 4)) {
    return 1;
  }
  found->second();
  std::printf("%s\n", emulation_trace_stop());
  return 0;
}
