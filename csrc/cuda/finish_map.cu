// The last affine map of a block, its activation and residual, applied in place in one pass that also takes
// the moments of what it writes.
//
// A block takes a chunk of the pixels. What arrives in shared memory becomes, in the same place, the distance
// of the result from a pilot, in bfloat16. The second moments are that matrix times its transpose, on tensor
// cores, with both operands from the same registers: of T tiles of 16 channels, warp i multiplies tile i with
// the tiles i, i + 1, ... i + T / 2 (mod T), which are all pairs, each once. Blocks centre their sums on
// their own means; join_kernel brings them together.
//
// The products of more than kMaxFusedTiles tiles do not fit the registers of a block: such maps are finished
// first, and then blocks take the moments of two windows of channels each.
#include <algorithm>
#include <cstdint>

#include "device.h"
#include "finish_map.cuh"
#include "kernels.h"

namespace greedynas::cuda {
namespace {

constexpr int kPlainThreads = 256;
constexpr int kBatch = 4;  // pixels that a thread has on the way

// No moments. A thread finishes one vector of every step-th pixel.
__global__ void __launch_bounds__(kPlainThreads)
    plain_kernel(const __grid_constant__ Group<FinishMap> group) {
  const FinishMap& f = group.nodes[blockIdx.y];
  const int row = row_channels(f.channels) / 8, width = min(row, kPlainThreads), rows = kPlainThreads / width;
  const int vector = blockIdx.z * width + threadIdx.x % width, of_block = threadIdx.x / width;
  if (!f.affine || vector >= row || of_block >= rows) return;
  auto* map = reinterpret_cast<uint4*>(f.map) + vector;
  const auto* residual = f.residual ? reinterpret_cast<const uint4*>(f.residual) + vector : nullptr;
  const FinishVector finish(f.affine, vector, row, f.activation);
  const int64_t step = static_cast<int64_t>(gridDim.x) * rows;
  for (int64_t pixel = static_cast<int64_t>(blockIdx.x) * rows + of_block; pixel < f.pixels;
       pixel += kBatch * step) {
    uint4 raw[kBatch] = {}, added[kBatch] = {};
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int64_t at = (pixel + i * step) * row;
      if (pixel + i * step >= f.pixels) break;
      raw[i] = map[at];
      if (residual) added[i] = residual[at];
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (pixel + i * step < f.pixels) {
        map[(pixel + i * step) * row] = finish(raw[i], residual ? &added[i] : nullptr);
      }
    }
  }
}

constexpr unsigned kOnes = 0x3f803f80u;  // bfloat16
constexpr int kSweeps = 2;               // between two barriers
constexpr int kStages = 3;               // of kSweeps sweeps each, all but one on the way

// Shared memory of a block: stages of the map, then of the residual, then floats.
int moments_bytes(const MomentsCut& cut, bool residual) {
  const int stages = kStages * kSweeps * cut.threads() * 16;
  return stages * (residual ? 2 : 1) + (kTile + 1) * cut.block_tiles * kTile * 4;
}

// Sixteen values near the mean of which nothing cancels: 0, or, where that is far, about their mean. It is a
// bfloat16, so that distances from it mostly are, too.
__device__ __forceinline__ float pilot_of(const float* values, int stride) {
  float mean = 0.f, variance = 0.f;
#pragma unroll
  for (int i = 0; i < kTile; ++i) mean += values[i * stride] / kTile;
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    const float distance = values[i * stride] - mean;
    variance += distance * distance / kTile;
  }
  const bool far = mean * mean > 25 * variance;
  return far ? low_bf16(pack_bf16(mean, 0.f)) : 0.f;  // not where they are not finite
}

