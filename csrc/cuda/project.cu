// The projection of an inverted bottleneck: y = W activation(d * scale + shift) * gates, in half precision.
//
// Each thread maps the pieces of d that it has itself copied to shared memory, where they lie, in single
// precision: then every number is mapped once, however many warps multiply it.
#include <algorithm>

#include "pointwise.cuh"

namespace greedynas::cuda {
namespace {

template <typename T, int kChunk>
class ProjectPixels {
 public:
  __device__ ProjectPixels(const Project<T>& node, const Unit& unit)
      : unit_(unit),
        d_(node.d),
        affine_(node.affine),
        gates_(node.gates),
        images_(unit.first, node.image_pixels),
        depth_(row_channels(node.hidden_channels)),
        activation_(node.activation) {}

  __device__ __forceinline__ void load(int tile, int chunk, unsigned char* stage) {
    if (chunk == 0) {
      rows_ = unit_.rows_of(tile);
      from_ = d_ + (unit_.first_of(tile) + Pieces::row()) * depth_ + Pieces::channel(0);
    }
    Pieces::load(rows_, depth_, chunk, stage, [&](int i) { return from_ + i * Pieces::kStep * depth_; });
    from_ += kChunk;
  }

  __device__ __forceinline__ void finish(int tile, int chunk, unsigned char* stage) {
    if (chunk == 0) {
      finished_rows_ = unit_.rows_of(tile);
      if (gates_ && tile > 0) images_.advance();
    }
    const int channel = Pieces::channel(chunk);
    if (channel >= depth_) return;
    with_activation(activation_, [&](auto activation) { map<decltype(activation)::value>(channel, stage); });
    if (gates_) multiply_by_gates(channel, stage);
  }

 private:
  using Pieces = PieceMap<kChunk>;

  // Calls `function(row, pair[4])` for this thread's pieces.
  template <typename Function>
  __device__ __forceinline__ void for_pieces(unsigned char* stage, const Function& function) const {
    unsigned char* at = stage + Pieces::offset();
#pragma unroll 1
    for (int row = Pieces::row(); row < finished_rows_; row += Pieces::kStep) {
      const uint4 values = *reinterpret_cast<const uint4*>(at);
      unsigned pair[4] = {values.x, values.y, values.z, values.w};
      function(row, pair);
      *reinterpret_cast<uint4*>(at) = uint4{pair[0], pair[1], pair[2], pair[3]};
      at += Pieces::kOffsetStep;
    }
  }

  template <int kActivation>
  __device__ __forceinline__ void map(int channel, unsigned char* stage) const {
    float scale[8], shift[8], bound[8];
    load8(scale, affine_ + channel);
    load8(shift, affine_ + depth_ + channel);
    load8(bound, affine_ + 2 * depth_ + channel);
    for_pieces(stage, [&](int, unsigned (&pair)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 d = __half22float2(as_half2(pair[i]));
        const float low = fmaf(d.x, scale[2 * i], shift[2 * i]);
        const float high = fmaf(d.y, scale[2 * i + 1], shift[2 * i + 1]);
        pair[i] = activate_to_halves<kActivation>(low, high, bound[2 * i], bound[2 * i + 1]);
      }
    });
  }

  __device__ __forceinline__ void multiply_by_gates(int channel, unsigned char* stage) const {
    for_pieces(stage, [&](int row, unsigned (&pair)[4]) {
      int within;
      float gate[8];
      load8(gate, gates_ + images_.locate(row, &within) * depth_ + channel);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        pair[i] = as_bits(__hmul2(as_half2(pair[i]), as_half2(pack_half(gate[2 * i], gate[2 * i + 1]))));
      }
    });
  }

  const Unit& unit_;
  const Half* const d_;
  const float* const affine_;
  const float* const gates_;
  ImagesOfTile images_;
  const int depth_, activation_;
  const Half* from_;          // this thread's next piece
  int rows_, finished_rows_;  // of the tiles that are being loaded and finished
};

template <typename T, typename Tile, bool kMapped>
__global__ void __launch_bounds__(kPointwiseThreads, Tile::kBlocks)
    project_kernel(const __grid_constant__ Group<Project<T>> group, int passes, int stages,
                   int weight_slots) {
  if (!computes_by<T, Tile>()) return;
  GREEDYNAS_DYNAMIC_SHARED(shared);
  const Project<T>& node = group.nodes[blockIdx.y];
  const Unit unit(node.pixels, blockIdx.x / passes);
  ProjectPixels<T, Tile::kChunk> source(node, unit);
  run_pointwise<Tile, kMapped>(source, node.weight, row_channels(node.hidden_channels), node.out, unit,
                               blockIdx.x % passes, stages, weight_slots, shared);
}

}  // namespace

template <typename T>
int pointwise_units(int64_t pixels) {
  if (pixels == 0) return 0;
  return static_cast<int>(ceil_div(ceil_div(pixels, int64_t{kTilePixels}), unit_tiles(pixels)));
}

template <typename T>
void project(const Group<Project<T>>& group, Stream stream) {
  const int units = pointwise_units<T>(group.nodes[0].pixels), channels = group.nodes[0].out.channels;
  if (units == 0) return;
  int depth = 0;
  for (int i = 0; i < group.count; ++i) {
    depth = std::max(depth, row_channels(group.nodes[i].hidden_channels));
  }
  with_pointwise_tile(channels, depth, [&](auto tile) {
    using Tile = decltype(tile);
    const PipelinePlan plan = plan_pointwise<Tile>(depth);
    const int passes = ceil_div(row_channels(channels), Tile::kWidth);
    const auto launch = [&](auto project_kernel_of_tile) {
      GREEDYNAS_LAUNCH(project_kernel_of_tile, dim3(units * passes, group.count), dim3(kPointwiseThreads),
                       plan.bytes, stream, group, passes, plan.stages, plan.weight_slots);
    };
    if (group.nodes[0].out.affine) {
      launch(project_kernel<T, Tile, true>);
    } else {
      launch(project_kernel<T, Tile, false>);
    }
  });
}

template int pointwise_units<BFloat16>(int64_t);
template int pointwise_units<Half>(int64_t);
template void project(const Group<Project<BFloat16>>&, Stream);
template void project(const Group<Project<Half>>&, Stream);

}  // namespace greedynas::cuda
