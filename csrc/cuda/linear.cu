// linear: a block computes 64 rows x 64 channels, a thread 8 x 4 of them; of both matrices 16 of the depth at
// a time lie in shared memory, transposed, while the next ones are on the way to registers.
#include <algorithm>
#include <cstdint>

#include "device.h"
#include "kernels.h"

namespace greedynas::cuda {
namespace {

constexpr int kTile = 64;
constexpr int kDepth = 16;
constexpr int kThreads = 128;
constexpr int kRows = 8, kColumns = 4;  // of a thread
constexpr int kPitch = kTile + 4;
constexpr int kLoads = kTile * kDepth / kThreads;

// kTile rows of a matrix with row-major rows of `stride` floats, kDepth columns at a time.
struct Panel {
  const float* matrix;
  int64_t stride;
  int first, rows, depth;
  float loaded[kLoads];

  __device__ void load(int k) {
    const int column = k + threadIdx.x % kDepth;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int row = first + i * (kThreads / kDepth) + threadIdx.x / kDepth;
      loaded[i] = row < rows && column < depth ? matrix[row * stride + column] : 0.f;
    }
  }
  __device__ void store(float (*to)[kPitch]) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      to[threadIdx.x % kDepth][i * (kThreads / kDepth) + threadIdx.x / kDepth] = loaded[i];
    }
  }
};

__device__ __forceinline__ float activated(float x, int activation) {
  if (activation == kLinearRelu) return x < 0.f ? 0.f : x;
  if (activation == kLinearHsigmoid) {
    x += 3.f;
    return (x < 0.f ? 0.f : x > 6.f ? 6.f : x) / 6.f;
  }
  if (activation == kLinearSigmoid) return 1.f / (1.f + expf(-x));
  return x;
}

__device__ __forceinline__ void read4(float* to, const float* from) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  to[0] = v.x;
  to[1] = v.y;
  to[2] = v.z;
  to[3] = v.w;
}

__global__ void __launch_bounds__(kThreads) linear_kernel(const __grid_constant__ Group<Linear> group) {
  const Linear& l = group.nodes[blockIdx.z];
  const int first_row = blockIdx.y * kTile, first_column = blockIdx.x * kTile;
  if (first_row >= l.rows || first_column >= l.out_stride) return;
  GREEDYNAS_SHARED(float, inputs, [2][kDepth][kPitch]);
  GREEDYNAS_SHARED(float, weights, [2][kDepth][kPitch]);
  Panel input{l.input, l.in_stride, first_row, l.rows, l.depth, {}};
  Panel weight{l.weight, l.depth, first_column, l.channels, l.depth, {}};
  // Rows 4y and 32 + 4y, columns 4x.
  const int x = threadIdx.x % (kTile / kColumns), y = threadIdx.x / (kTile / kColumns);

  float acc[kRows][kColumns] = {};
  input.load(0);
  weight.load(0);
  for (int k = 0, buffer = 0; k < l.depth; k += kDepth, buffer ^= 1) {
    input.store(inputs[buffer]);
    weight.store(weights[buffer]);
    __syncthreads();
    if (k + kDepth < l.depth) {
      input.load(k + kDepth);
      weight.load(k + kDepth);
    }
#pragma unroll
    for (int i = 0; i < kDepth; ++i) {
      float a[kRows], b[kColumns];
      read4(a, &inputs[buffer][i][4 * y]);
      read4(a + 4, &inputs[buffer][i][kTile / 2 + 4 * y]);
      read4(b, &weights[buffer][i][4 * x]);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int c = 0; c < kColumns; ++c) acc[r][c] += a[r] * b[c];
      }
    }
  }

  const int column = first_column + kColumns * x;
  float bias[kColumns];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) bias[c] = l.bias && column + c < l.channels ? l.bias[column + c] : 0.f;
  // All columns as one vector, where that is possible: else a warp would touch each sector four times.
  const bool as_vector = column + kColumns <= l.out_stride && l.out_stride % kColumns == 0 &&
                         reinterpret_cast<uintptr_t>(l.output) % sizeof(float4) == 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = first_row + r / 4 * (kTile / 2) + 4 * y + r % 4;
    if (row >= l.rows) break;
    float value[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      value[c] = column + c < l.channels ? activated(acc[r][c] + bias[c], l.activation) : 0.f;
    }
    float* const to = l.output + static_cast<int64_t>(row) * l.out_stride + column;
    if (as_vector) {
      *reinterpret_cast<float4*>(to) = float4{value[0], value[1], value[2], value[3]};
      continue;
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (column + c < l.out_stride) to[c] = value[c];
    }
  }
}

}  // namespace

void linear(const Group<Linear>& group, Stream stream) {
  int rows = 0, columns = 0;
  for (int i = 0; i < group.count; ++i) {
    rows = std::max(rows, group.nodes[i].rows);
    columns = std::max(columns, group.nodes[i].out_stride);
  }
  const dim3 grid(ceil_div(columns, kTile), ceil_div(rows, kTile), group.count);
  GREEDYNAS_LAUNCH(linear_kernel, grid, dim3(kThreads), 0, stream, group);
}

}  // namespace greedynas::cuda
