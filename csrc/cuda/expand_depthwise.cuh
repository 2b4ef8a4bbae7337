// x -> expand (tensor cores) -> scale, shift, activation -> depthwise convolution -> d, and d's statistics.
// The expanded map lives in shared memory only, in half precision, kGroup channels at a time.
//
// A block goes through its channel groups (see Tiling). In each it slides down its rows: a step adds x rows
// to a ring of expanded rows (GEMM phase) and, once enough are there, makes `step` output rows (depthwise
// phase), while the next step's x rows or the next group's weights are on their way.
#pragma once

#include "activate.h"
#include "device.h"
#include "expand_depthwise_tiling.h"
#include "fast_div.cuh"
#include "kernels.h"
#include "numbers.h"

namespace greedynas::cuda::expand {
namespace {

// What one block works on. It lives in shared memory, so that no phase carries it in registers.
struct Piece {
  int first_group, end_group, unit, first_image, images;
  int out_row, out_col, out_rows, out_cols;  // the first output, how many
  int in_row, in_col, in_rows;  // image position of ring row 0 and column 0 (may be negative), rows needed
  int left, width;              // ring columns [left, left + width) are inside the image
  int lag, steps;               // `lag` steps fill the halo; later ones yield outputs
  FastDiv by_width, by_rows, by_pieces, by_strips, by_segments;
};

struct Rows {
  int begin, end, lo, hi;  // relative to ring row 0; [lo, hi) are inside the image
};

// The rows that step `t` adds.
template <int K, int S>
__device__ __forceinline__ Rows rows_of(const Shape& s, const Tiling& tiling, const Piece& b, int t) {
  constexpr int halo = K - S;
  const int add = tiling.step * S;
  Rows r;
  if (tiling.whole()) {
    r.begin = 0;
    r.end = b.in_rows;
  } else if (t < b.lag) {
    r.begin = t * add;
    r.end = min(r.begin + add, halo);
  } else {
    r.begin = halo + (t - b.lag) * add;
    r.end = min(r.begin + add, b.in_rows);
  }
  r.hi = min(r.end, s.height - b.in_row);
  r.lo = min(max(r.begin, -b.in_row), r.hi);
  return r;
}

template <int K, int S>
__device__ __forceinline__ void locate(const Shape& s, const Tiling& tiling, int groups, int groups_per_block,
                                       int group_blocks, Piece& b) {
  const int col_tiles = ceil_div(s.out_width, tiling.cols), bands = ceil_div(s.out_height, tiling.rows);
  const int block = static_cast<int>(blockIdx.x);
  b.first_group = block % group_blocks * groups_per_block;  // blocks that share x are neighbours
  b.end_group = min(b.first_group + groups_per_block, groups);
  b.unit = block / group_blocks;
  b.first_image = b.unit / (col_tiles * bands) * tiling.images;
  b.images = min(tiling.images, s.images - b.first_image);
  b.out_row = b.unit / col_tiles % bands * tiling.rows;
  b.out_col = b.unit % col_tiles * tiling.cols;
  b.out_rows = min(tiling.rows, s.out_height - b.out_row);
  b.out_cols = min(tiling.cols, s.out_width - b.out_col);
  b.in_row = b.out_row * S - K / 2;
  b.in_col = b.out_col * S - K / 2;
  b.in_rows = b.out_rows * S + K - S;
  b.left = max(0, -b.in_col);
  b.width = min(b.out_cols * S + K - S, s.width - b.in_col) - b.left;
  b.lag = tiling.whole() ? 0 : ceil_div(K - S, tiling.step * S);
  b.steps = b.lag + (tiling.whole() ? 1 : ceil_div(b.out_rows, tiling.step));
  b.by_width.set(b.width);
  b.by_pieces.set(s.in_channels / 8);
  b.by_strips.set(ceil_div(b.out_cols, kCols));
  b.by_segments.set(ceil_div(min(tiling.step, b.out_rows), item_rows(S)));
  const Rows r = rows_of<K, S>(s, tiling, b, 0);
  b.by_rows.set(max(1, r.hi - r.lo));  // used only when a block holds several images
}

__device__ __forceinline__ void copy16(void* to, const void* from, bool exists) {
  if (exists) {
    start_copy16(to, from);
  } else {
    *static_cast<float4*>(to) = make_float4(0.f, 0.f, 0.f, 0.f);
  }
}

__device__ __forceinline__ void zero16(void* to, int count) {
  for (int q = threadIdx.x; q < count; q += blockDim.x) {
    static_cast<float4*>(to)[q] = make_float4(0.f, 0.f, 0.f, 0.f);
  }
}

// Several images are whole ones, so their rows follow each other.
template <typename T>
__device__ __forceinline__ void load_x(const T* x, const Shape& s, const Layout& l, const Piece& b,
                                       unsigned char* shared, const Rows r) {
  T* const to = reinterpret_cast<T*>(shared + l.x);
  // Copied: cp.async clobbers memory.
  const int pieces = s.in_channels / 8, width = b.width, col0 = b.in_col + b.left;
  const int64_t row0 = static_cast<int64_t>(b.first_image) * s.height + b.in_row + r.lo;
  const FastDiv by_pieces = b.by_pieces, by_width = b.by_width;
  const int total = b.images * (r.hi - r.lo) * width * pieces;
  for (int q = threadIdx.x; q < total; q += blockDim.x) {
    const int px = by_pieces(q), piece = q - px * pieces, row = by_width(px), col = px - row * width;
    const int64_t pixel = (row0 + row) * s.width + col0 + col;
    start_copy16(to + px * l.x_stride + piece * 8, x + pixel * s.in_channels + piece * 8);
  }
}

// Of channel group `g`; channels that the node does not have become 0.
template <int K, int kGroup, typename T>
__device__ __forceinline__ void load_weights(const ExpandDepthwise<T>& node, const Shape& s, const Layout& l,
                                             const Piece& b, unsigned char* shared, int g) {
  T* const weight = reinterpret_cast<T*>(shared + l.weight);
  Half* const taps = reinterpret_cast<Half*>(shared + l.depthwise) + (g - b.first_group) % 2 * K * K * kGroup;
  float* const affine = reinterpret_cast<float*>(shared + l.affine);
  const int hidden = row_channels(node.hidden_channels), first = g * kGroup, pieces = s.in_channels / 8;
  const FastDiv by_pieces = b.by_pieces;
  const T* const expand = node.expand;
  const Half* const depthwise = node.depthwise;
  const float* const node_affine = node.affine;
  for (int q = threadIdx.x; q < kGroup * pieces; q += blockDim.x) {
    const int c = by_pieces(q), piece = q - c * pieces;
    copy16(weight + c * l.x_stride + piece * 8,
           expand + static_cast<int64_t>(first + c) * s.in_channels + piece * 8, first + c < hidden);
  }
  for (int q = threadIdx.x; q < K * K * (kGroup / 8); q += blockDim.x) {
    const int c = q % (kGroup / 8) * 8, tap = q / (kGroup / 8);
    copy16(taps + q * 8, depthwise + tap * hidden + first + c, first + c < hidden);
  }
  for (int q = threadIdx.x; q < 3 * (kGroup / 4); q += blockDim.x) {
    const int c = q % (kGroup / 4) * 4, row = q / (kGroup / 4);
    copy16(affine + q * 4, node_affine + row * hidden + first + c, first + c < hidden);
  }
}

template <bool kFirst, int kGroup, typename T>
__device__ __forceinline__ void multiply_step(float (&sums)[2][kGroup / 8][4], const T* x_row,
                                              const T* weight_row, int stride) {
  unsigned a[2][4];
  load_matrices(a[0], x_row);
  load_matrices(a[1], x_row + 16 * stride);
#pragma unroll
  for (int n = 0; n < kGroup / 8; n += 2) {
    unsigned w[4];
    load_matrices(w, weight_row + n * 8 * stride);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if constexpr (kFirst) {
        Pair<T>::multiply_first(sums[i][n], a[i], w[0], w[1]);
        Pair<T>::multiply_first(sums[i][n + 1], a[i], w[2], w[3]);
      } else {
        Pair<T>::multiply(sums[i][n], a[i], w[0], w[1]);
        Pair<T>::multiply(sums[i][n + 1], a[i], w[2], w[3]);
      }
    }
  }
}

// GEMM phase: the step's pixels x kGroup channels, 32 pixels a warp at a time, into the ring.
template <typename T, int kGroup, int kActivation>
__device__ __forceinline__ void expand_rows(const Shape& s, const Tiling& tiling, const Layout& l,
                                            const Piece& b, unsigned char* shared, const Rows rows) {
  unsigned* const ring = reinterpret_cast<unsigned*>(shared + l.ring);
  const T* const x = reinterpret_cast<const T*>(shared + l.x);
  const T* const weight = reinterpret_cast<const T*>(shared + l.weight);
  const float* const affine = reinterpret_cast<const float*>(shared + l.affine);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int* const place = reinterpret_cast<const int*>(shared + l.place) + lane / 4;
  const int pixels = b.images * (rows.hi - rows.lo) * b.width, k_steps = ceil_div(s.in_channels, 16);
  const int end = tiling.images * l.ring_rows * l.row_words;
  const int origin = (tiling.whole() ? rows.lo : rows.lo % l.ring_rows) * l.row_words;
  for (int m = warp * 32; m < pixels; m += warps * 32) {
    float sums[2][kGroup / 8][4];
    const T* x_row = x + (m + lane % 16) * l.x_stride + lane / 16 * 8;
    const T* weight_row = weight + (lane / 16 * 8 + lane % 8) * l.x_stride + lane / 8 % 2 * 8;
    multiply_step<true, kGroup>(sums, x_row, weight_row, l.x_stride);
#pragma unroll 2
    for (int k = 1; k < k_steps; ++k) {
      multiply_step<false, kGroup>(sums, x_row += 16, weight_row += 16, l.x_stride);
    }
    unsigned* out[4];  // this lane's four pixels: m + 8j + lane / 4
    bool real[4];      // the last tile may have fewer than 32
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      int at = origin + place[m + 8 * j];
      if (at >= end) at -= end;
      out[j] = ring + at + lane % 4;
      real[j] = m + 8 * j + lane / 4 < pixels;
    }
#pragma unroll
    for (int n = 0; n < kGroup / 8; ++n) {
      const auto of_channels = [&](int row) {
        return *reinterpret_cast<const float2*>(affine + row * kGroup + n * 8 + lane % 4 * 2);
      };
      const float2 scale = of_channels(0), shift = of_channels(1), bound = of_channels(2);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* const sum = sums[j / 2][n] + j % 2 * 2;
        const unsigned value = activate_to_halves<kActivation>(sum[0] * scale.x + shift.x,
                                                               sum[1] * scale.y + shift.y, bound.x, bound.y);
        if (real[j]) out[j][n * 4] = value;
      }
    }
  }
}

