// The last affine map of a block, its activation and residual, applied in place in one pass that also takes
// the moments of what it writes.
//
// moments_kernel (finish_map_moments.cuh) does it chunk by chunk, join_kernel brings the moments of the
// chunks together. More than max_fused_tiles() tiles of 16 channels are too many for a block:
// such maps are finished first, and then blocks take the moments of two windows of channels each.
#include <algorithm>
#include <cstdint>

#include "device.h"
#include "finish_map.cuh"
#include "finish_map_moments.cuh"
#include "kernels.h"

namespace greedynas::cuda {
namespace {

constexpr int kPlainThreads = 256;
constexpr int kBatch = 4;  // pixels that a thread has on the way

// No moments. A thread finishes one vector of every step-th pixel.
template <typename T>
__global__ void __launch_bounds__(kPlainThreads)
    plain_kernel(const __grid_constant__ Group<FinishMap<T>> group) {
  if (!computes<T>()) return;
  const FinishMap<T>& f = group.nodes[blockIdx.y];
  const int row = row_channels(f.channels) / 8, width = min(row, kPlainThreads), rows = kPlainThreads / width;
  const int vector = blockIdx.z * width + threadIdx.x % width, of_block = threadIdx.x / width;
  if (!f.affine || vector >= row || of_block >= rows) return;
  auto* map = reinterpret_cast<uint4*>(f.map) + vector;
  const auto* residual = f.residual ? reinterpret_cast<const uint4*>(f.residual) + vector : nullptr;
  const FinishVector<T> finish(f.affine, vector, row, f.activation);
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
      if (pixel + i * step < f.pixels)
        map[(pixel + i * step) * row] = finish(raw[i], residual != nullptr, added[i]);
    }
  }
}

constexpr int kMaxJoinWarps = 32;
constexpr int kJoinChunks = 8;                // of a warp, if there are that few
constexpr int kJoinBatch = 4;                 // chunks that a warp has on the way
constexpr int kJoinShare = kTileFloats / 64;  // blocks of a pair of tiles

// Chunks' means and centred products -> mean and covariance. A warp takes 64 elements, two to a lane, of
// every chunk that is its turn.
template <typename T>
__global__ void __launch_bounds__(32 * kMaxJoinWarps)
    join_kernel(const __grid_constant__ Group<FinishMap<T>> group, const MomentsCut cut) {
  const FinishMap<T>& f = group.nodes[blockIdx.y];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
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
  int local_a = windows.local_tile(a), local_b = windows.local_tile(b), d = local_b - local_a;
  if (2 * d > tiles) {
    d = tiles - d;
    const int other = a, local_other = local_a;
    a = b;
    local_a = local_b;
    b = other;
    local_b = local_other;
  }

  // Elements (row, column) and (row, column + 1) of the tile, as mma leaves them.
  const int element = blockIdx.x % kJoinShare * 64 + 2 * lane, of_half = element % 128;
  const int row = of_half / 16 + of_half % 4 / 2 * 8, column = element / 128 * 8 + of_half / 4 % 4 * 2;
  const float* partials = f.partials + cut.place(0, WindowPair::index_of(cut, u, v));
  const int64_t step = cut.place(1, 0);
  const float* mean_a = partials + kTile * local_a + row;
  const float* mean_b = partials + kTile * local_b + column;
  const float* products = partials + kTile * tiles + (d * tiles + local_a) * kTileFloats + element;
  const double pilot_a = mean_a[0], pilot_b[2] = {mean_b[0], mean_b[1]};
  double sum[2] = {}, sum_a = 0, sum_b[2] = {};
  for (int first = warp; first < cut.chunks; first += kJoinBatch * warps) {
    float2 product[kJoinBatch] = {}, of_b[kJoinBatch] = {};
    float of_a[kJoinBatch] = {};
#pragma unroll
    for (int i = 0; i < kJoinBatch; ++i) {
      const int chunk = first + i * warps;
      const int64_t at = chunk * step;
      if (chunk >= cut.chunks) continue;
      product[i] = *reinterpret_cast<const float2*>(products + at);
      of_b[i] = *reinterpret_cast<const float2*>(mean_b + at);
      of_a[i] = mean_a[at];
    }
#pragma unroll
    for (int i = 0; i < kJoinBatch; ++i) {  // all of them: a branch would let the loads wait for each other
      const int chunk = first + i * warps;
      const double count = chunk < cut.chunks ? cut.chunk_pixels(chunk) : 0;
      const double from_a = count * (of_a[i] - pilot_a);
      const double from_b[2] = {of_b[i].x - pilot_b[0], of_b[i].y - pilot_b[1]};
      sum_a += from_a;
      sum[0] += product[i].x + from_a * from_b[0];
      sum[1] += product[i].y + from_a * from_b[1];
      sum_b[0] += count * from_b[0];
      sum_b[1] += count * from_b[1];
    }
  }
  GREEDYNAS_DYNAMIC_SHARED(memory);
  auto* sums = reinterpret_cast<double (*)[5][32]>(memory);  // of warps
  sums[warp][0][lane] = sum[0];
  sums[warp][1][lane] = sum[1];
  sums[warp][2][lane] = sum_a;
  sums[warp][3][lane] = sum_b[0];
  sums[warp][4][lane] = sum_b[1];
  __syncthreads();
  if (warp > 1) return;
  // Two warps finish an element per lane.
  const int half = warp;
  double total[3] = {};
  for (int w = 0; w < warps; ++w) {
    total[0] += sums[w][half][lane];
    total[1] += sums[w][2][lane];
    total[2] += sums[w][3 + half][lane];
  }
  const auto pixels = static_cast<double>(cut.pixels);
  const int i = kTile * a + row, j = kTile * b + column + half, stride = 8 * cut.row;
  if (i >= stride || j >= stride || (a == b && i > j)) return;
  double covariance = (total[0] - total[1] * total[2] / pixels) / pixels;
  if (i == j && covariance < 0) covariance = 0;
  if (i >= f.channels || j >= f.channels) covariance = 0;  // also by NaN
  f.covariance[static_cast<int64_t>(i) * stride + j] = static_cast<float>(covariance);
  f.covariance[static_cast<int64_t>(j) * stride + i] = static_cast<float>(covariance);
  if (i == j) f.mean[i] = static_cast<float>(pilot_a + total[1] / pixels);
}

