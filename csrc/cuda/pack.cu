// Weights in the layouts and number formats that the other kernels read, from float as modules hold them.
// They are packed at every call, so all of it is small: a few launches for all operations of a network.
#include "device.h"
#include "kernels.h"
#include "numbers.h"
#include "powers.h"

namespace greedynas::cuda {
namespace {

constexpr int kThreads = 256;

// Root mean squares of 2^kHalfExponent at most, or 1.4 times that: the largest of n normalised values is at
// most sqrt(n), so that the sum of 49 of them, of 10 million values each, stays within half precision; what
// rounds to 0 is a millionth.
constexpr int kHalfExponent = -2;

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

// The same of weights with a pitch, from where the row's first one lies.
__device__ __forceinline__ void load_eight_apart(const float* first, int pitch, int column, int columns,
                                                 float (&values)[8]) {
  const float* from = first + int64_t{column} * pitch;
#pragma unroll
  for (int i = 0; i < 8; ++i, from += pitch) values[i] = column + i < columns ? *from : 0.f;
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

// ---- depthwise: a block per 64 channels, which turns their weights round in shared memory

constexpr int kBlockChannels = 64;
constexpr int kChannelThreads = kThreads / kBlockChannels;  // that look for a channel's largest weight

template <typename Stored>
__global__ void __launch_bounds__(kThreads)
    depthwise_kernel(const __grid_constant__ Group<PackDepthwise<Stored>> group) {
  GREEDYNAS_DYNAMIC_SHARED(shared);
  GREEDYNAS_SHARED(float, factors, [kBlockChannels]);
  const PackDepthwise<Stored>& node = group.nodes[blockIdx.y];
  const int stride = row_channels(node.channels), taps = node.taps, thread = threadIdx.x;
  const int first = blockIdx.x * kBlockChannels;
  if (first >= stride) return;
  float* weights = reinterpret_cast<float*>(shared);  // [kBlockChannels][taps]
  const int real = min(node.channels - first, kBlockChannels);
  if (node.pitch) {
    const float* source = node.weight + first;
    for (int i = thread; i < kBlockChannels * taps; i += kThreads) {
      const int channel = i % kBlockChannels, tap = i / kBlockChannels;
      weights[channel * taps + tap] = channel < real ? source[int64_t{tap} * node.pitch + channel] : 0.f;
    }
  } else {
    const float* source = node.weight + int64_t{first} * taps;
    for (int i = thread; i < kBlockChannels * taps; i += kThreads)
      weights[i] = i < real * taps ? source[i] : 0.f;
  }
  __syncthreads();

  const int channel = thread / kChannelThreads;
  int largest = 0;
  for (int tap = thread % kChannelThreads; tap < taps; tap += kChannelThreads)
    largest = max(largest, magnitude_bits(weights[channel * taps + tap]));
  largest = largest_of_lanes(largest, kChannelThreads);
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
    store2(node.packed + int64_t{tap} * stride + first + pair, weights[pair * taps + tap] * factors[pair],
           weights[(pair + 1) * taps + tap] * factors[pair + 1]);
  }
}

// ---- pointwise and projection: some lanes of a warp per row, which they read twice where it is multiplied,
// the second time from a cache

// Eight weights of a row.
template <typename T>
__device__ __forceinline__ void load_weights(const PackPointwise<T>& node, int row, int column,
                                             float (&values)[8]) {
  const int taps = node.taps, in = node.in_channels, columns = in * taps;
  const float* const weight = node.weight + int64_t{row} * (node.weight ? columns : 0);
  if (!node.weight) {
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = column + i == row ? 1.f : 0.f;
  } else if (node.pitch) {
    load_eight_apart(node.weight + row, node.pitch, column, columns, values);
  } else if (taps == 1) {
    load_eight(weight, column, columns, takes_vectors(node.weight, columns), values);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int tap = (column + i) / in, channel = (column + i) % in;
      values[i] = column + i < columns ? weight[channel * taps + tap] : 0.f;
    }
  }
}
// Divided by the powers of two of their columns.
template <typename Stored>
__device__ __forceinline__ void load_weights(const PackProject<Stored>& node, int row, int column,
                                             float (&values)[8]) {
  if (node.pitch) {
    load_eight_apart(node.weight + row, node.pitch, column, node.columns, values);
  } else {
    load_eight(node.weight + int64_t{row} * node.columns, column, node.columns,
               takes_vectors(node.weight, node.columns), values);
  }
  if (!node.column_factor) return;
  float factors[8];
  load_eight(node.column_factor, column, row_channels(node.columns), true, factors);
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] *= power_of_two(-exponent_of(factors[i]));
}

