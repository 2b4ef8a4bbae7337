// finish_map with moments: a chunk of the pixels of a map, or of two windows of its channels.
//
// What arrives in shared memory becomes, in the same place, the distance of the result from a pilot, of the
// map's type. The second moments are that matrix times its transpose, on tensor cores, with both operands
// from the same registers: of T tiles of 16 channels, warp i multiplies tile i with the tiles i, i + 1, ... i
// + T / 2 (mod T), which are all pairs. Sums are centred on the chunk's own means.
#pragma once

#include <algorithm>
#include <cstdint>

#include "choice_block.h"
#include "device.h"
#include "finish_map.cuh"
#include "kernels.h"

namespace greedynas::cuda {
namespace {

constexpr int kSweeps = 2;  // between two barriers
constexpr int kStages = 3;  // of kSweeps sweeps each, all but one on the way

// Shared memory of a block: stages of the map, then of the residual, then pilots and samples. A pixel's row
// has one vector more than channels need: rows of an 8x8 matrix have to lie in different banks.
template <int kTiles>
struct MomentsMemory {
  static constexpr int kPitch = 2 * kTiles + 1, kSweep = moments_groups(kTiles) * kTile * kPitch;
  static constexpr int kStage = kSweeps * kSweep, kAll = kStages * kStage;
  static constexpr int bytes(bool residual) {
    return kAll * 16 * (residual ? 2 : 1) + (1 + kTile) * kTiles * kTile * 4;
  }
};

// Sixteen values near the mean of which nothing cancels: 0, or, where that is far, about their mean. It is
// of the map's type, so that distances from it mostly are, too.
template <typename T>
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
  return far ? Pair<T>::unpack(Pair<T>::pack(mean, 0.f)).x : 0.f;  // not where they are not finite
}

// What is still to be done to a map: nothing, all but an activation, all.
enum Pass { kNothing, kAffine, kActivated };

// Temporaries of activations cost registers, and so do copies that pass through them.
constexpr int blocks_of_pass(int tiles, Pass pass, bool asynchronous) {
  return std::max(1, moments_blocks(tiles) - (pass == kActivated ? 1 : 0) - (asynchronous ? 0 : 1));
}

// Of a map of kTiles tiles; kNothing: of two windows of a map, of kTiles tiles together at most. kGroups
// groups of warps take turns at sweeps of 16 pixels.
template <typename T, int kTiles, Pass kPass>
__global__ void __launch_bounds__(moments_threads(kTiles), blocks_of_pass(kTiles, kPass, since_sm80()))
    moments_kernel(const __grid_constant__ Group<FinishMap<T>> group, const MomentsCut cut) {
  if (!computes<T>() || (kTiles > kMaxFusedTiles && !since_sm80())) return;
  constexpr int kGroups = moments_groups(kTiles);
  constexpr int kPairs =
      kTiles / 2 + 1;  // of a warp; half of them have one that another has, if kTiles is even
  const FinishMap<T>& f = group.nodes[blockIdx.y];
  const WindowPair windows = WindowPair::of(cut, blockIdx.z);
  const int tiles = kPass == kNothing ? windows.tiles() : kTiles, width = 2 * tiles, channels = kTile * tiles;
  const int thread = threadIdx.x, lane = thread % 32;
  const int group_threads = 32 * tiles, my_group = thread / group_threads, of_group = thread % group_threads;
  // What a thread finishes: one vector of one pixel per sweep.
  const int sweep_pixel = of_group / width, local_vector = of_group % width;
  const int vector = windows.vector(local_vector);
  const bool active = my_group < kGroups;  // not all threads, where windows are smaller than others
  const bool real = active && vector < cut.row;

  const bool changes = kPass != kNothing && f.affine, adds = changes && f.residual;
  GREEDYNAS_DYNAMIC_SHARED(memory);
  using Memory = MomentsMemory<kTiles>;
  auto* stages = reinterpret_cast<uint4*>(memory);  // [kStages][kSweeps][kGroups][kTile][kPitch]
  auto* pilots = reinterpret_cast<float*>(stages + (adds ? 2 : 1) * Memory::kAll);
  float* values = pilots + channels;  // [kTile][channels]
  uint4* group_rows = stages + my_group * kTile * Memory::kPitch;
  uint4* slot = group_rows + sweep_pixel * Memory::kPitch + local_vector;

  const int64_t first = static_cast<int64_t>(blockIdx.x) * cut.chunk * cut.row + vector;
  const int pixels = cut.chunk_pixels(blockIdx.x);
  uint4* map = reinterpret_cast<uint4*>(f.map) + first;
  const uint4* residual = adds ? reinterpret_cast<const uint4*>(f.residual) + first : nullptr;
  constexpr int kSweepPixels = kGroups * kTile, kStep = kSweeps * kSweepPixels;
  const int first_pixel = my_group * kTile + sweep_pixel;
  const auto fetch = [&](int pixel, int stage) {
#pragma unroll
    for (int i = 0; i < kSweeps; ++i, pixel += kSweepPixels) {
      if (!real || pixel >= pixels) break;
      const int at = pixel * cut.row;
      uint4* to = slot + stage * Memory::kStage + i * Memory::kSweep;
      start_copy16(to, map + at);
      if (adds) start_copy16(to + Memory::kAll, residual + at);
    }
    commit_copies();
  };
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) fetch(first_pixel + stage * kStep, stage);