template <typename T>
void finish_plainly(const Group<FinishMap<T>>& group, Stream stream) {
  if (group.count == 0) return;
  const FinishMap<T>& f = group.nodes[0];
  const int row = row_channels(f.channels) / 8, width = std::min(row, kPlainThreads);
  const int64_t whole = ceil_div(f.pixels, int64_t{kPlainThreads / width * kBatch});
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(whole, 16 * multiprocessors()));
  GREEDYNAS_LAUNCH((plain_kernel<T>), dim3(blocks, group.count, ceil_div(row, width)), dim3(kPlainThreads), 0,
                   stream, group);
}

// kTiles: of cut.tiles, where there is one window.
template <Pass kPass, int kTiles = 1, typename T>
void launch_moments(const Group<FinishMap<T>>& group, const MomentsCut& cut, bool residual, Stream stream) {
  if constexpr (kPass != kNothing && kTiles < kMaxFusedTiles) {
    if (cut.tiles > kTiles) return launch_moments<kPass, kTiles + 1>(group, cut, residual, stream);
  }
  const dim3 grid(cut.chunks, group.count, cut.window_pairs());
  GREEDYNAS_LAUNCH((moments_kernel<T, kTiles, kPass>), grid, dim3(moments_threads(cut.block_tiles)),
                   MomentsMemory<kTiles>::bytes(residual), stream, group, cut);
}

template <typename T>
void take_moments(const Group<FinishMap<T>>& group, Stream stream) {
  if (group.count == 0) return;
  const MomentsCut cut = cut_moments(group.nodes[0].pixels, group.nodes[0].channels);
  bool residual = false, activated = false;
  for (int i = 0; i < group.count; ++i) {
    residual |= group.nodes[i].residual != nullptr;
    activated |= group.nodes[i].activation != kLinear;
  }
  if (cut.windows > 1 && cut.block_tiles <= 2 * kLessWindowTiles) {
    launch_moments<kNothing, 2 * kLessWindowTiles>(group, cut, false, stream);
  } else if (cut.windows > 1) {
    launch_moments<kNothing, 2 * kMaxWindowTiles>(group, cut, false, stream);
  } else if (activated) {
    launch_moments<kActivated>(group, cut, residual, stream);
  } else {
    launch_moments<kAffine>(group, cut, residual, stream);
  }
  const int join_warps = std::clamp(ceil_div(cut.chunks, kJoinChunks), 2, kMaxJoinWarps);
  const int join_bytes = join_warps * 5 * 32 * static_cast<int>(sizeof(double));
  GREEDYNAS_LAUNCH((join_kernel<T>), dim3(cut.tile_pairs() * kJoinShare, group.count), dim3(32 * join_warps),
                   join_bytes, stream, group, cut);
}

// Whether a block cannot also finish what it takes the moments of: too many tiles, or, within 64 KB, a
// residual beside the only tile, of which many groups of warps have pixels on the way.
template <typename T>
bool is_finished_apart(const FinishMap<T>& f) {
  const int tiles = ceil_div(f.channels, kTile);
  return tiles > max_fused_tiles() || (little_shared_memory() && tiles == 1 && f.residual);
}

}  // namespace

template <typename T>
int64_t finish_map_floats(int64_t pixels, int channels) {
  const MomentsCut cut = cut_moments(pixels, channels);
  return int64_t{cut.chunks} * cut.window_pairs() * cut.floats();
}

template <typename T>
void finish_map(const Group<FinishMap<T>>& group, Stream stream) {
  if (group.nodes[0].pixels == 0) return;
  Group<FinishMap<T>> plain{}, with_moments{};
  for (int i = 0; i < group.count; ++i) {
    FinishMap<T> f = group.nodes[i];
    if (f.affine && (!f.mean || is_finished_apart(f))) {
      plain.nodes[plain.count++] = f;
      f.affine = nullptr;
      f.residual = nullptr;
      f.activation = kLinear;
    }
    if (f.mean) with_moments.nodes[with_moments.count++] = f;
  }
  finish_plainly(plain, stream);
  take_moments(with_moments, stream);
}

template int64_t finish_map_floats<BFloat16>(int64_t, int);
template int64_t finish_map_floats<Half>(int64_t, int);
template void finish_map(const Group<FinishMap<BFloat16>>&, Stream);
template void finish_map(const Group<FinishMap<Half>>&, Stream);

}  // namespace greedynas::cuda
