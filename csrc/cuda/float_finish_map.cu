// The last affine map of a block on float maps, its activation and residual, applied in place in one pass
// that also takes the moments of what it writes.
//
// The second moments are cut into patches of 8 x 8 channels, one a thread, that lie on or above the diagonal;
// where there are few, groups of threads take turns at pixels. moments_kernel sums up distances from a pilot,
// the chunk's first pixel, chunk by chunk; join_kernel brings the moments of the chunks together. More
// patches than a block has threads are several blocks' work, and then the map is finished before.
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "activate.h"
#include "device.h"
#include "kernels.h"

namespace greedynas::cuda {
namespace {

constexpr int kEight = 8, kPatch = kEight * kEight;
constexpr int kLoads = 2;                                    // pieces of four channels of a thread on the way
constexpr int kRoundRows = 2, kRound = kRoundRows * kEight;  // of a patch, when groups join theirs
constexpr int kRoundPad = 2;  // so that neither writing nor reading them meets a bank twice

// How the moments of a map are cut.
struct FloatCut {
  int64_t pixels;
  int row, pieces;               // channels of a pixel, and pieces of four of them
  int patches, threads, slices;  // slices of `threads` patches
  int groups;                    // of a block's threads
  int sweep;                     // pixels in shared memory
  int chunk, chunks;             // pixels of a block; blocks of a slice

  __device__ __host__ int patches_each() const { return patches < threads ? patches : threads; }
  // A chunk's part of `partials`: means, then patches, row by row, of centred products.
  __device__ __host__ int floats() const { return row + patches * kPatch; }
  __device__ int chunk_pixels(int of_chunk) const {
    return static_cast<int>(
        min(pixels - static_cast<int64_t>(of_chunk) * chunk, static_cast<int64_t>(chunk)));
  }
  // Shared memory: what is kept of sweeps, later of sums and of patches; sums and pilots.
  __device__ __host__ int kept_floats() const {
    return std::max(2 * sweep * row, std::max((threads + kRoundPad) * kRound, 4 * kLoads * threads));
  }
  int bytes() const { return 4 * (kept_floats() + 2 * row); }
};

FloatCut cut_floats(int64_t pixels, int channels) {
  constexpr int kMostSweep = 64, kMostGroups = 16, kMostChunk = 8192, kBlocks = 4;
  FloatCut cut{};
  cut.pixels = pixels;
  cut.row = row_channels(channels);
  cut.pieces = cut.row / 4;
  const int eights = cut.row / kEight;
  cut.patches = eights * (eights + 1) / 2;
  cut.threads = cut.patches <= 256 ? 256 : 512;
  cut.slices = ceil_div(cut.patches, cut.threads);
  cut.groups = std::min(kMostGroups, cut.threads / cut.patches_each());
  cut.sweep = std::min(kMostSweep, kLoads * cut.threads / cut.pieces);
  if (cut.sweep == 0) {
    throw std::invalid_argument("finish_map: expected at most 4096 channels with moments, got " +
                                std::to_string(channels));
  }
  const int64_t blocks = std::max(1, kBlocks * multiprocessors() / cut.slices);
  const int64_t filling = std::min<int64_t>(kMostChunk, ceil_div(pixels, blocks));
  const int64_t least = ceil_div(2 * cut.floats(), cut.row);  // partial sums are at most half of the map
  cut.chunk = round_up(static_cast<int>(std::max(filling, least)), cut.sweep);
  cut.chunks = static_cast<int>(ceil_div(pixels, int64_t{cut.chunk}));
  return cut;
}

// Patches are numbered (0, 0), (0, 1), (1, 1), (0, 2), ...: eights of channels, a <= b.
struct Patch {
  int a, b;
  __device__ explicit Patch(int index) : a(index), b(0) {
    while (a > b) a -= ++b;
  }
};

// Four channels of a pixel.
struct Finish {
  const float *scale, *shift;  // or null: values stay as they are
  int activation;

