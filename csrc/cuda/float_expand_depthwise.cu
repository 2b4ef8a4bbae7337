// Float maps: x -> expand -> scale, shift, activation -> depthwise convolution -> d, and d's statistics. The
// expanded map lives in shared memory only, kGroup channels of it.
//
// A block slides down its output columns. In a step the product (float_product.cuh) adds expanded rows to a
// ring, tile by tile of pixels; behind the step's last tile lanes, a channel each, make `step` output rows
// from it, while the next step's first pixels are on their way.
#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>

#include "activate.h"
#include "device.h"
#include "float_expand_pixels.cuh"
#include "float_expand_tiling.h"
#include "float_product.cuh"
#include "kernels.h"

namespace greedynas::cuda {
namespace {

using float_expand::InputRows;
using float_expand::item_rows;
using float_expand::kCols;
using float_expand::kGroup;
using float_expand::kWarps;
using float_expand::Layout;
using float_expand::Piece;
using float_expand::Plan;
using float_expand::Product;
using float_expand::Shape;
using float_expand::Tiling;
using float_expand::Walk;

// A lane's channel: distances from a value that it has stored.
struct Moments {
  float pilot = 0.f, sum = 0.f, squares = 0.f;
  int count = 0;
};

template <int K, int S>
class Block {
 public:
  __device__ Block(const ExpandDepthwise<float>& node, const Shape& s, const Tiling& t, const Layout& l,
                   const Piece<K, S>& b, int group, unsigned char* shared)
      : node_(node),
        s_(s),
        t_(t),
        l_(l),
        b_(b),
        hidden_(row_channels(node.hidden_channels)),
        first_channel_(group * kGroup),
        ring_(reinterpret_cast<float*>(shared)),
        taps_(reinterpret_cast<float*>(shared + l.taps)),
        affine_(reinterpret_cast<float*>(shared + l.affine)) {}

  // Zeros in the ring, where padding is never written again; the group's small weights, 0 for channels that
  // the node does not have.
  __device__ __forceinline__ void prepare() const {
    const int thread = threadIdx.x;
    for (int q = thread; q < l_.stages / 16; q += kProductThreads) {
      reinterpret_cast<float4*>(ring_)[q] = float4{0.f, 0.f, 0.f, 0.f};
    }
    const bool real = first_channel_ + thread % kGroup < hidden_;
    const auto copy = [&](float* to, const float* from, int rows) {
      for (int r = thread / kGroup; r < rows; r += kProductThreads / kGroup) {
        const int c = thread % kGroup;
        to[r * kGroup + c] = real ? from[r * hidden_ + first_channel_ + c] : 0.f;
      }
    };
    copy(taps_, node_.depthwise, K * K);
    copy(affine_, node_.affine, 3);
  }

  // A thread's columns are four neighbouring channels.
  static __device__ __forceinline__ int channel_of_column(int c) { return c % 8 * 4 + c / 8; }

  __device__ __forceinline__ void load_columns(int chunk, float* stage) const {
    Product::load_columns(node_.expand, hidden_, s_.in_channels, chunk, stage,
                          [&](int c) { return first_channel_ + channel_of_column(c); });
  }

  // The walk's tile is complete.
  __device__ __forceinline__ void finish_tile(const Walk& walk, const Product::Sums& sums) {
    const int pixels = b_.pixels(s_, t_, walk.step);
    if (walk.tile == 0 && walk.step > 0) clear_rows_below(walk.step);
    if (walk.tile * kTilePixels + 32 * Product::warp() < pixels) {
      with_activation(node_.activation, [&](auto activation) {
        store_expanded<decltype(activation)::value>(walk, pixels, sums);
      });
    }
    if (walk.tile + 1 < b_.tiles(s_, t_, walk.step)) return;
    __syncthreads();  // the step's rows are complete
    convolve(walk.step * t_.step);
  }

  // Joins the warps' moments in their order.
  __device__ __forceinline__ void store_moments(unsigned char* shared) const {
    if (node_.partials == nullptr) return;
    auto* const all = reinterpret_cast<Moments*>(shared + l_.stages);  // [kWarps][kGroup]
    all[threadIdx.x] = moments_;
    __syncthreads();
    const int channel = first_channel_ + static_cast<int>(threadIdx.x);
    if (threadIdx.x >= kGroup || channel >= hidden_) return;
    Moments total;
    for (int warp = 0; warp < kWarps; ++warp) {
      const Moments& own = all[warp * kGroup + threadIdx.x];
      if (own.count == 0) continue;
      if (total.count == 0) total.pilot = own.pilot;
      const float n = static_cast<float>(own.count), far = own.pilot - total.pilot;
      total.sum += own.sum + n * far;
      total.squares += own.squares + (2.f * own.sum + n * far) * far;
      total.count += own.count;
    }
    float* const to = node_.partials + static_cast<int64_t>(b_.unit) * 4 * hidden_ + channel;
    to[0] = total.pilot;
    to[hidden_] = total.sum;
    to[2 * hidden_] = total.squares;
    to[3 * hidden_] = static_cast<float>(total.count);
  }