// Of a thread's two channels, in one channel group: sums of distances from the first values, and of their
// squares.
struct Moments {
  __half2 pilot;
  float sum0, sum1, square0, square1;
  int count;
};

// kMasked: fewer rows or columns than an item has, or a channel of padding, which becomes 0 (`keep` is then 0
// in its bits).
template <int R, bool kMasked>
__device__ __forceinline__ void store_item(unsigned* out, int row_stride, int pixel_stride,
                                           const __half2 (&sums)[R][kCols], int rows, int cols, unsigned keep,
                                           Moments& m) {
  if (m.count == 0) m.pilot = sums[0][0];
  const float2 pilot = __half22float2(m.pilot);
#pragma unroll
  for (int o = 0; o < R; ++o, out += row_stride) {
    if (kMasked && o >= rows) break;
    unsigned* q = out;
#pragma unroll
    for (int c = 0; c < kCols; ++c, q += pixel_stride) {
      if (kMasked && c >= cols) break;
      *q = kMasked ? as_bits(sums[o][c]) & keep : as_bits(sums[o][c]);
      const float2 value = __half22float2(sums[o][c]);  // what is stored is what is counted
      const float u0 = value.x - pilot.x, u1 = value.y - pilot.y;
      m.sum0 += u0;
      m.sum1 += u1;
      m.square0 += u0 * u0;
      m.square1 += u1 * u1;
    }
  }
  m.count += rows * cols;
}

