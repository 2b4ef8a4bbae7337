// From sums to the affine maps of BatchNorm.
//
// norm_affine: a block joins all units of 8 channels, 32 bytes of each of a unit's rows. pointwise_affine: a
// block multiplies 32 rows of the weights W with the upper triangle of the covariance S, which tensor cores
// do without loss: weights are of 16 bits already, and a float is the sum of three such numbers.
#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "device.h"
#include "kernels.h"
#include "norm_channel.cuh"
#include "numbers.h"
#include "powers.h"

namespace greedynas::cuda {
namespace {

constexpr int kSlice = 8;          // channels of a block
constexpr int kNormThreads = 512;  // two to a unit
constexpr int kBatch = 4;          // units that a thread has on the way, and sums up in float

struct Sums {
  double count = 0, sum = 0, squares = 0;

  __device__ __forceinline__ void add(const Sums& other) {
    count += other.count;
    sum += other.sum;
    squares += other.squares;
  }
  __device__ __forceinline__ Sums of_lane(int distance) const {
    Sums result;
    result.count = __shfl_xor_sync(~0u, count, distance);
    result.sum = __shfl_xor_sync(~0u, sum, distance);
    result.squares = __shfl_xor_sync(~0u, squares, distance);
    return result;
  }
};

// Four channels of kBatch units: pilots, sums, squares, counts.
struct Units {
  float4 rows[kBatch][4];

  __device__ __forceinline__ void load(const float* partials, int row, int unit, int units) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int u = unit + i * kNormThreads / 2;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        rows[i][j] = float4{0.f, 0.f, 0.f, 0.f};
        if (u < units) {
          rows[i][j] = *reinterpret_cast<const float4*>(partials + (int64_t{4} * u + j) * row);
        }
      }
    }
  }
  // The sums of one of the channels, from a pilot that all units share.
  __device__ __forceinline__ Sums joined(float float4::* channel, float shared_pilot) const {
    float count = 0.f, sum = 0.f, squares = 0.f;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const float n = rows[i][3].*channel;
      const bool some = n > 0.f;
      const float distance = some ? rows[i][0].*channel - shared_pilot : 0.f;
      const float own = some ? rows[i][1].*channel : 0.f, moved = own + n * distance;
      count += some ? n : 0.f;
      sum += moved;
      squares += (some ? rows[i][2].*channel : 0.f) + distance * (own + moved);
    }
    Sums result;
    result.count = count;
    result.sum = sum;
    result.squares = squares;
    return result;
  }
};

__global__ void __launch_bounds__(kNormThreads) norm_kernel(const __grid_constant__ Group<NormAffine> group) {
  const NormAffine& n = group.nodes[blockIdx.y];
  const int row = row_channels(n.channels), first = blockIdx.x * kSlice, thread = threadIdx.x;
  if (first >= row) return;
  const int c = first + thread % kSlice;
  const Channel channel(n.norm, n.stored_factor, c, n.channels);
  if (n.mean) {
    if (thread >= kSlice) return;
    channel.write(n.mean[c], n.variance[c], n.norm.eps, n.activation, c, n.channels, n.affine, n.keep);
    return;
  }

  const int units = n.units, lane = thread % 32, warp = thread / 32;
  const float* partials = n.partials + first + 4 * (thread % 2);
  Units loaded;
  loaded.load(partials, row, thread / 2, units);
  GREEDYNAS_SHARED(float4, pilots, [kSlice / 4]);
  if (thread < kSlice / 4) {  // of the first unit that is not empty
    float4 pilot = loaded.rows[0][0];
    if (!(loaded.rows[0][3].x > 0.f)) {
      int unit = 1;
      while (unit < units && !(partials[(int64_t{4} * unit + 3) * row] > 0.f)) ++unit;
      if (unit < units) pilot = *reinterpret_cast<const float4*>(partials + int64_t{4} * unit * row);
    }
    pilots[thread] = pilot;
  }
  __syncthreads();
  const float4 pilot = pilots[thread % 2];
  Sums sums[4];
  for (int unit = thread / 2; unit < units;) {
    sums[0].add(loaded.joined(&float4::x, pilot.x));
    sums[1].add(loaded.joined(&float4::y, pilot.y));
    sums[2].add(loaded.joined(&float4::z, pilot.z));
    sums[3].add(loaded.joined(&float4::w, pilot.w));
    unit += kBatch * kNormThreads / 2;
    if (unit < units) loaded.load(partials, row, unit, units);
  }

  // Half of the lanes go on with two of the channels, half of those with one.
  const bool upper = lane & 16, odd = lane & 8;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Sums given = upper ? sums[i] : sums[2 + i];
    if (upper) sums[i] = sums[2 + i];
    sums[i].add(given.of_lane(16));
  }
  const Sums given = odd ? sums[0] : sums[1];
  Sums total = odd ? sums[1] : sums[0];
  total.add(given.of_lane(8));
  total.add(total.of_lane(4));
  total.add(total.of_lane(2));
  constexpr int kWarps = kNormThreads / 32;
  GREEDYNAS_SHARED(double, of_warps, [kWarps][3][kSlice]);
  if ((lane & 6) == 0) {
    const int place = 4 * (lane % 2) + 2 * upper + odd;
    of_warps[warp][0][place] = total.count;
    of_warps[warp][1][place] = total.sum;
    of_warps[warp][2][place] = total.squares;
  }
  __syncthreads();
  if (thread >= kSlice) return;
  total = Sums();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    total.count += of_warps[w][0][thread];
    total.sum += of_warps[w][1][thread];
    total.squares += of_warps[w][2][thread];
  }
  const double share = 1 / total.count, unstored = 1.f / channel.stored;
  const double distance = total.sum * share, variance = total.squares * share - distance * distance;
  channel.write((reinterpret_cast<const float*>(pilots)[thread] + distance) * unstored,
                variance * unstored * unstored, n.norm.eps, n.activation, c, n.channels, n.affine, n.keep);
}

