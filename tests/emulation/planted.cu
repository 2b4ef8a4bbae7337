// Kernels with one mistake each, and the same kernels without it: tests of the emulator (test_emulator.py).
//
//   planted NAME right|wrong   executes a kernel in several orders of its threads; prints "as expected", or
//                              says what is wrong and returns 1
//   planted NAME recovers      the wrong kernel, which has to throw, and then the right one, as above
//   planted all right          every kernel
//   planted order              prints threads in the order in which the environment makes them run
//   planted multiply_bf16|multiply_f16|load_matrices|load_matrices_transposed
//                              one warp's operation, registers and memory from stdin, results to stdout
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "device.h"

namespace {

using namespace greedynas::cuda;

constexpr int kThreads = 64;
constexpr int kBlocks = 4;

// ---- bounds

__global__ void global_bounds(const float* x, float* y, int n, bool wrong) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (wrong ? i <= n : i < n) y[i < n ? i : 0] = x[i];
}

__global__ void shared_bounds(const float* x, float* y, bool wrong) {
  GREEDYNAS_SHARED(float, values, [kThreads]);
  float* to = values;
  to[threadIdx.x + wrong] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = values[threadIdx.x];
}

__global__ void dynamic_shared_bounds(const float* x, float* y, bool wrong) {
  GREEDYNAS_DYNAMIC_SHARED(memory);
  float* values = reinterpret_cast<float*>(memory);
  values[threadIdx.x + wrong] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = values[threadIdx.x];
}

// ---- what is read before it is written