// Depthwise phase: output rows from `first` on of the block's; a thread two channels of an item, R rows x
// kCols columns, at a time.
template <int K, int S, int kGroup, typename T>
__device__ __forceinline__ void depthwise_rows(const ExpandDepthwise<T>& node, const Shape& s,
                                               const Tiling& tiling, const Layout& l, const Piece& b,
                                               const unsigned char* shared, int g, int first,
                                               Moments& moments) {
  constexpr int R = item_rows(S), kIn = kCols * S + K - S, kWords = pixel_words(kGroup);
  constexpr int kPadding = item_padding(kGroup, S);
  const int pair = threadIdx.x % (kGroup / 2);
  const unsigned* const ring = reinterpret_cast<const unsigned*>(shared + l.ring) + pair;
  const unsigned* const taps = reinterpret_cast<const unsigned*>(shared + l.depthwise) +
                               (g - b.first_group) % 2 * K * K * (kGroup / 2) + pair;
  __half2 w[K * K];
#pragma unroll
  for (int i = 0; i < K * K; ++i) w[i] = as_half2(taps[i * (kGroup / 2)]);
  const int first_slot = tiling.whole() ? 0 : first * S % l.ring_rows;
  const int step_rows = min(tiling.step, b.out_rows - first);
  const int strips = b.by_strips.d, segments = b.by_segments.d;
#pragma unroll 1
  for (int item = threadIdx.x / (kGroup / 2); item < b.images * segments * strips; item += kSlots) {
    const int line = b.by_strips(item), strip = item - line * strips;
    const int image = b.by_segments(line), row = (line - image * segments) * R;
    if (row >= step_rows) continue;  // the last step may be short
    int slot = first_slot + row * S;
    if (slot >= l.ring_rows) slot -= l.ring_rows;
    __half2 sums[R][kCols];
#pragma unroll
    for (int o = 0; o < R; ++o) {
#pragma unroll
      for (int c = 0; c < kCols; ++c) sums[o][c] = __float2half2_rn(0.f);
    }
#pragma unroll
    for (int i = 0; i < R * S + K - S; ++i) {
      const unsigned* const from =
          ring + (image * l.ring_rows + slot) * l.row_words + strip * (kCols * S * kWords + kPadding);
      slot = slot + 1 == l.ring_rows ? 0 : slot + 1;
      __half2 v[kIn];
#pragma unroll
      for (int c = 0; c < kIn; ++c) v[c] = as_half2(from[c * kWords + (c >= kCols * S ? kPadding : 0)]);
#pragma unroll
      for (int o = 0; o < R; ++o) {
        const int ky = i - o * S;
        if (ky < 0 || ky >= K) continue;
#pragma unroll
        for (int kx = 0; kx < K; ++kx) {
#pragma unroll
          for (int c = 0; c < kCols; ++c) sums[o][c] = __hfma2(v[c * S + kx], w[ky * K + kx], sums[o][c]);
        }
      }
    }
    const int hidden = row_channels(node.hidden_channels), channel = g * kGroup + pair * 2;
    if (channel >= hidden) continue;
    const int rows = min(R, step_rows - row), col = strip * kCols, cols = min(kCols, b.out_cols - col);
    const int64_t pixel =
        (static_cast<int64_t>(b.first_image + image) * s.out_height + b.out_row + first + row) * s.out_width +
        b.out_col + col;
    unsigned* const out = reinterpret_cast<unsigned*>(node.d) + (pixel * hidden + channel) / 2;
    const int here = node.hidden_channels - channel;
    if (rows == R && cols == kCols && here >= 2) {
      store_item<R, false>(out, s.out_width * (hidden / 2), hidden / 2, sums, R, kCols, ~0u, moments);
    } else {
      const unsigned keep = here >= 2 ? ~0u : here == 1 ? 0xffffu : 0u;
      store_item<R, true>(out, s.out_width * (hidden / 2), hidden / 2, sums, rows, cols, keep, moments);
    }
  }
}

