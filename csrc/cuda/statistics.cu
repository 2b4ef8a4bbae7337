// From sums to the affine maps of BatchNorm.
//
// norm_affine: a block joins all units of 8 channels, 32 bytes of each of a unit's rows. pointwise_affine: a
// block multiplies 32 rows of the weights W with the upper triangle of the covariance S, which tensor cores
// do without loss: weights are bfloat16 already, and a float is the sum of three.
#include <algorithm>
#include <cstdint>

#include "choice_block.h"
#include "device.h"
#include "kernels.h"

namespace greedynas::cuda {
namespace {

// Of values multiplied by `stored`; mean and variance are not.
struct Channel {
  double mean, variance;
  float stored;
};

__device__ __forceinline__ float bound_of(int activation, float factor) {
  if (activation == kRelu6) return 6.f * factor;
  if (activation == kHswish) return 1.f / (6.f * factor);
  if (activation == kSilu) return 1.f / factor;
  return 0.f;
}

__device__ __forceinline__ void write_channel(const BatchNorm& norm, int activation, int channels, int c,
                                              const Channel& of, float* affine, float* keep) {
  const int row = row_channels(channels);
  float mean = 0.f, variance = 0.f, scale = 0.f, shift = 0.f, bound = 0.f;
  if (c < channels) {
    const float factor = norm.factor ? norm.factor[c] : 1.f;
    const double clamped = of.variance < 0 ? 0 : of.variance;
    const double slope = norm.gamma[c] / sqrt(clamped + norm.eps);
    mean = static_cast<float>(of.mean);
    variance = static_cast<float>(clamped);
    scale = static_cast<float>(factor * slope / of.stored);
    shift = static_cast<float>(factor * (norm.beta[c] - of.mean * slope));
    bound = bound_of(activation, factor);
  }
  affine[c] = scale;
  affine[row + c] = shift;
  affine[2 * row + c] = bound;
  if (keep) {
    keep[c] = mean;
    keep[row + c] = variance;
  }
}

constexpr int kSlice = 8;          // channels of a block
constexpr int kNormThreads = 512;  // two to a unit
constexpr int kBatch = 4;          // units that a thread has on the way

struct Sums {
  double count = 0, sum = 0, squares = 0;
};

__device__ __forceinline__ float4 load4(const float* from) { return *reinterpret_cast<const float4*>(from); }

// A unit's sums, brought to a pilot that all units share.
__device__ __forceinline__ void join(Sums& to, float shared_pilot, float pilot, float sum, float squares,
                                     float count) {
  if (!(count > 0.f)) return;
  const double distance = static_cast<double>(pilot) - shared_pilot;
  to.count += count;
  to.sum += sum + count * distance;
  to.squares += squares + distance * (2 * static_cast<double>(sum) + count * distance);
}

__global__ void __launch_bounds__(kNormThreads) norm_kernel(const __grid_constant__ Group<NormAffine> group) {
  const NormAffine& n = group.nodes[blockIdx.y];
  const int row = row_channels(n.channels), first = blockIdx.x * kSlice, thread = threadIdx.x;
  if (first >= row) return;
  if (n.mean) {
    const int c = first + thread;
    if (thread >= kSlice) return;
    const float stored = n.stored_factor ? n.stored_factor[c] : 1.f;
    write_channel(n.norm, n.activation, n.channels, c, {n.mean[c], n.variance[c], stored}, n.affine, n.keep);
    return;
  }

  const int units = n.units, lane = thread % 32, warp = thread / 32;
  const float* partials = n.partials + first + 4 * (thread % 2);
  const int64_t unit_floats = int64_t{4} * row;
  float pilot[4] = {};  // of the first unit; 0, which is far at worst, if that is empty
  if (units > 0) {
    const float4 first_pilot = load4(partials), first_count = load4(partials + 3 * row);
    pilot[0] = first_count.x > 0.f ? first_pilot.x : 0.f;
    pilot[1] = first_count.y > 0.f ? first_pilot.y : 0.f;
    pilot[2] = first_count.z > 0.f ? first_pilot.z : 0.f;
    pilot[3] = first_count.w > 0.f ? first_pilot.w : 0.f;
  }
  Sums sums[4];
  for (int unit = thread / 2; unit < units; unit += kBatch * kNormThreads / 2) {
    float4 loaded[kBatch][4] = {};
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int u = unit + i * kNormThreads / 2;
      if (u >= units) break;
#pragma unroll
      for (int j = 0; j < 4; ++j) loaded[i][j] = load4(partials + u * unit_floats + j * row);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const auto& v = loaded[i];
      join(sums[0], pilot[0], v[0].x, v[1].x, v[2].x, v[3].x);
      join(sums[1], pilot[1], v[0].y, v[1].y, v[2].y, v[3].y);
      join(sums[2], pilot[2], v[0].z, v[1].z, v[2].z, v[3].z);
      join(sums[3], pilot[3], v[0].w, v[1].w, v[2].w, v[3].w);
    }
  }