constexpr int kRows = 32;  // output channels of a block
constexpr int kPointwiseThreads = 512;
constexpr int kAhead = 4;  // tiles of the covariance that a warp has on the way

// Words of a row of weights in shared memory: 8 bytes of each of four rows have to lie in different banks.
__device__ __host__ constexpr int weight_pitch(int depth) {
  return depth / 2 % 16 == 8 ? depth / 2 : depth / 2 + 8;
}
// Shared memory: weights, and the mean.
int pointwise_bytes(int in_channels) {
  const int depth = round_up(in_channels, 16);
  return 4 * (kRows * weight_pitch(depth) + depth);
}

// 16 x 16 tiles on and above the diagonal of a symmetric matrix: column by column, down to the diagonal.
struct Tile {
  int column, row;
  __device__ explicit Tile(int index) : column(0), row(index) {
    while (row > column) row -= ++column;
  }
  __device__ void advance() {
    if (row == column) {
      ++column;
      row = 0;
    } else {
      ++row;
    }
  }
};

// A tile's columns 8h + lane / 4, rows 4 (lane % 4) and three more: operands B (device.h), if the rows are
// taken in another order than they have, which sums do not mind.
struct Covariances {
  float4 rows[2];
  __device__ __forceinline__ void load(const float* covariance, int floats, const Tile& at, int lane) {
    const int row = 16 * at.row + 4 * (lane % 4);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int column = 16 * at.column + 8 * h + lane / 4;
      rows[h] = float4{0.f, 0.f, 0.f, 0.f};
      if (column < floats && row < floats) {
        rows[h] = *reinterpret_cast<const float4*>(covariance + static_cast<int64_t>(column) * floats + row);
      }
    }
  }
};

// x = high + middle + low
template <typename T>
struct Split {
  unsigned high, middle, low;
  __device__ __forceinline__ Split(float x, float y) {
    high = rest_of(x, y);
    middle = rest_of(x, y);
    low = Pair<T>::pack(x, y);
  }

 private:
  static __device__ __forceinline__ unsigned rest_of(float& x, float& y) {
    const unsigned pair = Pair<T>::pack(x, y);
    const float2 taken = Pair<T>::unpack(pair);
    x -= taken.x;
    y -= taken.y;
    return pair;
  }
};

// The exponent of the power of two that brings a warp's tile to where T has numbers: of halves three have the
// digits of every float that is not 2^14 times smaller than the largest one.
template <typename T>
__device__ __forceinline__ int exponent_of_tile(const Covariances& tile) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return 0;
  } else {
    int largest = 0;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float4& r = tile.rows[h];
      largest = max(max(largest, max(magnitude_bits(r.x), magnitude_bits(r.y))),
                    max(magnitude_bits(r.z), magnitude_bits(r.w)));
    }
    return exponent_to(largest_of_lanes(largest, 32), 14);
  }
}

