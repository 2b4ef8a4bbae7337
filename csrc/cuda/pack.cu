// Weights in the layouts and number formats that the other kernels read, from float as modules hold them.
// They are packed at every call, so all of it is small: a few launches for all operations of a network.
#include "device.h"
#include "kernels.h"

namespace greedynas::cuda {
namespace {

constexpr int kThreads = 256;

// Root mean squares of 2^kHalfExponent at most, or 1.4 times that: the largest of n normalised values is at
// most sqrt(n), so that the sum of 49 of them, of 10 million values each, stays within half precision; what
// rounds to 0 is a millionth.
constexpr int kHalfExponent = -2;
constexpr int kLargestExponent = 100;  // of factors, either way

// Magnitudes are compared by their bits, so that NaN is larger than inf and inf than all others.
__device__ __forceinline__ int magnitude_bits(float x) { return __float_as_int(x) & 0x7fffffff; }

__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }
__device__ __forceinline__ int exponent_of(float power) { return (__float_as_int(power) >> 23) - 127; }

// That of the power of two that brings a magnitude to [2^(exponent - 1), 2^exponent); 0 for 0 and what is not
// finite.
__device__ __forceinline__ int exponent_to(int magnitude, int exponent) {
  if (magnitude == 0 || magnitude >= 0x7f800000) return 0;
  const int own = (magnitude >> 23) - 127;  // the magnitude is below 2^(own + 1)
  return min(max(exponent - 1 - own, -kLargestExponent), kLargestExponent);
}

template <typename Node, typename Blocks>
dim3 grid_of(const Group<Node>& group, Blocks blocks) {
  int most = 1;
  for (int i = 0; i < group.count; ++i) most = most > blocks(group.nodes[i]) ? most : blocks(group.nodes[i]);
  return dim3(most, group.count);
}

// Whether rows of that many floats begin at multiples of 16 bytes.
__device__ __forceinline__ bool takes_vectors(const float* rows, int columns) {
  return columns % 4 == 0 && reinterpret_cast<uintptr_t>(rows) % 16 == 0;
}

// Eight values of a row of floats, zeros behind its end.
__device__ __forceinline__ void load_eight(const float* row, int column, int columns, bool vectors,
                                           float (&values)[8]) {
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    if (vectors) {
      float4 four = make_float4(0.f, 0.f, 0.f, 0.f);
      if (column + i < columns) four = *reinterpret_cast<const float4*>(row + column + i);
      values[i] = four.x, values[i + 1] = four.y, values[i + 2] = four.z, values[i + 3] = four.w;
    } else {
#pragma unroll
      for (int j = i; j < i + 4; ++j) values[j] = column + j < columns ? row[column + j] : 0.f;
    }
  }
}

// ---- BatchNorm: a thread per channel

__global__ void __launch_bounds__(kThreads) norm_kernel(const __grid_constant__ Group<PackNorm> group) {
  const PackNorm& node = group.nodes[blockIdx.y];
  const int channel = blockIdx.x * kThreads + threadIdx.x;
  if (channel >= row_channels(node.channels)) return;
  const bool real = channel < node.channels;
  const float gamma = real ? (node.gamma ? node.gamma[channel] : 1.f) : 0.f;
  const float beta = real && node.beta ? node.beta[channel] : 0.f;
  node.packed_gamma[channel] = gamma;
  node.packed_beta[channel] = beta;
  if (node.factor) {
    node.factor[channel] =
        power_of_two(exponent_to(max(magnitude_bits(gamma), magnitude_bits(beta)), kHalfExponent));
  }
}

// ---- pointwise: a thread per 8 columns of a row

__global__ void __launch_bounds__(kThreads)
    pointwise_kernel(const __grid_constant__ Group<PackPointwise> group) {
  const PackPointwise& node = group.nodes[blockIdx.y];
  const int item = blockIdx.x * kThreads + threadIdx.x, items = node.packed_columns / 8;
  const int row = item / items, column = item % items * 8;
  if (row >= row_channels(node.rows)) return;
  const int taps = node.taps, in = node.in_channels, columns = in * taps;
  float values[8] = {};
  if (row < node.rows) {
    const float* weight = node.weight + int64_t{row} * (node.weight ? columns : 0);
    if (!node.weight) {
#pragma unroll
      for (int i = 0; i < 8; ++i) values[i] = column + i == row ? 1.f : 0.f;
    } else if (taps == 1) {
      load_eight(weight, column, columns, takes_vectors(node.weight, columns), values);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int tap = (column + i) / in, channel = (column + i) % in;
        if (column + i < columns) values[i] = weight[channel * taps + tap];
      }
    }
  }
  uint4 packed = {pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3]),
                  pack_bf16(values[4], values[5]), pack_bf16(values[6], values[7])};
  *reinterpret_cast<uint4*>(node.packed + int64_t{row} * node.packed_columns + column) = packed;
}

// ---- depthwise: a block per 64 channels, which turns their weights round in shared memory

constexpr int kBlockChannels = 64;
constexpr int kChannelThreads = kThreads / kBlockChannels;  // that look for a channel's largest weight