 private:
  __device__ __forceinline__ float* ring_row(int image, int slot) const {
    return ring_ + (image * l_.ring_rows + slot) * l_.ring_cols * kGroup;
  }

  // Rows that the step needs from below the image: their slots hold old ones.
  __device__ __forceinline__ void clear_rows_below(int step) const {
    const int first = max(K - S + step * t_.step * S, s_.height + K / 2),
              last = K - S + (step + 1) * t_.step * S;
    for (int r = first; r < last; ++r) {
      auto* const row = reinterpret_cast<float4*>(ring_row(0, r % l_.ring_rows));
      for (int q = threadIdx.x; q < l_.ring_cols * kGroup / 4; q += kProductThreads) {
        row[q] = float4{0.f, 0.f, 0.f, 0.f};
      }
    }
  }

  template <int kActivation>
  __device__ __forceinline__ void store_expanded(const Walk& walk, int pixels,
                                                 const Product::Sums& sums) const {
    static_assert(Product::kAcross == 4);
    const float4* const affine = reinterpret_cast<const float4*>(affine_) + Product::lane() % 8;
    const float4 scale = affine[0], shift = affine[kGroup / 4], bound = affine[kGroup / 2];
    const int first_slot = b_.first_row(t_, walk.step) % l_.ring_rows;
#pragma unroll
    for (int i = 0; i < Product::kRows; ++i) {
      const int pixel = walk.tile * kTilePixels + Product::row(i);
      if (pixel >= pixels) break;
      int image, row, column;
      b_.locate(pixel, &image, &row, &column);
      int slot = first_slot + row;
      if (slot >= l_.ring_rows) slot -= l_.ring_rows;
      float* const to = ring_row(image, slot) + (b_.left + column) * kGroup;
      reinterpret_cast<float4*>(to)[Product::lane() % 8] =
          float4{activate<kActivation>(fmaf(sums[i][0], scale.x, shift.x), bound.x),
                 activate<kActivation>(fmaf(sums[i][1], scale.y, shift.y), bound.y),
                 activate<kActivation>(fmaf(sums[i][2], scale.z, shift.z), bound.z),
                 activate<kActivation>(fmaf(sums[i][3], scale.w, shift.w), bound.w)};
    }
  }

  // Output rows from `first` on: a warp takes R rows x kCols columns at a time, a lane one channel of them.
  __device__ __forceinline__ void convolve(int first) {
    constexpr int R = item_rows(S), kIn = kCols * S + K - S;
    const int lane = Product::lane(), channel = first_channel_ + lane;
    const int step_rows = min(t_.step, s_.out_height - first);
    const int segments = ceil_div(step_rows, R), strips = ceil_div(b_.out_cols, kCols);
    const bool real = channel < node_.hidden_channels;
    float w[K * K];
#pragma unroll
    for (int i = 0; i < K * K; ++i) w[i] = taps_[i * kGroup + lane];
#pragma unroll 1
    for (int item = Product::warp(); item < b_.images * segments * strips; item += kWarps) {
      const int strip = item % strips, line = item / strips, image = line / segments;
      const int row = (line - image * segments) * R;
      int slot = (first + row) * S % l_.ring_rows;
      float sums[R][kCols] = {};
#pragma unroll
      for (int i = 0; i < R * S + K - S; ++i) {
        const float* const from = ring_row(image, slot) + strip * (kCols * S * kGroup) + lane;
        slot = slot + 1 == l_.ring_rows ? 0 : slot + 1;
        float v[kIn];
#pragma unroll
        for (int c = 0; c < kIn; ++c) v[c] = from[c * kGroup];
#pragma unroll
        for (int o = 0; o < R; ++o) {
          const int ky = i - o * S;
          if (ky < 0 || ky >= K) continue;
#pragma unroll
          for (int kx = 0; kx < K; ++kx) {
#pragma unroll
            for (int c = 0; c < kCols; ++c) sums[o][c] = fmaf(v[c * S + kx], w[ky * K + kx], sums[o][c]);
          }
        }
      }
      if (channel >= hidden_) continue;
      const int rows = min(R, step_rows - row), col = strip * kCols, cols = min(kCols, b_.out_cols - col);
      const int64_t pixel =
          (static_cast<int64_t>(b_.first_image + image) * s_.out_height + first + row) * s_.out_width +
          b_.out_col + col;
      store(node_.d + pixel * hidden_ + channel, sums, rows, cols, real);
    }
  }