  __device__ Finish(const FinishMap<float>& f, int row, bool changes)
      : scale(changes ? f.affine : nullptr),
        shift(changes ? f.affine + row : nullptr),
        activation(f.activation) {}
  __device__ __forceinline__ float4 operator()(float4 x, const float4& residual, int piece) const {
    const float4 m = __ldg(reinterpret_cast<const float4*>(scale) + piece);
    const float4 n = __ldg(reinterpret_cast<const float4*>(shift) + piece);
    with_activation(activation, [&](auto constant) {
      constexpr int kActivation = decltype(constant)::value;
      constexpr float kBound = kPlainBound<kActivation>;
      x.x = activate<kActivation>(fmaf(x.x, m.x, n.x), kBound);
      x.y = activate<kActivation>(fmaf(x.y, m.y, n.y), kBound);
      x.z = activate<kActivation>(fmaf(x.z, m.z, n.z), kBound);
      x.w = activate<kActivation>(fmaf(x.w, m.w, n.w), kBound);
    });
    return {x.x + residual.x, x.y + residual.y, x.z + residual.z, x.w + residual.w};
  }
};

constexpr int kPlainThreads = 256;

// No moments: the map alone, a piece to a thread.
__global__ void __launch_bounds__(kPlainThreads)
    float_plain_kernel(const __grid_constant__ Group<FinishMap<float>> group) {
  const FinishMap<float>& f = group.nodes[blockIdx.y];
  const int row = row_channels(f.channels), pieces = row / 4;
  const int64_t all = f.pixels * pieces, step = static_cast<int64_t>(gridDim.x) * kPlainThreads;
  const Finish finish(f, row, true);
  auto* const map = reinterpret_cast<float4*>(f.map);
  const auto* const residual = reinterpret_cast<const float4*>(f.residual);
  const int piece_step = static_cast<int>(step % pieces);
  int64_t at = static_cast<int64_t>(blockIdx.x) * kPlainThreads + threadIdx.x;
  int piece = static_cast<int>(at % pieces);
#pragma unroll 2
  for (; at < all; at += step) {
    map[at] = finish(map[at], residual ? residual[at] : float4{0.f, 0.f, 0.f, 0.f}, piece);
    piece += piece_step;
    if (piece >= pieces) piece -= pieces;
  }
}

template <int kThreads>
__global__ void __launch_bounds__(kThreads, 512 / kThreads)
    float_moments_kernel(const __grid_constant__ Group<FinishMap<float>> group,
                         const __grid_constant__ FloatCut cut) {
  GREEDYNAS_DYNAMIC_SHARED(memory);
  const FinishMap<float>& f = group.nodes[blockIdx.y];
  const int thread = threadIdx.x, row = cut.row, sweep_floats = cut.sweep * row;
  auto* const distances = reinterpret_cast<float*>(memory);  // [2][sweep][row], a pixel's even pieces first
  float* const sums = distances + cut.kept_floats();
  float* const pilots = sums + row;
  const bool changes = cut.slices == 1 && f.affine;
  const Finish finish(f, row, changes);

  const int pixels = cut.chunk_pixels(blockIdx.x);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * cut.chunk * cut.pieces;
  auto* const map = reinterpret_cast<float4*>(f.map) + first;
  const auto* const residual =
      changes && f.residual ? reinterpret_cast<const float4*>(f.residual) + first : nullptr;
  // This thread's pieces of a sweep are number thread and thread + kThreads; where they go.
  int pixel[kLoads], piece[kLoads], place[kLoads];
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    pixel[i] = (thread + i * kThreads) / cut.pieces;
    piece[i] = thread + i * kThreads - pixel[i] * cut.pieces;
    place[i] = pixel[i] * row + piece[i] % 2 * (row / 2) + piece[i] / 2 * 4;
  }
  const auto exists = [&](int done, int i) { return pixel[i] < cut.sweep && done + pixel[i] < pixels; };
  float4 raw[kLoads], added[kLoads], sum[kLoads];
  const auto fetch = [&](int done) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (!exists(done, i)) continue;
      const int64_t at = static_cast<int64_t>(done) * cut.pieces + thread + i * kThreads;
      raw[i] = map[at];
      if (residual) added[i] = residual[at];
    }
  };