template <typename T>
__device__ __host__ int columns_of(const PackPointwise<T>& node) {
  return node.packed_columns;
}
template <typename Stored>
__device__ __host__ int columns_of(const PackProject<Stored>& node) {
  return row_channels(node.columns);
}
// To below 2^this a row's largest weight is brought. Images and maps are not normalised: the sum of 150
// numbers up to 6,000 stays within half precision; weights that round to 0 are a millionth of the largest.
template <typename T>
__device__ constexpr int exponent_of_rows(const PackPointwise<T>&) {
  return -4;
}
template <typename Stored>
__device__ constexpr int exponent_of_rows(const PackProject<Stored>&) {
  return 0;
}
// Lanes of a row, as many as have eight columns of it.
template <typename Node>
__device__ __host__ int lanes_of(const Node& node) {
  int lanes = 1;
  while (lanes < 32 && lanes * 8 < columns_of(node)) lanes *= 2;
  return lanes;
}

template <typename Node>
__global__ void __launch_bounds__(kThreads) rows_kernel(const __grid_constant__ Group<Node> group) {
  if (!computes<std::remove_pointer_t<decltype(Node::packed)>>()) return;
  const Node& node = group.nodes[blockIdx.y];
  const int lanes = lanes_of(node), stride = columns_of(node);
  const int row = (blockIdx.x * kThreads + threadIdx.x) / lanes, lane = threadIdx.x % lanes;
  const bool real = row < node.rows;
  float factor = 1.f;
  if (node.stored_factor) {
    int largest = 0;
    if (real) {
#pragma unroll 4
      for (int column = lane * 8; column < stride; column += lanes * 8) {
        float values[8];
        load_weights(node, row, column, values);
#pragma unroll
        for (int i = 0; i < 8; ++i) largest = max(largest, magnitude_bits(values[i]));
      }
    }
    factor = power_of_two(exponent_to(largest_of_lanes(largest, lanes), exponent_of_rows(node)));
  }
  if (row >= row_channels(node.rows)) return;
  if (node.stored_factor && lane == 0) node.stored_factor[row] = factor;
  auto* const packed = node.packed + int64_t{row} * stride;
#pragma unroll 2
  for (int column = lane * 8; column < stride; column += lanes * 8) {
    float values[8] = {};
    if (real) load_weights(node, row, column, values);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] *= factor;
    store8(packed + column, values);
  }
}

template <typename Node>
void pack_rows(const Group<Node>& group, Stream stream) {
  const dim3 grid = grid_of(
      group, [](const Node& node) { return ceil_div(row_channels(node.rows) * lanes_of(node), kThreads); });
  GREEDYNAS_LAUNCH((rows_kernel<Node>), grid, dim3(kThreads), 0, stream, group);
}

}  // namespace

void pack_norms(const Group<PackNorm>& group, Stream stream) {
  const dim3 grid =
      grid_of(group, [](const PackNorm& node) { return ceil_div(row_channels(node.channels), kThreads); });
  GREEDYNAS_LAUNCH((norm_kernel), grid, dim3(kThreads), 0, stream, group);
}

template <typename T>
void pack_pointwise(const Group<PackPointwise<T>>& group, Stream stream) {
  pack_rows(group, stream);
}

template <typename Stored>
void pack_depthwise(const Group<PackDepthwise<Stored>>& group, Stream stream) {
  const dim3 grid = grid_of(
      group, [](const PackDepthwise<Stored>& node) { return ceil_div(node.channels, kBlockChannels); });
  int taps = 1;
  for (int i = 0; i < group.count; ++i) taps = taps > group.nodes[i].taps ? taps : group.nodes[i].taps;
  GREEDYNAS_LAUNCH((depthwise_kernel<Stored>), grid, dim3(kThreads), kBlockChannels * taps * sizeof(float),
                   stream, group);
}

template <typename Stored>
void pack_project(const Group<PackProject<Stored>>& group, Stream stream) {
  pack_rows(group, stream);
}

template void pack_pointwise(const Group<PackPointwise<BFloat16>>&, Stream);
template void pack_pointwise(const Group<PackPointwise<Half>>&, Stream);
template void pack_pointwise(const Group<PackPointwise<float>>&, Stream);
template void pack_depthwise(const Group<PackDepthwise<Half>>&, Stream);
template void pack_depthwise(const Group<PackDepthwise<float>>&, Stream);
template void pack_project(const Group<PackProject<Half>>&, Stream);
template void pack_project(const Group<PackProject<float>>&, Stream);

}  // namespace greedynas::cuda