__global__ void unwritten(const float* x, float* y, bool wrong) {
  GREEDYNAS_SHARED(float, values, [kThreads]);
  if (!wrong || threadIdx.x != 5) values[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = values[threadIdx.x];
}

__global__ void missing_barrier(const float* x, float* y, bool wrong) {
  GREEDYNAS_SHARED(float, values, [kThreads]);
  values[threadIdx.x] = x[kThreads - 1 - threadIdx.x];
  if (!wrong) __syncthreads();
  y[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

// The second barrier of a loop: what one turn still reads, the next one overwrites.
__global__ void missing_second_barrier(const float* x, float* y, bool wrong) {
  GREEDYNAS_SHARED(float, values, [kThreads]);
  float sum = 0.f;
  for (int turn = 0; turn < 3; ++turn) {
    values[threadIdx.x] = x[threadIdx.x] / 3.f;
    __syncthreads();
    sum += values[threadIdx.x ^ 32];  // of the other warp; equal in every turn, so no result shows it
    if (!wrong) __syncthreads();
  }
  y[threadIdx.x ^ 32] = sum;
}

// Lanes of a warp do not run in step either.
__global__ void missing_warp_barrier(const float* x, float* y, bool wrong) {
  GREEDYNAS_SHARED(float, values, [kThreads]);
  values[threadIdx.x] = x[threadIdx.x];
  if (!wrong) __syncwarp();
  y[threadIdx.x ^ 1] = values[threadIdx.x ^ 1];
}

// ---- between blocks

// Barriers around it: they order nothing between blocks.
__global__ void accumulate(const float* x, float* sum, bool wrong) {
  __syncthreads();
  if (threadIdx.x == 0) {
    if (wrong) {
      *sum += x[blockIdx.x];
    } else {
      atomicAdd(sum, x[blockIdx.x]);
    }
  }
  __syncthreads();
  __syncthreads();
}

// The last block adds up what all have written.
__global__ void last_block(const float* x, float* parts, unsigned* done, float* sum, bool wrong) {
  if (threadIdx.x != 0) return;
  parts[blockIdx.x] = x[blockIdx.x];
  if (!wrong) __threadfence();
  if (atomicAdd(done, 1u) != gridDim.x - 1) return;
  float total = 0.f;
  for (unsigned i = 0; i < gridDim.x; ++i) total += parts[i];
  *sum = total;
}

// ---- divergence

__global__ void divergent_barrier(const float* x, float* y, bool wrong) {
  GREEDYNAS_SHARED(float, values, [kThreads]);
  values[threadIdx.x] = x[threadIdx.x];
  if (wrong && threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[threadIdx.x ^ 32] = values[threadIdx.x ^ 32];
}

// A barrier that some never come to, for they wait for others in their warp who are there.
__global__ void barrier_in_branch(const float* x, float* y, bool wrong) {
  const float value = x[threadIdx.x];
  if (!wrong || threadIdx.x % 32 < 16) __syncthreads();
  y[threadIdx.x ^ 1] = __shfl_xor_sync(~0u, value, 1);
}

__global__ void divergent_shuffle(const float* x, float* y, bool wrong) {
  const unsigned lane = threadIdx.x % 32;
  const float value = x[threadIdx.x];
  if (wrong && lane < 16) {
    y[threadIdx.x ^ 1] = __shfl_xor_sync(~0u, value, 1);
  } else {
    y[threadIdx.x ^ 1] = __shfl_xor_sync(~0u, value, 1);
  }
}

// The full mask, and half of the warp has left.
__global__ void shuffle_of_those_who_left(const float* x, float* y, bool wrong) {
  if (threadIdx.x % 32 >= 16) {
    y[threadIdx.x] = x[threadIdx.x];
    return;
  }
  y[threadIdx.x ^ 1] = __shfl_xor_sync(wrong ? ~0u : 0xffffu, x[threadIdx.x], 1);
}

__global__ void shuffle_beyond_mask(const float* x, float* y, bool wrong) {
  const unsigned lane = threadIdx.x % 32;
  const unsigned mask = lane < 16 ? 0xffffu : 0xffff0000u;
  const float own = x[threadIdx.x], other = __shfl_xor_sync(mask, own, wrong ? 16 : 8);
  y[threadIdx.x ^ 8] = other;
}

// ---- alignment and asynchronous copies

__global__ void misaligned_load(const float* x, float* y, bool wrong) {
  const float4 v = reinterpret_cast<const float4*>(x + wrong)[threadIdx.x];
  reinterpret_cast<float4*>(y)[threadIdx.x] = v;
}

__global__ void misaligned_copy(const float* x, float* y, bool wrong) {
  GREEDYNAS_SHARED(float4, values, [kThreads]);
  copy_async16(&values[threadIdx.x], x + 4 * threadIdx.x + wrong);
  commit_async();
  wait_async<0>();
  reinterpret_cast<float4*>(y)[threadIdx.x] = values[threadIdx.x];
}

__global__ void read_before_copy_lands(const float* x, float* y, bool wrong) {
  GREEDYNAS_SHARED(float4, values, [2][kThreads]);
  for (int i = 0; i < 2; ++i) {
    copy_async16(&values[i][threadIdx.x], x + 4 * (i * kThreads + threadIdx.x));
    commit_async();
  }
  if (wrong) {
    wait_async<1>();  // the second one is still on the way
  } else {
    wait_async<0>();
  }
  for (int i = 0; i < 2; ++i) {
    reinterpret_cast<float4*>(y)[i * kThreads + threadIdx.x] = values[i][threadIdx.x];
  }
  wait_async<0>();
}

// Each thread waits for its own copies alone.
__global__ void read_of_others_copy(const float* x, float* y, bool wrong) {
  GREEDYNAS_SHARED(float4, values, [kThreads]);
  copy_async16(&values[threadIdx.x], x + 4 * threadIdx.x);
  commit_async();
  wait_async<0>();
  if (!wrong) __syncthreads();
  reinterpret_cast<float4*>(y)[threadIdx.x ^ 32] = values[threadIdx.x ^ 32];
}

__global__ void copy_never_waited_for(const float* x, float* y, bool wrong) {
  GREEDYNAS_SHARED(float4, values, [kThreads]);
  copy_async16(&values[threadIdx.x], x + 4 * threadIdx.x);
  commit_async();
  if (!wrong) wait_async<0>();
  reinterpret_cast<float4*>(y)[threadIdx.x] = reinterpret_cast<const float4*>(x)[threadIdx.x];
}

// Which there are since compute capability 8.0.
__global__ void copy_on_sm_75(const float* x, float* y, bool wrong) {
  GREEDYNAS_SHARED(float4, values, [kThreads]);
  if (wrong) {
    copy_async16(&values[threadIdx.x], x + 4 * threadIdx.x);
  } else {
    start_copy16(&values[threadIdx.x], x + 4 * threadIdx.x);
  }
  commit_copies();
  wait_for_copies<0>();
  reinterpret_cast<float4*>(y)[threadIdx.x] = values[threadIdx.x];
}

// ---- tensor cores

// y 16x8 = a 16x16 times b 16x8, all row by row.
__global__ void fragment_layout(const float* a, const float* b, float* y, bool wrong) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  unsigned of_a[4], of_b[2];
  for (int i = 0; i < 4; ++i) {
    const int lower = wrong ? i / 2 : i % 2, right = wrong ? i % 2 : i / 2;
    const float* from = a + (g + 8 * lower) * 16 + 2 * t + 8 * right;
    of_a[i] = pack_half(from[0], from[1]);
  }
  for (int i = 0; i < 2; ++i) {
    const float* from = b + (2 * t + 8 * i) * 8 + g;
    of_b[i] = pack_half(from[0], from[8]);
  }
  float c[4];
  multiply_f16_first(c, of_a, of_b[0], of_b[1]);
  for (int i = 0; i < 4; ++i) y[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = c[i];
}

__global__ void misaligned_matrix(const float* x, float* y, bool wrong) {
  GREEDYNAS_SHARED(float4, memory, [33]);
  float* values = reinterpret_cast<float*>(memory);
  for (int i = 0; i < 4; ++i) values[threadIdx.x * 4 + i] = x[threadIdx.x * 4 + i];
  __syncthreads();
  unsigned r[4];
  load_matrices(r, values + threadIdx.x * 4 + wrong);
  for (int i = 0; i < 4; ++i) y[i * 32 + threadIdx.x] = __uint_as_float(r[i]);
}

// ---- more shared memory than there is

__global__ void large_dynamic(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }

template <int kFloats>
__global__ void large_static(const float* x, float* y) {
  GREEDYNAS_SHARED(float, values, [kFloats]);
  values[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = values[threadIdx.x];
}

// ---- what they are launched with, and what has to come out

// Numbers whose sums and products are exact.
std::vector<float> numbers(int count) {
  std::vector<float> x(count);
  for (int i = 0; i < count; ++i) x[i] = static_cast<float>(3 * (i * 37 % 101 - 50));
  return x;
}

void expect(const std::vector<float>& y, const std::vector<float>& expected) {
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (!(y[i] == expected[i])) {
      throw std::runtime_error("wrong result: " + std::to_string(y[i]) + " at " + std::to_string(i) +
                               ", expected " + std::to_string(expected[i]));
    }
  }
}

// y is x, by one block.
using Copy = void (*)(const float*, float*, bool);
std::function<void(bool)> copies(Copy kernel, int count = kThreads, int threads = kThreads, int bytes = 0) {
  return [=](bool wrong) {
    // Something behind x, for what is misaligned only.
    const std::vector<float> x = numbers(count + (count > kThreads ? 4 : 0));
    std::vector<float> y(count, NAN);
    GREEDYNAS_LAUNCH(kernel, dim3(1), dim3(threads), bytes, nullptr, x.data(), y.data(), wrong);
    expect(y, {x.begin(), x.begin() + count});
  };
}

float sum_of(const std::vector<float>& x) {
  float sum = 0.f;
  for (float value : x) sum += value;
  return sum;
}

const std::map<std::string, std::function<void(bool)>> kCases = {
    {"global_bounds",
     [](bool wrong) {
       const std::vector<float> x = numbers(100);
       std::vector<float> y(100, NAN);
       GREEDYNAS_LAUNCH(global_bounds, dim3(2), dim3(kThreads), 0, nullptr, x.data(), y.data(), 100, wrong);
       if (!wrong) expect(y, x);
     }},
    {"shared_bounds", copies(shared_bounds)},
    {"dynamic_shared_bounds", copies(dynamic_shared_bounds, kThreads, kThreads, kThreads * sizeof(float))},
    {"unwritten", copies(unwritten)},
    {"missing_barrier",
     [](bool wrong) {
       const std::vector<float> x = numbers(kThreads);
       std::vector<float> y(kThreads, NAN);
       GREEDYNAS_LAUNCH(missing_barrier, dim3(1), dim3(kThreads), 0, nullptr, x.data(), y.data(), wrong);
       expect(y, x);
     }},
    {"missing_second_barrier", copies(missing_second_barrier)},
    {"missing_warp_barrier", copies(missing_warp_barrier)},
    {"accumulate",
     [](bool wrong) {
       const std::vector<float> x = numbers(kBlocks);
       std::vector<float> sum(1, 0.f);
       GREEDYNAS_LAUNCH(accumulate, dim3(kBlocks), dim3(kThreads), 0, nullptr, x.data(), sum.data(), wrong);
       expect(sum, {sum_of(x)});
     }},
    {"last_block",
     [](bool wrong) {
       const std::vector<float> x = numbers(kBlocks);
       std::vector<float> parts(kBlocks, NAN), sum(1, NAN);
       std::vector<unsigned> done(1, 0);
       GREEDYNAS_LAUNCH(last_block, dim3(kBlocks), dim3(32), 0, nullptr, x.data(), parts.data(), done.data(),
                        sum.data(), wrong);
       expect(sum, {sum_of(x)});
     }},
    {"divergent_barrier", copies(divergent_barrier)},
    {"barrier_in_branch", copies(barrier_in_branch)},
    {"divergent_shuffle", copies(divergent_shuffle)},
    {"shuffle_of_those_who_left", copies(shuffle_of_those_who_left)},
    {"shuffle_beyond_mask", copies(shuffle_beyond_mask)},
    {"misaligned_load",
     [](bool wrong) {  // what is loaded from there is right, only a device refuses
       const std::vector<float> x = numbers(4 * kThreads + 1);
       std::vector<float> y(4 * kThreads, NAN);
       GREEDYNAS_LAUNCH(misaligned_load, dim3(1), dim3(kThreads), 0, nullptr, x.data(), y.data(), wrong);
       expect(y, {x.begin() + wrong, x.end() - !wrong});
     }},
    {"misaligned_copy", copies(misaligned_copy, 4 * kThreads)},
    {"read_before_copy_lands", copies(read_before_copy_lands, 8 * kThreads)},
    {"read_of_others_copy", copies(read_of_others_copy, 4 * kThreads)},
    {"copy_never_waited_for", copies(copy_never_waited_for, 4 * kThreads)},
    {"copy_on_sm_75",
     [](bool wrong) {
       emu::cfg.arch = 750;
       const auto run = copies(copy_on_sm_75, 4 * kThreads);
       try {
         run(wrong);
       } catch (...) {
         emu::cfg.arch = 800;
         throw;
       }
       emu::cfg.arch = 800;
     }},
    {"fragment_layout",
     [](bool wrong) {
       const std::vector<float> a = numbers(16 * 16), b = numbers(16 * 8);
       std::vector<float> y(16 * 8, NAN), product(16 * 8, 0.f);
       for (int row = 0; row < 16; ++row) {
         for (int column = 0; column < 8; ++column) {
           for (int k = 0; k < 16; ++k) product[row * 8 + column] += a[row * 16 + k] * b[k * 8 + column];
         }
       }
       GREEDYNAS_LAUNCH(fragment_layout, dim3(1), dim3(32), 0, nullptr, a.data(), b.data(), y.data(), wrong);
       expect(y, product);
     }},
    {"misaligned_matrix", copies(misaligned_matrix, 4 * 32, 32)},
    {"large_dynamic",
     [](bool wrong) {
       const std::vector<float> x = numbers(kThreads);
       std::vector<float> y(kThreads, NAN);
       GREEDYNAS_LAUNCH(large_dynamic, dim3(1), dim3(kThreads), 99 * 1024 + wrong, nullptr, x.data(),
                        y.data());
       expect(y, x);
     }},
    {"large_static",
     [](bool wrong) {
       const std::vector<float> x = numbers(kThreads);
       std::vector<float> y(kThreads, NAN);
       if (wrong) {
         GREEDYNAS_LAUNCH(large_static<12 * 1024 + 1>, dim3(1), dim3(kThreads), 0, nullptr, x.data(),
                          y.data());
       } else {
         GREEDYNAS_LAUNCH(large_static<12 * 1024>, dim3(1), dim3(kThreads), 0, nullptr, x.data(), y.data());
       }
       expect(y, x);
     }},
};

// Forward, backward, and several by chance.
int execute(const std::string& name, bool wrong) {
  for (unsigned schedule = 0; schedule < 8; ++schedule) {
    emu::cfg.order = static_cast<emu::Order>(std::min(schedule, 2u));
    emu::cfg.seed = schedule;
    try {
      kCases.at(name)(wrong);
    } catch (const std::runtime_error& error) {
      std::printf("%s\n", error.what());
      return 1;
    }
  }
  std::printf("as expected\n");
  return 0;
}

// After an error that the emulator found, the next launch is as if nothing had been.
int recover(const std::string& name) {
  try {
    kCases.at(name)(true);
  } catch (const std::runtime_error& error) {
    if (std::string(error.what()).starts_with("emulation: ")) return execute(name, false);
  }
  std::printf("no error\n");
  return 1;
}

// ---- one warp's operations

struct Registers {
  unsigned a[4], b[2];
  float c[4];
};

__global__ void multiply(const Registers* in, float* out, bool bf16) {
  const Registers& own = in[threadIdx.x];
  float c[4], first[4];
  for (int i = 0; i < 4; ++i) c[i] = own.c[i];
  if (bf16) {
    multiply_bf16(c, own.a, own.b[0], own.b[1]);
    multiply_bf16_first(first, own.a, own.b[0], own.b[1]);
  } else {
    multiply_half(c, own.a, own.b[0], own.b[1]);
    multiply_half_first(first, own.a, own.b[0], own.b[1]);
  }
  for (int i = 0; i < 4; ++i) {
    out[threadIdx.x * 8 + i] = c[i];
    out[threadIdx.x * 8 + 4 + i] = first[i];
  }
}

// Row r of all four matrices' 32 rows lies at 16 * (r * 5 % 32): rows may be anywhere.
__global__ void load(const uint4* in, unsigned* out, bool transposed) {
  GREEDYNAS_SHARED(uint4, rows, [32]);
  rows[threadIdx.x * 5 % 32] = in[threadIdx.x];
  __syncthreads();
  unsigned r[4];
  if (transposed) {
    load_matrices_transposed(r, &rows[threadIdx.x * 5 % 32]);
  } else {
    load_matrices(r, &rows[threadIdx.x * 5 % 32]);
  }
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = r[i];
}

template <typename In, typename Out, typename Kernel>
int operate(Kernel kernel, int outputs, bool variant) {
  std::vector<In> in(32);
  std::vector<Out> out(outputs);
  if (std::fread(in.data(), sizeof(In), in.size(), stdin) != in.size()) return 2;
  GREEDYNAS_LAUNCH(kernel, dim3(1), dim3(32), 0, nullptr, in.data(), out.data(), variant);
  std::fwrite(out.data(), sizeof(Out), out.size(), stdout);
  return 0;
}

// ---- the order of threads

__global__ void note_order(int* order, int* count) {
  order[atomicAdd(count, 1)] = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}

int print_order() {
  std::vector<int> order(8), count(1);
  try {
    GREEDYNAS_LAUNCH(note_order, dim3(2), dim3(4), 0, nullptr, order.data(), count.data());
  } catch (const std::runtime_error& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  for (int thread : order) std::printf("%d ", thread);
  std::printf("\n");
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string name = count > 1 ? arguments[1] : "", variant = count > 2 ? arguments[2] : "";
  if (name == "multiply_bf16" || name == "multiply_f16" || name == "multiply_f16_on_sm_75") {
    if (name == "multiply_f16_on_sm_75") emu::cfg.arch = 750;
    return operate<Registers, float>(multiply, 32 * 8, name == "multiply_bf16");
  }
  if (name == "load_matrices" || name == "load_matrices_transposed") {
    return operate<uint4, unsigned>(load, 32 * 4, name == "load_matrices_transposed");
  }
  if (name == "order") return print_order();
  if (name == "all" && variant == "right") {
    for (const auto& [each, function] : kCases) {
      std::printf("%s: ", each.c_str());
      if (execute(each, false)) return 1;
    }
    return 0;
  }
  if (kCases.count(name) && variant == "recovers") return recover(name);
  if (kCases.count(name) && (variant == "right" || variant == "wrong")) {
    return execute(name, variant == "wrong");
  }
  std::fprintf(stderr, "usage: planted NAME right|wrong|recovers\n");
  return 2;
}