#pragma unroll
  for (int i = 0; i < kLoads; ++i) raw[i] = added[i] = sum[i] = float4{0.f, 0.f, 0.f, 0.f};

  const int each = cut.patches_each(), my_group = thread / each;
  const int first_patch = blockIdx.z * kThreads, my_patch = first_patch + thread - my_group * each;
  const bool active = my_group < cut.groups && my_patch < cut.patches;
  const Patch patch(active ? my_patch : 0);
  float products[kEight][kEight] = {};
  fetch(0);
  for (int done = 0, buffer = 0; done < pixels; done += cut.sweep, buffer ^= 1) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (!exists(done, i) || !changes) continue;
      raw[i] = finish(raw[i], added[i], piece[i]);
      map[static_cast<int64_t>(done) * cut.pieces + thread + i * kThreads] = raw[i];
    }
    if (done == 0) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        if (pixel[i] == 0) *reinterpret_cast<float4*>(pilots + 4 * piece[i]) = raw[i];
      }
      __syncthreads();
    }
    float* const here = distances + buffer * sweep_floats;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (!exists(done, i)) continue;
      const float4 pilot = *reinterpret_cast<const float4*>(pilots + 4 * piece[i]);
      const float4 d{raw[i].x - pilot.x, raw[i].y - pilot.y, raw[i].z - pilot.z, raw[i].w - pilot.w};
      sum[i].x += d.x, sum[i].y += d.y, sum[i].z += d.z, sum[i].w += d.w;
      *reinterpret_cast<float4*>(here + place[i]) = d;
    }
    __syncthreads();
    fetch(done + cut.sweep);
    if (!active) continue;
    const int count = min(cut.sweep, pixels - done);
#pragma unroll 1
    for (int p = my_group; p < count; p += cut.groups) {
      const auto load = [&](int piece_pair, float (&x)[kEight]) {
        const float* const from = here + p * row + 4 * piece_pair;
        const float4 low = *reinterpret_cast<const float4*>(from);
        const float4 high = *reinterpret_cast<const float4*>(from + row / 2);
        x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
        x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
      };
      float a[kEight], b[kEight];
      load(patch.a, a);
      load(patch.b, b);
#pragma unroll
      for (int i = 0; i < kEight; ++i) {
#pragma unroll
        for (int j = 0; j < kEight; ++j) products[i][j] = fmaf(a[i], b[j], products[i][j]);
      }
    }
  }

  float* const out = f.partials + static_cast<int64_t>(blockIdx.x) * cut.floats();
  const float share = 1.f / static_cast<float>(pixels);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kLoads; ++i) reinterpret_cast<float4*>(distances)[thread + i * kThreads] = sum[i];
  __syncthreads();
  for (int c = thread; c < row; c += kThreads) {
    float total = 0.f;
    for (int p = 0; p < cut.sweep; ++p) total += distances[p * row + c];
    sums[c] = total;
    if (blockIdx.z == 0) out[c] = pilots[c] + total * share;
  }
  // Groups bring their products together, some rows of each patch at a time.
  const int patches = min(each, cut.patches - first_patch);
#pragma unroll
  for (int round = 0; round < kEight / kRoundRows; ++round) {
    __syncthreads();
    if (active) {
#pragma unroll
      for (int i = 0; i < kRound; ++i) {
        distances[i * (kThreads + kRoundPad) + thread] =
            products[round * kRoundRows + i / kEight][i % kEight];
      }
    }
    __syncthreads();
    for (int e = thread; e < patches * kRound; e += kThreads) {
      float total = 0.f;
      for (int g = 0; g < cut.groups; ++g)
        total += distances[e % kRound * (kThreads + kRoundPad) + g * each + e / kRound];
      const Patch of(first_patch + e / kRound);
      const int within = round * kRound + e % kRound;
      const float mean = sums[kEight * of.a + within / kEight] * share;
      out[row + static_cast<int64_t>(first_patch + e / kRound) * kPatch + within] =
          total - mean * sums[kEight * of.b + within % kEight];
    }
  }
}

constexpr int kJoinWarps = 8;