template <typename T>
__global__ void __launch_bounds__(kPointwiseThreads)
    pointwise_kernel(const __grid_constant__ Group<PointwiseAffine<T>> group) {
  if (!computes<T>()) return;
  const PointwiseAffine<T>& p = group.nodes[blockIdx.y];
  const int row = row_channels(p.channels), first = blockIdx.x * kRows;
  if (first >= row) return;
  const int in = row_channels(p.in_channels), depth = round_up(in, 16), pitch = weight_pitch(depth);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  constexpr int kWarps = kPointwiseThreads / 32;
  const int c = first + thread % kRows;
  const Channel channel(p.norm, p.stored_factor, c, p.channels);

  const int columns = depth / 16, tiles = columns * (columns + 1) / 2;
  const int begin = tiles * warp / kWarps, end = tiles * (warp + 1) / kWarps;
  Tile at(begin), next(begin);
  Covariances loaded[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (begin + i >= end) break;
    loaded[i].load(p.covariance, in, next, lane);
    next.advance();
  }

  GREEDYNAS_DYNAMIC_SHARED(memory);
  auto* weight = reinterpret_cast<unsigned*>(memory);  // [kRows][pitch], pairs
  auto* mean = reinterpret_cast<float*>(weight + kRows * pitch);
  for (int i = thread; i < kRows * depth / 8; i += kPointwiseThreads) {
    const int r = i / (depth / 8), k = i % (depth / 8) * 8;
    uint4 value{0, 0, 0, 0};
    if (first + r < row && k < in) {
      value = *reinterpret_cast<const uint4*>(p.weight + static_cast<int64_t>(first + r) * in + k);
    }
    *reinterpret_cast<uint4*>(weight + r * pitch + k / 2) = value;
  }
  for (int k = thread; k < in; k += kPointwiseThreads) mean[k] = p.mean[k];
  __syncthreads();

  double variance[2][2] = {};  // of rows 16m + lane / 4 and 8 further
  float acc[2][2][4] = {};     // W S, rows 16m and up, columns 8h and up
  for (int tile = begin; tile < end; tile += kAhead) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (tile + i >= end) break;
      const Covariances now = loaded[i];
      if (tile + i + kAhead < end) {
        loaded[i].load(p.covariance, in, next, lane);
        next.advance();
      }
      unsigned a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const unsigned* pairs =
              weight + (16 * m + 8 * half + lane / 4) * pitch + 8 * at.row + 2 * (lane % 4);
          const float2 two = *reinterpret_cast<const float2*>(pairs);
          a[m][half] = __float_as_uint(two.x);
          a[m][2 + half] = __float_as_uint(two.y);
        }
      }
      const int exponent = exponent_of_tile<T>(now);
      const float brought = power_of_two(exponent);
      const float share =
          power_of_two((at.row < at.column ? 1 : 0) - exponent);  // 2: the tile below the diagonal
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float4& r = now.rows[h];
        const Split<T> b0(r.x * brought, r.y * brought), b1(r.z * brought, r.w * brought);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          float sum[4];  // tensor cores truncate: they sum up one tile only
          Pair<T>::multiply_first(sum, a[m], b0.low, b1.low);
          Pair<T>::multiply(sum, a[m], b0.middle, b1.middle);
          Pair<T>::multiply(sum, a[m], b0.high, b1.high);
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[m][h][e] += share * sum[e];
        }
      }
      if (at.row == at.column || tile + i + 1 == end) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float sum = 0.f;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const float2 w = Pair<T>::unpack(
                  weight[(16 * m + 8 * half + lane / 4) * pitch + 8 * at.column + 4 * h + lane % 4]);
              sum += acc[m][h][2 * half] * w.x + acc[m][h][2 * half + 1] * w.y;
              acc[m][h][2 * half] = acc[m][h][2 * half + 1] = 0.f;
            }
            variance[m][half] += sum;
          }
        }
      }
      at.advance();
    }
  }

  GREEDYNAS_SHARED(double, means, [kRows]);
  for (int r = warp; r < kRows; r += kWarps) {
    double sum = 0;
    for (int pair = lane; 2 * pair < in; pair += 32) {
      const float2 w = Pair<T>::unpack(weight[r * pitch + pair]);
      sum += static_cast<double>(w.x) * mean[2 * pair];
      sum += static_cast<double>(w.y) * mean[2 * pair + 1];
    }
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (lane == 0) means[r] = sum;
  }
  GREEDYNAS_SHARED(double, of_warps, [kWarps][kRows]);
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      double sum = variance[m][half];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (lane % 4 == 0) of_warps[warp][16 * m + 8 * half + lane / 4] = sum;
    }
  }
  __syncthreads();
  if (thread >= kRows || c >= row) return;
  double sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += of_warps[w][thread];
  const double unstored = 1.f / channel.stored;
  channel.write(means[thread] * unstored, sum * unstored * unstored, p.norm.eps, p.activation, c, p.channels,
                p.affine, p.keep);
}

// The most blocks that a node needs.
template <typename Node, typename Blocks>
int most(const Group<Node>& group, const Blocks& blocks_of) {
  int result = 0;
  for (int i = 0; i < group.count; ++i) result = std::max(result, blocks_of(group.nodes[i]));
  return result;
}

}  // namespace

void norm_affine(const Group<NormAffine>& group, Stream stream) {
  const int blocks =
      most(group, [](const NormAffine& n) { return ceil_div(row_channels(n.channels), kSlice); });
  GREEDYNAS_LAUNCH(norm_kernel, dim3(blocks, group.count), dim3(kNormThreads), 0, stream, group);
}

template <typename T>
void pointwise_affine(const Group<PointwiseAffine<T>>& group, Stream stream) {
  using Node = PointwiseAffine<T>;
  const int blocks = most(group, [](const Node& p) { return ceil_div(row_channels(p.channels), kRows); });
  const int bytes = most(group, [](const Node& p) { return pointwise_bytes(p.in_channels); });
  GREEDYNAS_LAUNCH((pointwise_kernel<T>), dim3(blocks, group.count), dim3(kPointwiseThreads), bytes, stream,
                   group);
}

template void pointwise_affine(const Group<PointwiseAffine<BFloat16>>&, Stream);
template void pointwise_affine(const Group<PointwiseAffine<Half>>&, Stream);

}  // namespace greedynas::cuda