// kPairs: the most products of a warp. kFinish: the map is still to be finished.
template <int kPairs, bool kFinish, int kThreads, int kBlocks>
__global__ void __launch_bounds__(kThreads, kBlocks)
    moments_kernel(const __grid_constant__ Group<FinishMap> group, const MomentsCut cut) {
  const FinishMap& f = group.nodes[blockIdx.y];
  const WindowPair windows = WindowPair::of(cut, blockIdx.z);
  const int tiles = windows.tiles(), width = 2 * tiles, channels = kTile * tiles;
  const int thread = threadIdx.x, lane = thread % 32, threads = blockDim.x;
  const int group_threads = 32 * tiles, my_group = thread / group_threads, of_group = thread % group_threads;
  // What a thread finishes: one vector of one pixel per sweep.
  const int sweep_pixel = of_group / width, local_vector = of_group % width;
  const int vector = windows.vector(local_vector);
  const bool active = my_group < cut.groups;  // not all threads, where windows are smaller than others
  const bool real = active && vector < cut.row;

  const bool changes = kFinish && f.affine, adds = changes && f.residual;
  GREEDYNAS_DYNAMIC_SHARED(memory);
  auto* stages = reinterpret_cast<uint4*>(memory);  // [kStages][kSweeps][threads]
  auto* residual_stages = stages + kStages * kSweeps * threads;
  auto* pilots = reinterpret_cast<float*>(residual_stages + (adds ? kStages * kSweeps * threads : 0));
  float* values = pilots + channels;  // [kTile][channels]

  // A group's sweep has rows of `width` vectors, which are exchanged by bits of the row: rows of an 8x8
  // matrix have to lie in different banks.
  const int bits = width % 8 == 0 ? 3 : width % 4 == 0 ? 2 : 1;
  const auto place = [&](int row, int v) { return row * width + (v ^ ((row % 8) >> (3 - bits))); };
  const int slot = my_group * group_threads + place(sweep_pixel, local_vector);

  const int64_t first = static_cast<int64_t>(blockIdx.x) * cut.chunk * cut.row + vector;
  const int pixels = cut.chunk_pixels(blockIdx.x);
  uint4* map = reinterpret_cast<uint4*>(f.map) + first;
  const uint4* residual = adds ? reinterpret_cast<const uint4*>(f.residual) + first : nullptr;
  const auto pixel_of = [&](int sweep) { return (sweep * cut.groups + my_group) * kTile + sweep_pixel; };
  const auto fetch = [&](int sweep, int stage) {
#pragma unroll
    for (int i = 0; i < kSweeps; ++i) {
      const int pixel = pixel_of(sweep + i);
      if (!real || pixel >= pixels) break;
      const int64_t at = static_cast<int64_t>(pixel) * cut.row;
      copy_async16(stages + (stage * kSweeps + i) * threads + slot, map + at);
      if (adds) copy_async16(residual_stages + (stage * kSweeps + i) * threads + slot, residual + at);
    }
    commit_async();
  };
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) fetch(stage * kSweeps, stage);

  const FinishVector finish(changes && real ? f.affine : nullptr, vector, cut.row, f.activation);
  if (active && my_group == 0) {
    uint4 words{0, 0, 0, 0};
    if (real) {
      const int64_t at = static_cast<int64_t>(sweep_pixel) * pixels / kTile * cut.row;
      words = map[at];
      if (changes) words = finish(words, adds ? residual + at : nullptr);
    }
    float x[8];
    unpack(x, words);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[8 * thread + i] = x[i];
  }
  __syncthreads();
  if (thread < channels) pilots[thread] = pilot_of(values + thread, channels);
  __syncthreads();
  unsigned pilot[4] = {};
  if (active) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      pilot[i] = pack_bf16(pilots[8 * local_vector + 2 * i], pilots[8 * local_vector + 2 * i + 1]);
    }
  }

  const int my_tile = of_group / 32;
  const int my_pairs = active ? (tiles - 1) / 2 + 1 + (tiles % 2 == 0 && my_tile < tiles / 2) : 0;
  const int matrix_row = lane / 16 * 8 + lane % 8, matrix_vector = lane / 8 % 2;
  float acc[kPairs][2][4] = {};  // of pair d: tile my_tile by half h of tile my_tile + d
  float sums[4] = {};            // of tile my_tile: its product with ones
  int stage = 0;
  for (int sweep = 0; sweep * cut.groups * kTile < pixels; sweep += kSweeps) {
    wait_async<kStages - 2>();
#pragma unroll 1
    for (int i = 0; i < kSweeps; ++i) {
      const int pixel = pixel_of(sweep + i);
      uint4* mine = stages + (stage * kSweeps + i) * threads + slot;
      uint4 distances{0, 0, 0, 0};
      if (real && pixel < pixels) {
        uint4 words = *mine;
        if (changes) {
          words = finish(words, adds ? mine + kStages * kSweeps * threads : nullptr);
          map[static_cast<int64_t>(pixel) * cut.row] = words;
        }
        distances = {subtract_bf16(words.x, pilot[0]), subtract_bf16(words.y, pilot[1]),
                     subtract_bf16(words.z, pilot[2]), subtract_bf16(words.w, pilot[3])};
      }
      if (active) *mine = distances;
    }
    if constexpr (kPairs == 1) {  // a warp is a group
      __syncwarp();
    } else {
      __syncthreads();
    }
    fetch(sweep + (kStages - 1) * kSweeps, stage == 0 ? kStages - 1 : stage - 1);
#pragma unroll
    for (int i = 0; i < kSweeps; ++i) {
      const uint4* rows = stages + (stage * kSweeps + i) * threads + my_group * group_threads;
      unsigned a[4], b[4];
#pragma unroll
      for (int d = 0; d < kPairs; ++d) {
        if (d >= my_pairs) break;
        const int tile = my_tile + d < tiles ? my_tile + d : my_tile + d - tiles;
        load_matrices_transposed(b, rows + place(matrix_row, 2 * tile + matrix_vector));
        if (d == 0) {
#pragma unroll
          for (int j = 0; j < 4; ++j) a[j] = b[j];
          multiply_bf16(sums, a, kOnes, kOnes);
        }
        multiply_bf16(acc[d][0], a, b[0], b[2]);
        multiply_bf16(acc[d][1], a, b[1], b[3]);
      }
    }
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }

  // Groups bring their sums together.
  __syncthreads();
  auto* exchange = reinterpret_cast<float4*>(memory);  // [groups - 1][tiles][kPairs][2][lanes]
  const auto exchanged = [&](int of, int d, int h) {
    return exchange + (((of * tiles + my_tile) * kPairs + d) * 2 + h) * 32 + lane;
  };
  if (active) {
    if (lane % 4 == 0) {
      float* rows = values + my_group * channels + kTile * my_tile + lane / 4;
      rows[0] = sums[0];
      rows[8] = sums[2];
    }
    if (my_group > 0) {
#pragma unroll
      for (int d = 0; d < kPairs; ++d) {
        if (d >= my_pairs) break;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float (&v)[4] = acc[d][h];
          *exchanged(my_group - 1, d, h) = float4{v[0], v[1], v[2], v[3]};
        }
      }
    }
  }
  __syncthreads();
  float* out = f.partials + cut.place(blockIdx.x, blockIdx.z);
  const float share = 1.f / static_cast<float>(pixels);
  if (thread < channels) {
    float total = 0.f;
    for (int g = 0; g < cut.groups; ++g) total += values[g * channels + thread];
    values[thread] = total;
    out[thread] = pilots[thread] + total * share;
  }
  __syncthreads();
  if (my_group > 0) return;