__global__ void __launch_bounds__(kThreads)
    depthwise_kernel(const __grid_constant__ Group<PackDepthwise> group) {
  GREEDYNAS_DYNAMIC_SHARED(shared);
  GREEDYNAS_SHARED(float, factors, [kBlockChannels]);
  const PackDepthwise& node = group.nodes[blockIdx.y];
  const int stride = row_channels(node.channels), taps = node.taps, thread = threadIdx.x;
  const int first = blockIdx.x * kBlockChannels;
  if (first >= stride) return;
  float* weights = reinterpret_cast<float*>(shared);  // [kBlockChannels][taps]
  const int real = (min(node.channels - first, kBlockChannels)) * taps;
  const float* source = node.weight + int64_t{first} * taps;
  for (int i = thread; i < kBlockChannels * taps; i += kThreads) weights[i] = i < real ? source[i] : 0.f;
  __syncthreads();

  const int channel = thread / kChannelThreads;
  int largest = 0;
  for (int tap = thread % kChannelThreads; tap < taps; tap += kChannelThreads)
    largest = max(largest, magnitude_bits(weights[channel * taps + tap]));
#pragma unroll
  for (int distance = 1; distance < kChannelThreads; distance *= 2)
    largest = max(largest, __shfl_xor_sync(~0u, largest, distance));
  if (thread % kChannelThreads == 0) {
    int exponent = exponent_to(largest, 0), before = 0;
    if (node.before_factor && first + channel < node.channels) {
      // Neither may the product leave the range of float: what is smaller still is nothing beside BatchNorm's
      // eps.
      before = exponent_of(node.before_factor[first + channel]);
      exponent = min(max(exponent, -kLargestExponent - before), kLargestExponent - before);
    }
    factors[channel] = power_of_two(exponent);
    if (first + channel < stride) node.stored_factor[first + channel] = power_of_two(before + exponent);
  }
  __syncthreads();

  const int pair = thread % (kBlockChannels / 2) * 2;
  if (first + pair >= stride) return;
  for (int tap = thread / (kBlockChannels / 2); tap < taps; tap += kThreads / (kBlockChannels / 2)) {
    *reinterpret_cast<unsigned*>(node.packed + int64_t{tap} * stride + first + pair) = pack_half(
        weights[pair * taps + tap] * factors[pair], weights[(pair + 1) * taps + tap] * factors[pair + 1]);
  }
}

// ---- projection: a warp per row, which it reads twice, the second time from a cache

// Eight weights, divided by the powers of two of their columns.
__device__ __forceinline__ void load_divided(const PackProject& node, const float* row, int column,
                                             bool vectors, float (&values)[8]) {
  load_eight(row, column, node.columns, vectors, values);
  if (!node.column_factor) return;
  float factors[8];
  load_eight(node.column_factor, column, row_channels(node.columns), true, factors);
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] *= power_of_two(-exponent_of(factors[i]));
}

__global__ void __launch_bounds__(kThreads) project_kernel(const __grid_constant__ Group<PackProject> group) {
  const PackProject& node = group.nodes[blockIdx.y];
  const int row = blockIdx.x * (kThreads / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= row_channels(node.rows)) return;
  const bool real = row < node.rows, vectors = takes_vectors(node.weight, node.columns);
  const int stride = row_channels(node.columns);
  const float* weight = node.weight + int64_t{real ? row : 0} * node.columns;
  int largest = 0;
  if (real) {
#pragma unroll 4
    for (int column = lane * 8; column < stride; column += 32 * 8) {
      float values[8];
      load_divided(node, weight, column, vectors, values);
#pragma unroll
      for (int i = 0; i < 8; ++i) largest = max(largest, magnitude_bits(values[i]));
    }
  }
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2)
    largest = max(largest, __shfl_xor_sync(~0u, largest, distance));
  const int exponent = exponent_to(largest, 0);
  if (lane == 0) node.factor[row] = power_of_two(-exponent);
  const float factor = power_of_two(exponent);
  uint16_t* packed = node.packed + int64_t{row} * stride;
#pragma unroll 2
  for (int column = lane * 8; column < stride; column += 32 * 8) {
    float values[8] = {};
    if (real) load_divided(node, weight, column, vectors, values);
    uint4 eight = {
        pack_half(values[0] * factor, values[1] * factor), pack_half(values[2] * factor, values[3] * factor),
        pack_half(values[4] * factor, values[5] * factor), pack_half(values[6] * factor, values[7] * factor)};
    *reinterpret_cast<uint4*>(packed + column) = eight;
  }
}

}  // namespace

void pack_norms(const Group<PackNorm>& group, Stream stream) {
  const dim3 grid =
      grid_of(group, [](const PackNorm& node) { return ceil_div(row_channels(node.channels), kThreads); });
  GREEDYNAS_LAUNCH((norm_kernel), grid, dim3(kThreads), 0, stream, group);
}

void pack_pointwise(const Group<PackPointwise>& group, Stream stream) {
  const dim3 grid = grid_of(group, [](const PackPointwise& node) {
    return ceil_div(row_channels(node.rows) * (node.packed_columns / 8), kThreads);
  });
  GREEDYNAS_LAUNCH((pointwise_kernel), grid, dim3(kThreads), 0, stream, group);
}

void pack_depthwise(const Group<PackDepthwise>& group, Stream stream) {
  const dim3 grid =
      grid_of(group, [](const PackDepthwise& node) { return ceil_div(node.channels, kBlockChannels); });
  int taps = 1;
  for (int i = 0; i < group.count; ++i) taps = taps > group.nodes[i].taps ? taps : group.nodes[i].taps;
  GREEDYNAS_LAUNCH((depthwise_kernel), grid, dim3(kThreads), kBlockChannels * taps * sizeof(float), stream,
                   group);
}

void pack_project(const Group<PackProject>& group, Stream stream) {
  const dim3 grid = grid_of(
      group, [](const PackProject& node) { return ceil_div(row_channels(node.rows), kThreads / 32); });
  GREEDYNAS_LAUNCH((project_kernel), grid, dim3(kThreads), 0, stream, group);
}

}  // namespace greedynas::cuda