  constexpr int kWarps = kNormThreads / 32;
  GREEDYNAS_SHARED(double, of_warps, [kWarps][3][kSlice]);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    Sums& s = sums[i];
#pragma unroll
    for (int distance = 2; distance < 32; distance *= 2) {
      s.count += __shfl_xor_sync(~0u, s.count, distance);
      s.sum += __shfl_xor_sync(~0u, s.sum, distance);
      s.squares += __shfl_xor_sync(~0u, s.squares, distance);
    }
    if (lane < 2) {
      of_warps[warp][0][4 * lane + i] = s.count;
      of_warps[warp][1][4 * lane + i] = s.sum;
      of_warps[warp][2][4 * lane + i] = s.squares;
    }
  }
  GREEDYNAS_SHARED(float, pilots, [kSlice]);
  if (thread < 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) pilots[4 * thread + i] = pilot[i];
  }
  __syncthreads();
  if (thread >= kSlice) return;
  Sums total;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    total.count += of_warps[w][0][thread];
    total.sum += of_warps[w][1][thread];
    total.squares += of_warps[w][2][thread];
  }
  const int c = first + thread;
  const float stored = n.stored_factor ? n.stored_factor[c] : 1.f;
  const double distance = total.sum / total.count;
  const double variance = total.squares / total.count - distance * distance;
  write_channel(n.norm, n.activation, n.channels, c,
                {(pilots[thread] + distance) / stored, variance / (double{stored} * stored), stored},
                n.affine, n.keep);
}

constexpr int kRows = 32;  // output channels of a block
constexpr int kPointwiseThreads = 256;
constexpr int kAhead = 3;  // tiles of the covariance that a warp has on the way

int pointwise_bytes(int in_channels) { return kRows * (round_up(in_channels, 16) + 8) * 2; }

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

// Two operands B (device.h): [columns 8h and up][pair of rows, b0 or b1].
struct Covariances {
  float2 pair[2][2];
  __device__ void load(const float* covariance, int row_floats, const Tile& at, int lane) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = 16 * at.column + 8 * h, row = 16 * at.row + 8 * half;
        pair[h][half] = float2{0.f, 0.f};
        if (column >= row_floats || row >= row_floats) continue;
        pair[h][half] = *reinterpret_cast<const float2*>(
            covariance + static_cast<int64_t>(column + lane / 4) * row_floats + row + 2 * (lane % 4));
      }
    }
  }
};

// x = high + middle + low
struct Split {
  unsigned high, middle, low;
  __device__ explicit Split(float2 x) {
    high = pack_bf16(x.x, x.y);
    x.x -= low_bf16(high);
    x.y -= high_bf16(high);
    middle = pack_bf16(x.x, x.y);
    low = pack_bf16(x.x - low_bf16(middle), x.y - high_bf16(middle));
  }
};