// Chunks' means and centred products -> mean and covariance. A block has half a patch, an element to a lane;
// its warps take turns at chunks.
__global__ void __launch_bounds__(32 * kJoinWarps)
    float_join_kernel(const __grid_constant__ Group<FinishMap<float>> group,
                      const __grid_constant__ FloatCut cut) {
  GREEDYNAS_SHARED(double, of_warps, [kJoinWarps][3][32]);
  const FinishMap<float>& f = group.nodes[blockIdx.y];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Patch patch(blockIdx.x / 2);
  const int element = blockIdx.x % 2 * 32 + lane;
  const int i = kEight * patch.a + element / kEight, j = kEight * patch.b + element % kEight;
  const float* const product = f.partials + cut.row + static_cast<int64_t>(blockIdx.x / 2) * kPatch + element;
  const double pilot_i = f.partials[i], pilot_j = f.partials[j];
  double sum = 0, sum_i = 0, sum_j = 0;
#pragma unroll 4
  for (int chunk = warp; chunk < cut.chunks; chunk += kJoinWarps) {
    const int64_t at = static_cast<int64_t>(chunk) * cut.floats();
    const double count = cut.chunk_pixels(chunk), from_i = f.partials[at + i] - pilot_i;
    const double from_j = f.partials[at + j] - pilot_j;
    sum += product[at] + count * from_i * from_j;
    sum_i += count * from_i;
    sum_j += count * from_j;
  }
  of_warps[warp][0][lane] = sum;
  of_warps[warp][1][lane] = sum_i;
  of_warps[warp][2][lane] = sum_j;
  __syncthreads();
  if (warp > 0) return;
  for (int w = 1; w < kJoinWarps; ++w) {
    sum += of_warps[w][0][lane];
    sum_i += of_warps[w][1][lane];
    sum_j += of_warps[w][2][lane];
  }
  if (patch.a == patch.b && i > j) return;
  const auto pixels = static_cast<double>(cut.pixels);
  double covariance = (sum - sum_i * sum_j / pixels) / pixels;
  if (i == j && covariance < 0) covariance = 0;
  if (i >= f.channels || j >= f.channels) covariance = 0;  // also by NaN
  f.covariance[static_cast<int64_t>(i) * cut.row + j] = static_cast<float>(covariance);
  f.covariance[static_cast<int64_t>(j) * cut.row + i] = static_cast<float>(covariance);
  if (i == j) f.mean[i] = i < f.channels ? static_cast<float>(pilot_i + sum_i / pixels) : 0.f;
}

void finish_plainly(const Group<FinishMap<float>>& group, Stream stream) {
  if (group.count == 0) return;
  const FinishMap<float>& f = group.nodes[0];
  const int64_t all = ceil_div(f.pixels * (row_channels(f.channels) / 4), int64_t{kPlainThreads});
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(all, 16 * multiprocessors()));
  GREEDYNAS_LAUNCH(float_plain_kernel, dim3(blocks, group.count), dim3(kPlainThreads), 0, stream, group);
}

void take_moments(const Group<FinishMap<float>>& group, const FloatCut& cut, Stream stream) {
  if (group.count == 0) return;
  const dim3 grid(cut.chunks, group.count, cut.slices);
  if (cut.threads == 256) {
    GREEDYNAS_LAUNCH((float_moments_kernel<256>), grid, dim3(256), cut.bytes(), stream, group, cut);
  } else {
    GREEDYNAS_LAUNCH((float_moments_kernel<512>), grid, dim3(512), cut.bytes(), stream, group, cut);
  }
  GREEDYNAS_LAUNCH(float_join_kernel, dim3(2 * cut.patches, group.count), dim3(32 * kJoinWarps), 0, stream,
                   group, cut);
}

}  // namespace

template <>
int64_t finish_map_floats<float>(int64_t pixels, int channels) {
  const FloatCut cut = cut_floats(pixels, channels);
  return int64_t{cut.chunks} * cut.floats();
}

template <>
void finish_map(const Group<FinishMap<float>>& group, Stream stream) {
  if (group.nodes[0].pixels == 0) return;
  Group<FinishMap<float>> plain{}, with_moments{};
  for (int i = 0; i < group.count; ++i) {
    if (group.nodes[i].mean) with_moments.nodes[with_moments.count++] = group.nodes[i];
  }
  FloatCut cut{};
  if (with_moments.count > 0) cut = cut_floats(group.nodes[0].pixels, group.nodes[0].channels);
  for (int i = 0; i < group.count; ++i) {
    const FinishMap<float>& f = group.nodes[i];
    if (f.affine && (!f.mean || cut.slices > 1)) plain.nodes[plain.count++] = f;
  }
  finish_plainly(plain, stream);
  take_moments(with_moments, cut, stream);
}

}  // namespace greedynas::cuda