#pragma unroll
  for (int d = 0; d < kPairs; ++d) {
    if (d >= my_pairs) break;
    const int tile = my_tile + d < tiles ? my_tile + d : my_tile + d - tiles;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float (&v)[4] = acc[d][h];
      for (int g = 0; g < cut.groups - 1; ++g) {
        const float4 other = *exchanged(g, d, h);
        v[0] += other.x;
        v[1] += other.y;
        v[2] += other.z;
        v[3] += other.w;
      }
      const float* rows = values + kTile * my_tile + lane / 4;
      const float* columns = values + kTile * tile + 8 * h + 2 * (lane % 4);
      const float low = rows[0] * share, high = rows[8] * share;
      float4* to = reinterpret_cast<float4*>(out + channels + (d * tiles + my_tile) * kTileFloats);
      to[32 * h + lane] = float4{v[0] - low * columns[0], v[1] - low * columns[1], v[2] - high * columns[0],
                                 v[3] - high * columns[1]};
    }
  }
}

constexpr int kJoinThreads = 512;
constexpr int kJoinShare = kTileFloats / 32;  // blocks of a pair of tiles

// Chunks' means and centred products -> mean and covariance. A warp takes 32 elements of every 16th chunk.
__global__ void __launch_bounds__(kJoinThreads)
    join_kernel(const __grid_constant__ Group<FinishMap> group, const MomentsCut cut) {
  const FinishMap& f = group.nodes[blockIdx.y];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // Tiles are paired (0, 0), (0, 1), (1, 1), (0, 2), ...
  int a = blockIdx.x / kJoinShare, b = 0;
  while (a > b) a -= ++b;
  // Windows that know both.
  int u = a / cut.window_tiles, v = b / cut.window_tiles;
  if (u == v && v + 1 < cut.windows) {
    ++v;
  } else if (u == v && u > 0) {
    --u;
  }
  const WindowPair windows(cut, u, v);
  const int tiles = windows.tiles();
  // Which of them was multiplied with the one `d` further.
  int local_a = windows.local_tile(a), local_b = windows.local_tile(b);
  int d = local_b - local_a + (local_b < local_a ? tiles : 0);
  if (2 * d > tiles || (2 * d == tiles && local_a >= tiles / 2)) {
    d = tiles - d;
    const int other = a, local_other = local_a;
    a = b;
    local_a = local_b;
    b = other;
    local_b = local_other;
  }

  const int element = blockIdx.x % kJoinShare * 32 + lane;  // of the tile, as mma leaves it
  const int of_half = element % 128, row = of_half / 16 + of_half % 4 / 2 * 8,
            column = element / 128 * 8 + of_half / 4 % 4 * 2 + of_half % 2;
  const float* partials = f.partials + cut.place(0, WindowPair::index_of(cut, u, v));
  const int64_t step = cut.place(1, 0);
  const float* means_a = partials + kTile * local_a + row;
  const float* means_b = partials + kTile * local_b + column;
  const float* products = partials + kTile * tiles + (d * tiles + local_a) * kTileFloats + element;
  const float pilot_a = *means_a, pilot_b = *means_b;
  double sum = 0, sum_a = 0, sum_b = 0;
  constexpr int kWarps = kJoinThreads / 32;
#pragma unroll 4
  for (int chunk = warp; chunk < cut.chunks; chunk += kWarps) {
    const double count = cut.chunk_pixels(chunk);
    const double from_a = static_cast<double>(means_a[chunk * step]) - pilot_a;
    const double from_b = static_cast<double>(means_b[chunk * step]) - pilot_b;
    sum += products[chunk * step] + count * from_a * from_b;
    sum_a += count * from_a;
    sum_b += count * from_b;
  }
  GREEDYNAS_SHARED(double, sums, [kWarps][3][32]);
  sums[warp][0][lane] = sum;
  sums[warp][1][lane] = sum_a;
  sums[warp][2][lane] = sum_b;
  __syncthreads();
  if (warp > 0) return;
  for (int w = 1; w < kWarps; ++w) {
    sum += sums[w][0][lane];
    sum_a += sums[w][1][lane];
    sum_b += sums[w][2][lane];
  }
  const auto pixels = static_cast<double>(cut.pixels);
  const int i = kTile * a + row, j = kTile * b + column, stride = 8 * cut.row;
  if (i >= stride || j >= stride || (a == b && i > j)) return;
  double covariance = (sum - sum_a * sum_b / pixels) / pixels;
  if (i == j && covariance < 0) covariance = 0;
  if (i >= f.channels || j >= f.channels) covariance = 0;
  f.covariance[static_cast<int64_t>(i) * stride + j] = static_cast<float>(covariance);
  f.covariance[static_cast<int64_t>(j) * stride + i] = static_cast<float>(covariance);
  if (i == j) f.mean[i] = i < f.channels ? static_cast<float>(pilot_a + sum_a / pixels) : 0.f;
}