// Joins the slots' moments in their order and stores the block's partial sums of one group.
template <int kGroup, typename T>
__device__ __forceinline__ void store_moments(const ExpandDepthwise<T>& node, const Layout& l, const Piece& b,
                                              unsigned char* shared, int g, const Moments& m) {
  constexpr int kThreads = threads_of(kGroup);
  float* const sums = reinterpret_cast<float*>(shared + l.sums);
  unsigned* const pilots = reinterpret_cast<unsigned*>(sums + 4 * kThreads);
  int* const counts = reinterpret_cast<int*>(pilots + kThreads);
  const int tid = threadIdx.x;
  sums[tid] = m.sum0;
  sums[kThreads + tid] = m.sum1;
  sums[2 * kThreads + tid] = m.square0;
  sums[3 * kThreads + tid] = m.square1;
  pilots[tid] = as_bits(m.pilot);
  // A slot's threads counted the same, but for those without channels; the first always has some.
  if (tid % (kGroup / 2) == 0) counts[tid / (kGroup / 2)] = m.count;
  __syncthreads();
  const int hidden = row_channels(node.hidden_channels), channel = g * kGroup + tid;
  if (tid >= kGroup || channel >= hidden) return;
  float pilot = 0.f, sum = 0.f, square = 0.f;
  int count = 0;
  for (int slot = 0; slot < kSlots; ++slot) {
    const int at = slot * (kGroup / 2) + tid / 2, n = counts[slot];
    if (n == 0) continue;
    const float2 both = __half22float2(as_half2(pilots[at]));
    const float own = tid % 2 ? both.y : both.x;
    if (count == 0) pilot = own;
    const float far = own - pilot, own_sum = sums[tid % 2 * kThreads + at];
    sum += own_sum + n * far;
    square += sums[(2 + tid % 2) * kThreads + at] + (2.f * own_sum + n * far) * far;
    count += n;
  }
  const bool padding = channel >= node.hidden_channels;  // stored as 0, whatever was computed
  float* const to = node.partials + static_cast<int64_t>(b.unit) * 4 * hidden + channel;
  to[0] = padding ? 0.f : pilot;
  to[hidden] = padding ? 0.f : sum;
  to[2 * hidden] = padding ? 0.f : square;
  to[3 * hidden] = static_cast<float>(count);
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
// The largest one does not fit 128 registers there.
template <int K, int S, int kGroup>
constexpr int kLeastBlocks = K == 7 && S == 1 && kGroup == 64 ? 1 : least_blocks(K, kGroup);
#else
template <int K, int S, int kGroup>
constexpr int kLeastBlocks = least_blocks(K, kGroup);
#endif

template <typename T, int K, int S, int kGroup>
__global__ void __launch_bounds__(threads_of(kGroup), kLeastBlocks<K, S, kGroup>)
    expand_depthwise_kernel(const __grid_constant__ Group<ExpandDepthwise<T>> group,
                            const __grid_constant__ Shape s, const __grid_constant__ Tiling tiling,
                            const __grid_constant__ Layout l, int groups_per_block, int group_blocks) {
  if (!computes<T>()) return;
  GREEDYNAS_DYNAMIC_SHARED(shared);
  GREEDYNAS_SHARED(Piece, b);
  const ExpandDepthwise<T>& node = group.nodes[blockIdx.y];
  const int groups = ceil_div(row_channels(node.hidden_channels), kGroup);
  if (static_cast<int>(blockIdx.x) % group_blocks * groups_per_block >= groups) return;
  const int row_bytes = l.row_words * 4;

  if (threadIdx.x == 0) locate<K, S>(s, tiling, groups, groups_per_block, group_blocks, b);
  zero16(shared + l.ring, (l.x - l.ring) / 16);  // the padding is never written again
  if (s.in_channels % 16 != 0) {                 // behind the rows of both GEMM operands, adjacent and alike
    for (int q = threadIdx.x; q < (l.depthwise - l.x) / (l.x_stride * 2); q += blockDim.x) {
      *reinterpret_cast<float4*>(shared + l.x + (q * l.x_stride + s.in_channels) * 2) =
          make_float4(0.f, 0.f, 0.f, 0.f);
    }
  }
  __syncthreads();
  for (int px = threadIdx.x; px < (l.sums - l.place) / 4; px += blockDim.x) {
    // Ring words of pixel px, from the step's first row.
    const int row = b.by_width(px), image = b.images > 1 ? b.by_rows(row) : 0;
    const int col = b.left + px - row * b.width, ring_row = row - image * static_cast<int>(b.by_rows.d);
    reinterpret_cast<int*>(shared + l.place)[px] = (image * l.ring_rows + ring_row) * l.row_words +
                                                   col * pixel_words(kGroup) +
                                                   col / (kCols * S) * item_padding(kGroup, S);
  }
  load_x(node.x, s, l, b, shared, rows_of<K, S>(s, tiling, b, 0));
  load_weights<K, kGroup>(node, s, l, b, shared, b.first_group);
  commit_copies();

  for (int g = b.first_group; g < b.end_group; ++g) {
    Moments moments{};
    for (int t = 0; t < b.steps; ++t) {
      wait_for_copies<0>();
      __syncthreads();  // x and weights are here; the ring is free
      const Rows rows = rows_of<K, S>(s, tiling, b, t);
      if (!tiling.whole()) {  // rows outside the image: their slots hold old rows
        for (int r = rows.begin; r < rows.end; ++r) {
          if (r >= rows.lo && r < rows.hi) continue;
          zero16(shared + l.ring + r % l.ring_rows * row_bytes, row_bytes / 16);
        }
      }
      with_activation(node.activation, [&](auto activation) {
        expand_rows<T, kGroup, decltype(activation)::value>(s, tiling, l, b, shared, rows);
      });
      __syncthreads();  // the ring rows are complete; x may be overwritten
      const bool last = t + 1 == b.steps, more = g + 1 < b.end_group;
      if (!last) {
        load_x(node.x, s, l, b, shared, rows_of<K, S>(s, tiling, b, t + 1));
      } else if (more) {
        load_weights<K, kGroup>(node, s, l, b, shared, g + 1);
      }
      commit_copies();
      if (t >= b.lag) {
        depthwise_rows<K, S, kGroup>(node, s, tiling, l, b, shared, g, (t - b.lag) * tiling.step, moments);
      }
    }
    if (node.partials != nullptr) store_moments<kGroup>(node, l, b, shared, g, moments);
  }
}

}  // namespace
}  // namespace greedynas::cuda::expand