  const FinishVector<T> finish(changes && real ? f.affine : nullptr, vector, cut.row,
                               kPass == kActivated ? f.activation : int{kLinear});
  if (active && my_group == 0) {
    uint4 words{0, 0, 0, 0}, added = words;
    if (real) {
      const int at = sweep_pixel * pixels / kTile * cut.row;
      words = map[at];
      if (adds) added = residual[at];
      if (changes) words = finish(words, adds, added);
    }
    float x[8];
    unpack<T>(x, words);
#pragma unroll
    for (int i = 0; i < 8; ++i) values[8 * thread + i] = x[i];
  }
  __syncthreads();
  if (thread < channels) pilots[thread] = pilot_of<T>(values + thread, channels);
  __syncthreads();
  unsigned pilot[4] = {};
  if (active) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      pilot[i] = Pair<T>::pack(pilots[8 * local_vector + 2 * i], pilots[8 * local_vector + 2 * i + 1]);
    }
  }

  const int my_tile = of_group / 32;
  const auto tile_after = [&](int d) { return my_tile + d < tiles ? my_tile + d : my_tile + d - tiles; };
  // The row that a lane points at: of pixels 0 to 7 and 8 to 15, channels 0 to 7, then 8 to 15, of tile 0.
  const uint4* matrix_row = group_rows + lane % 16 * Memory::kPitch + lane / 16;
  float acc[kPairs][2][4] = {};  // of pair d: tile my_tile by half h of tile my_tile + d
  float sums[4] = {};            // of tile my_tile: its product with ones
  int stage = 0;
  for (int done = 0; done < pixels; done += kStep) {
    wait_for_copies<kStages - 2>();
#pragma unroll
    for (int i = 0; i < kSweeps; ++i) {
      const int pixel = done + first_pixel + i * kSweepPixels;
      uint4* mine = slot + stage * Memory::kStage + i * Memory::kSweep;
      uint4 distances{0, 0, 0, 0};
      if (real && pixel < pixels) {
        uint4 words = *mine;
        if (changes) {
          uint4 added{0, 0, 0, 0};
          if (adds) added = mine[Memory::kAll];
          words = finish(words, adds, added);
          map[pixel * cut.row] = words;
        }
        distances = {Pair<T>::subtract(words.x, pilot[0]), Pair<T>::subtract(words.y, pilot[1]),
                     Pair<T>::subtract(words.z, pilot[2]), Pair<T>::subtract(words.w, pilot[3])};
      }
      if (active) *mine = distances;
    }
    if constexpr (kTiles == 1) {  // a warp is a group
      __syncwarp();
    } else {
      __syncthreads();
    }
    fetch(done + first_pixel + (kStages - 1) * kStep, stage == 0 ? kStages - 1 : stage - 1);
    if (active) {
#pragma unroll
      for (int i = 0; i < kSweeps; ++i) {
        const uint4* rows = matrix_row + stage * Memory::kStage + i * Memory::kSweep;
        unsigned b[4];
        load_matrices_transposed(b, rows + 2 * my_tile);
        const unsigned a[4] = {b[0], b[2], b[1], b[3]};
        Pair<T>::multiply(sums, a, Pair<T>::kOnes, Pair<T>::kOnes);
#pragma unroll
        for (int d = 0; d < kPairs; ++d) {
          if (d > 0) load_matrices_transposed(b, rows + 2 * tile_after(d));
          Pair<T>::multiply(acc[d][0], a, b[0], b[1]);
          Pair<T>::multiply(acc[d][1], a, b[2], b[3]);
        }
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
    for (int g = 0; g < kGroups; ++g) total += values[g * channels + thread];
    values[thread] = total;
    out[thread] = pilots[thread] + total * share;
  }
  __syncthreads();
  if (my_group > 0) return;
#pragma unroll
  for (int d = 0; d < kPairs; ++d) {
    if (d > tiles / 2 || (2 * d == tiles && my_tile >= d)) break;  // pairs that another warp has, too
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float (&v)[4] = acc[d][h];
      for (int g = 0; g < kGroups - 1; ++g) {
        const float4 other = *exchanged(g, d, h);
        v[0] += other.x;
        v[1] += other.y;
        v[2] += other.z;
        v[3] += other.w;
      }
      const float* rows = values + kTile * my_tile + lane / 4;
      const float* columns = values + kTile * tile_after(d) + 8 * h + 2 * (lane % 4);
      const float low = rows[0] * share, high = rows[8] * share;
      float4* to = reinterpret_cast<float4*>(out + channels + (d * tiles + my_tile) * kTileFloats);
      to[32 * h + lane] = float4{v[0] - low * columns[0], v[1] - low * columns[1], v[2] - high * columns[0],
                                 v[3] - high * columns[1]};
    }
  }
}

}  // namespace
}  // namespace greedynas::cuda
