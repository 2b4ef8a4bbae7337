// The projection of an inverted bottleneck on float maps: y = W activation(d * scale + shift) * gates.
//
// Each thread maps the pieces of d that it has itself copied to shared memory, where they lie.
#include "activate.h"
#include "device.h"
#include "float_pointwise.cuh"
#include "kernels.h"

namespace greedynas::cuda {
namespace {

template <typename Product>
class ProjectRows {
 public:
  __device__ ProjectRows(const Project<float>& node, const Unit& unit)
      : node_(node),
        unit_(unit),
        images_(unit.first, node.image_pixels),
        depth_(row_channels(node.hidden_channels)) {}

  __device__ __forceinline__ int count(int tile) const { return unit_.rows_of(tile); }

  __device__ __forceinline__ void load(int tile, int chunk, float* stage) const {
    const float* const from = node_.d + unit_.first_of(tile) * depth_;
    Product::load_rows(unit_.rows_of(tile), depth_, chunk, stage,
                       [&](int i) { return from + static_cast<int64_t>(Product::loaded_row(i)) * depth_; });
  }

  __device__ __forceinline__ void finish(int tile, int chunk, float* stage) {
    if (chunk == 0 && tile > 0 && node_.gates) images_.advance();
    const int channel = Product::loaded_column(chunk);
    if (channel >= depth_) return;
    const float4 scale = four(node_.affine + channel), shift = four(node_.affine + depth_ + channel);
    const float4 bound = four(node_.affine + 2 * depth_ + channel);
    with_activation(node_.activation, [&](auto activation) {
      constexpr int kActivation = decltype(activation)::value;
#pragma unroll 1  // beside the sums there are few registers
      for (int i = 0; i < Product::kLoadedRows; ++i) {
        if (Product::loaded_row(i) >= unit_.rows_of(tile)) break;
        auto* const piece = reinterpret_cast<float4*>(Product::loaded_piece(stage, i));
        float4 value = *piece;
        value.x = activate<kActivation>(fmaf(value.x, scale.x, shift.x), bound.x);
        value.y = activate<kActivation>(fmaf(value.y, scale.y, shift.y), bound.y);
        value.z = activate<kActivation>(fmaf(value.z, scale.z, shift.z), bound.z);
        value.w = activate<kActivation>(fmaf(value.w, scale.w, shift.w), bound.w);
        if (node_.gates) {
          int within;
          const int64_t image = images_.locate(Product::loaded_row(i), &within);
          const float4 gate = four(node_.gates + image * depth_ + channel);
          value.x *= gate.x, value.y *= gate.y, value.z *= gate.z, value.w *= gate.w;
        }
        *piece = value;
      }
    });
  }

 private:
  static __device__ __forceinline__ float4 four(const float* from) {
    return __ldg(reinterpret_cast<const float4*>(from));
  }

  const Project<float>& node_;
  const Unit& unit_;
  ImagesOfTile images_;
  const int depth_;
};

template <typename Product>
__global__ void __launch_bounds__(kProductThreads, Product::kBlocks)
    float_project_kernel(const __grid_constant__ Group<Project<float>> group, int passes) {
  GREEDYNAS_DYNAMIC_SHARED(shared);
  const Project<float>& node = group.nodes[blockIdx.y];
  const Unit unit(node.pixels, blockIdx.x / passes);
  ProjectRows<Product> rows(node, unit);
  run_float_pointwise<Product>(rows, node.weight, row_channels(node.hidden_channels), node.out, unit,
                               blockIdx.x % passes, reinterpret_cast<float*>(shared));
}

template <int kAcross>
void launch(const Group<Project<float>>& group, int units, Stream stream) {
  using Product = FloatProduct<kAcross>;
  const int passes = ceil_div(row_channels(group.nodes[0].out.channels), Product::kWidth);
  GREEDYNAS_LAUNCH((float_project_kernel<Product>), dim3(units * passes, group.count), dim3(kProductThreads),
                   float_pointwise_bytes<Product>(), stream, group, passes);
}

}  // namespace

template <>
int pointwise_units<float>(int64_t pixels) {
  return pixels == 0 ? 0
                     : static_cast<int>(ceil_div(ceil_div(pixels, int64_t{kTilePixels}), unit_tiles(pixels)));
}

template <>
void project(const Group<Project<float>>& group, Stream stream) {
  const int units = pointwise_units<float>(group.nodes[0].pixels);
  if (units == 0) return;
  // As few passes as there can be, as narrow as they can be.
  const int row = row_channels(group.nodes[0].out.channels), width = ceil_div(row, ceil_div(row, 64));
  if (width <= 16) return launch<2>(group, units, stream);
  if (width <= 32) return launch<4>(group, units, stream);
  if (width <= 40) return launch<5>(group, units, stream);
  if (width <= 48) return launch<6>(group, units, stream);
  launch<8>(group, units, stream);
}

}  // namespace greedynas::cuda