  // Channels that only pad are stored as 0, whatever was computed.
  template <int R>
  __device__ __forceinline__ void store(float* to, const float (&sums)[R][kCols], int rows, int cols,
                                        bool real) {
    if (moments_.count == 0) moments_.pilot = real ? sums[0][0] : 0.f;
#pragma unroll
    for (int o = 0; o < R; ++o) {
      if (o >= rows) break;
#pragma unroll
      for (int c = 0; c < kCols; ++c) {
        if (c >= cols) break;
        const float value = real ? sums[o][c] : 0.f, distance = value - moments_.pilot;
        to[(o * s_.out_width + c) * hidden_] = value;
        moments_.sum += distance;
        moments_.squares = fmaf(distance, distance, moments_.squares);
      }
    }
    moments_.count += rows * cols;
  }

  const ExpandDepthwise<float>& node_;
  const Shape& s_;
  const Tiling& t_;
  const Layout& l_;
  const Piece<K, S>& b_;
  const int hidden_, first_channel_;
  float* const ring_;
  float* const taps_;
  float* const affine_;
  Moments moments_;
};

// The largest one needs more registers, and so much shared memory that fewer blocks fit anyway.
template <int K, int S>
constexpr int kResident = Product::kBlocks - (K == 7 && S == 1 && kBlocksFewer == 0 ? 1 : 0);

template <int K, int S>
__global__ void __launch_bounds__(kProductThreads, kResident<K, S>)
    float_expand_depthwise_kernel(const __grid_constant__ Group<ExpandDepthwise<float>> group,
                                  const __grid_constant__ Shape s, const __grid_constant__ Tiling t,
                                  const __grid_constant__ Layout l, int groups) {
  GREEDYNAS_DYNAMIC_SHARED(shared);
  using ThePiece = Piece<K, S>;
  GREEDYNAS_SHARED(ThePiece, piece);
  const ExpandDepthwise<float>& node = group.nodes[blockIdx.y];
  const int my_group = static_cast<int>(blockIdx.x) % groups;  // blocks that share x are neighbours
  if (my_group * kGroup >= row_channels(node.hidden_channels)) return;
  if (threadIdx.x == 0) piece.set(s, t, static_cast<int>(blockIdx.x) / groups);
  __syncthreads();
  Block<K, S> block(node, s, t, l, piece, my_group, shared);
  InputRows<K, S> rows(node, s, t, piece);
  block.prepare();
  int tiles = 0;
  for (int step = 0; step < piece.steps; ++step) tiles += piece.tiles(s, t, step);
  Product::run(
      tiles, s.in_channels, reinterpret_cast<float*>(shared + l.stages), rows,
      [&](int, int chunk, float* stage) { block.load_columns(chunk, stage); },
      [&](int, const Product::Sums& sums) { block.finish_tile(rows.walk, sums); });
  __syncthreads();
  block.store_moments(shared);
}

Plan plan_of(const ExpandDepthwise<float>& node) {
  // The search takes some microseconds, and a chain asks for the same shapes again and again.
  thread_local std::map<std::array<int, 7>, Plan> known;
  const int shared_bytes = shared_bytes_per_block();
  const std::array<int, 7> key{node.images, node.height, node.width,  node.in_channels,
                               node.kernel, node.stride, shared_bytes};
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  const Shape shape = float_expand::shape_of(node);
  return known[key] = {shape, float_expand::best_tiling(shape, shared_bytes, Product::kBytes)};
}

template <int K, int S>
void launch(const Group<ExpandDepthwise<float>>& group, Stream stream) {
  const Plan plan = plan_of(group.nodes[0]);
  const Layout layout = float_expand::layout_of(plan.shape, plan.tiling, Product::kBytes);
  int groups = 0;
  for (int i = 0; i < group.count; ++i) {
    groups = std::max(groups, ceil_div(row_channels(group.nodes[i].hidden_channels), kGroup));
  }
  GREEDYNAS_LAUNCH((float_expand_depthwise_kernel<K, S>), dim3(plan.units() * groups, group.count),
                   dim3(kProductThreads), layout.bytes, stream, group, plan.shape, plan.tiling, layout,
                   groups);
}

}  // namespace

template <>
int expand_depthwise_units(const ExpandDepthwise<float>& node) {
  return plan_of(node).units();
}

template <>
void expand_depthwise(const Group<ExpandDepthwise<float>>& group, Stream stream) {
  const ExpandDepthwise<float>& node = group.nodes[0];
  switch (node.kernel * 10 + node.stride) {
    case 31:
      return launch<3, 1>(group, stream);
    case 32:
      return launch<3, 2>(group, stream);
    case 51:
      return launch<5, 1>(group, stream);
    case 52:
      return launch<5, 2>(group, stream);
    case 71:
      return launch<7, 1>(group, stream);
    case 72:
      return launch<7, 2>(group, stream);
  }
  throw std::invalid_argument("expand_depthwise: expected kernel 3, 5 or 7 and stride 1 or 2, got " +
                              std::to_string(node.kernel) + " and " + std::to_string(node.stride));
}

}  // namespace greedynas::cuda