__global__ void __launch_bounds__(kPointwiseThreads)
    pointwise_kernel(const __grid_constant__ Group<PointwiseAffine> group) {
  const PointwiseAffine& p = group.nodes[blockIdx.y];
  const int row = row_channels(p.channels), first = blockIdx.x * kRows;
  if (first >= row) return;
  const int in = row_channels(p.in_channels), depth = round_up(in, 16), pitch = depth + 8;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  constexpr int kWarps = kPointwiseThreads / 32;

  GREEDYNAS_DYNAMIC_SHARED(memory);
  auto* weight = reinterpret_cast<uint16_t*>(memory);  // [kRows][pitch]
  for (int i = thread; i < kRows * depth / 8; i += kPointwiseThreads) {
    const int r = i / (depth / 8), k = i % (depth / 8) * 8;
    uint4 value{0, 0, 0, 0};
    if (first + r < row && k < in) {
      value = *reinterpret_cast<const uint4*>(p.weight + static_cast<int64_t>(first + r) * in + k);
    }
    *reinterpret_cast<uint4*>(weight + r * pitch + k) = value;
  }
  __syncthreads();

  const auto pair_of = [&](int r, int k) {
    return *reinterpret_cast<const unsigned*>(weight + r * pitch + k);
  };
  GREEDYNAS_SHARED(double, means, [kRows]);
  for (int r = warp; r < kRows; r += kWarps) {
    double sum = 0;
    for (int k = 2 * lane; k < in; k += 64) {
      const unsigned w = pair_of(r, k);
      sum += static_cast<double>(low_bf16(w)) * p.mean[k];
      sum += static_cast<double>(high_bf16(w)) * p.mean[k + 1];
    }
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) sum += __shfl_xor_sync(~0u, sum, distance);
    if (lane == 0) means[r] = sum;
  }

  const int columns = depth / 16, tiles = columns * (columns + 1) / 2;
  const int begin = tiles * warp / kWarps, end = tiles * (warp + 1) / kWarps;
  double variance[2][2] = {};  // of rows 16m + lane / 4 and 8 further
  float acc[2][2][4] = {};     // W S, rows 16m and up, columns 8h and up
  Tile at(begin), next(begin);
  Covariances loaded[kAhead];
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    if (begin + i >= end) break;
    loaded[i].load(p.covariance, in, next, lane);
    next.advance();
  }
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
        load_matrices(a[m], weight + (16 * m + lane % 16) * pitch + 16 * at.row + lane / 16 * 8);
      }
      const float twice = at.row < at.column ? 2.f : 1.f;  // for the tile below the diagonal
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const Split b0(now.pair[h][0]), b1(now.pair[h][1]);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          float c[4];  // tensor cores truncate: they sum up one tile only
          multiply_bf16_first(c, a[m], b0.low, b1.low);
          multiply_bf16(c, a[m], b0.middle, b1.middle);
          multiply_bf16(c, a[m], b0.high, b1.high);
#pragma unroll
          for (int e = 0; e < 4; ++e) acc[m][h][e] += twice * c[e];
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
              const unsigned w =
                  pair_of(16 * m + 8 * half + lane / 4, 16 * at.column + 8 * h + 2 * (lane % 4));
              sum += acc[m][h][2 * half] * low_bf16(w) + acc[m][h][2 * half + 1] * high_bf16(w);
              acc[m][h][2 * half] = acc[m][h][2 * half + 1] = 0.f;
            }
            variance[m][half] += sum;
          }
        }
      }
      at.advance();
    }
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
  if (thread >= kRows || first + thread >= row) return;
  double sum = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += of_warps[w][thread];
  write_channel(p.norm, p.activation, p.channels, first + thread, {means[thread], sum, 1.f}, p.affine,
                p.keep);
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

void pointwise_affine(const Group<PointwiseAffine>& group, Stream stream) {
  const int blocks =
      most(group, [](const PointwiseAffine& p) { return ceil_div(row_channels(p.channels), kRows); });
  const int bytes = most(group, [](const PointwiseAffine& p) { return pointwise_bytes(p.in_channels); });
  GREEDYNAS_LAUNCH(pointwise_kernel, dim3(blocks, group.count), dim3(kPointwiseThreads), bytes, stream,
                   group);
}

}  // namespace greedynas::cuda