void finish_plainly(const Group<FinishMap>& group, Stream stream) {
  if (group.count == 0) return;
  const FinishMap& f = group.nodes[0];
  const int row = row_channels(f.channels) / 8, width = std::min(row, kPlainThreads);
  const int64_t whole = ceil_div(f.pixels, int64_t{kPlainThreads / width * kBatch});
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(whole, 16 * multiprocessors()));
  GREEDYNAS_LAUNCH(plain_kernel, dim3(blocks, group.count, ceil_div(row, width)), dim3(kPlainThreads), 0,
                   stream, group);
}

void take_moments(const Group<FinishMap>& group, Stream stream) {
  if (group.count == 0) return;
  const MomentsCut cut = cut_moments(group.nodes[0].pixels, group.nodes[0].channels);
  bool residual = false;
  for (int i = 0; i < group.count; ++i) residual |= group.nodes[i].residual != nullptr;
  const dim3 grid(cut.chunks, group.count, cut.window_pairs());
  const int bytes = moments_bytes(cut, residual && cut.windows == 1);
  // Templates: products of a warp, threads, blocks of a multiprocessor.
#define LAUNCH(pairs, finish, most, blocks)                                                                 \
  GREEDYNAS_LAUNCH((moments_kernel<pairs, finish, most, blocks>), grid, dim3(cut.threads()), bytes, stream, \
                   group, cut)
  if (cut.windows > 1) {
    LAUNCH(kMaxWindowTiles + 1, false, 64 * kMaxWindowTiles, 1);
  } else if (cut.tiles == 1) {
    LAUNCH(1, true, 256, 3);
  } else if (cut.tiles <= 3) {
    LAUNCH(2, true, 256, 3);
  } else if (cut.tiles <= 5) {
    LAUNCH(3, true, 256, 2);
  } else if (cut.tiles == 6) {
    LAUNCH(4, true, 192, 3);
  } else if (cut.tiles <= 9) {
    LAUNCH(5, true, 288, 1);
  } else {
    LAUNCH(kMaxFusedTiles / 2 + 1, true, 32 * kMaxFusedTiles, 1);
  }
#undef LAUNCH
  GREEDYNAS_LAUNCH(join_kernel, dim3(cut.tile_pairs() * kJoinShare, group.count), dim3(kJoinThreads), 0,
                   stream, group, cut);
}

}  // namespace

int64_t finish_map_floats(int64_t pixels, int channels) {
  const MomentsCut cut = cut_moments(pixels, channels);
  return int64_t{cut.chunks} * cut.window_pairs() * cut.floats();
}

void finish_map(const Group<FinishMap>& group, Stream stream) {
  Group<FinishMap> plain{}, with_moments{};
  for (int i = 0; i < group.count; ++i) {
    const FinishMap& f = group.nodes[i];
    const bool apart = row_channels(f.channels) > kMaxFusedTiles * kTile;
    if (f.affine && (!f.mean || apart)) plain.nodes[plain.count++] = f;
    if (f.mean) with_moments.nodes[with_moments.count++] = f;
  }
  finish_plainly(plain, stream);
  take_moments(with_moments, stream);
}

}  // namespace greedynas::cuda
