// The kernels that a chain of choice blocks is made of: their arguments and, for each instruction set, a
// table of pointers to them. The bodies are in kernels/, compiled once per instruction set.
//
// Feature maps are NHWC: a row of row_channels<T>(C) channels per pixel, all images' pixels one after the
// other, the padding zero. kSlackRows more rows can be read behind a map's end, and no result depends on
// them.
//
// Hidden channels are cut into groups of Kernels::group_width (the last may be narrower, but a multiple of
// kLanes), images into slabs of SlabCut::images. The output of a depthwise convolution lies as
// [slab][group][pixel of the slab][channel of the group], as the projection reads it.
//
// Weights of pointwise convolutions are packed as [group of output channels][input channel][output channel of
// the group], for BFloat16 with two neighbouring input channels side by side.
//
// Partial sums of statistics lie as [unit][pilot, sum, squares][channel]: `sum` and `squares` are of the
// distances from the pilot, the first value of the unit, so that nothing cancels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "operation_source.h"
#include "parallel.h"

namespace greedynas::cpu {

struct BFloat16 {
  uint16_t bits;
};

// The same numbers, in rows that matrix tiles (AMX) read whole: row_channels.
struct TiledBFloat16 {
  uint16_t bits;
};

template <typename T>
struct ComputeType {
  using type = T;
};
template <>
struct ComputeType<BFloat16> {
  using type = float;
};
template <>
struct ComputeType<TiledBFloat16> {
  using type = float;
};
// In what values of type T are computed, and their statistics, affine maps and depthwise weights kept.
template <typename T>
using Compute = typename ComputeType<T>::type;

template <typename T>
inline constexpr bool kTiled = std::is_same_v<T, TiledBFloat16>;

// Channels of a pixel's row in memory, and of everything that is kept per channel.
template <typename T>
constexpr int64_t row_channels(int64_t channels) {
  return kTiled<T> ? ceil_div(channels, 32) * 32 : padded(channels);
}

inline constexpr int64_t kSlackRows = 32;
// Of kTiled kernels: the inputs of projections are multiplied by 2^-kTileExponent, their weights by 2^that.
inline constexpr int kTileExponent = 112;
// Of the activations that a projection holds in the cache.
template <typename T>
inline constexpr int64_t kPanelPixels = kTiled<T> ? 32 : 48;
inline constexpr int64_t kBlockPixels = 192;  // whose statistics a projection sums up in one piece
inline constexpr int64_t kGramPixels = 256;

// Images are worked on in slabs: together, where they are small, so that tiles of pixels are full.
struct SlabCut {
  int64_t images;  // of a slab; the last one may have fewer
  int64_t slabs;

  SlabCut(int64_t total_images, int64_t image_pixels) {
    constexpr int64_t kEnoughPixels = 392;
    images = std::min(total_images, ceil_div(kEnoughPixels, image_pixels));
    slabs = ceil_div(total_images, images);
  }
};

// expand -> affine, activation -> depthwise, or without expand_weight: affine, activation -> depthwise.
// Unit u is slab u / groups, group u % groups.
template <typename T>
struct ExpandDepthwise {
  const T* input;  // [images * height * width][row_channels(in_channels)]
  int64_t images, height, width;
  int64_t in_channels;
  const T* expand_weight;       // or null; then in_channels == hidden_channels
  const Compute<T>* scale;      // of the hidden channels before the depthwise convolution; null: as they are
  const Compute<T>* shift;      //
  int64_t activation;           // after the affine map
  const Compute<T>* depthwise;  // [group][kernel * kernel][channel of the group]
  int64_t hidden_channels, kernel, stride;
  int64_t slab_images;
  // Of kTiled kernels with an affine map, or null: the depthwise weights as half-precision numbers, laid out
  // like `depthwise`. Then what they meet is multiplied by `factor` first (powers of two, which keep it in
  // the range of half precision), and the output is of such numbers too. Weights and output are on a cache
  // line's boundary.
  const uint16_t* half_depthwise;
  const Compute<T>* factor;
  T* output;  // of slab `first_slab`
  int64_t first_slab;
  double* partials;  // units: slabs; or null
  // Whether the output is stored past the cache, for one that does not fit into it. It is on a cache line's
  // boundary.
  bool streams;
};

// What becomes of a pointwise convolution's sums: stored as they are with their statistics (partials, units:
// blocks of kBlockPixels), or mapped by scale and shift, activated, and the residual added.
template <typename T>
struct PointwiseOutput {
  const T* weight;
  int64_t depth;  // input channels
  int64_t channels;
  T* output;  // [pixels][row_channels(channels)]
  const Compute<T>*scale, *shift;
  int64_t activation;
  const T* residual;  // or null
  double* partials;
  const Compute<T>* factor = nullptr;  // of kTiled kernels: what the sums are multiplied by first; null: 1
};

// activation(depthwise output * scale + shift) * gates, the input of a projection.
template <typename T>
struct ProjectInput {
  const T* depthwise;  // of slab `first_slab`
  int64_t first_slab;
  int64_t slab_images, images, image_pixels;
  const Compute<T>*scale, *shift;
  int64_t activation;
  const Compute<T>* gates;  // [images][row_channels(hidden)] or null
  // Of kTiled kernels: whether the depthwise output is of half-precision numbers, on a cache line's boundary,
  // and powers of two by which the projection's inputs are multiplied, its weights being divided by them;
  // never null.
  bool halves = false;
  const Compute<T>* factor = nullptr;
};

// Every stride-th pixel of a map.
template <typename T>
struct StridedInput {
  const T* input;
  int64_t images, height, width, channels, stride;
};

// Whether the inputs of a dense convolution's output are taken tap by tap, and of each tap all channels: of
// many channels, which mostly lie side by side. Of few, as images have, channel by channel.
constexpr bool takes_tap_by_tap(int64_t channels) { return channels >= 8; }

// The images themselves, of any strides (in elements), for a dense convolution padded by kernel / 2.
template <typename T>
struct PatchInput {
  const Compute<T>* input;
  int64_t images, height, width, channels;
  int64_t strides[4];  // of image, channel, row, column
  int64_t kernel, stride;
};

// Maxima or means over windows of kernel x kernel pixels, padded by kernel / 2, and their statistics. Unit: a
// block of kBlockPixels of the output.
template <typename T>
struct Pool {
  const T* input;
  T* output;
  int64_t images, height, width, channels, kernel, stride;
  int64_t pooling;   // Pooling
  double* partials;  // or null
};

// output = activation(raw * scale + shift) + residual, and sums for the moments of the output. Unit:
// kGramPixels.
template <typename T>
struct FinishMap {
  const T* raw;
  T* output;  // may be raw
  int64_t pixels, channels;
  const Compute<T>*scale, *shift;  // null: output == raw, moments alone
  int64_t activation;
  const T* residual;        // or null
  const Compute<T>* pilot;  // [row_channels(channels)], near the mean; null: no moments
  // Elements from a pixel of the output to the next, without moments; 0: as in the other maps.
  int64_t output_stride = 0;
};

// Mean over each image of activation(depthwise output * scale + shift). Unit: a slab.
template <typename T>
struct Squeeze {
  ProjectInput<T> input;
  int64_t hidden_channels;
  Compute<T>* output;  // [images][row_channels(hidden)]
};

enum LinearActivation : int64_t { kNoActivation, kLinearRelu, kLinearHsigmoid, kLinearSigmoid };

// Rows of C times a matrix, plus bias, activated.
template <typename C>
struct Linear {
  const C* input;
  int64_t rows, in_stride, depth;
  const C* weight;
  const C* bias;  // padded(channels) or null
  int64_t channels;
  int64_t activation;  // LinearActivation
  C* output;
  int64_t out_stride;
  bool padded_output;  // whether padded(channels) are written
};

// Mean over each image of activation(input * weight * scale + shift). Unit u: slab u / groups, group u %
// groups.
template <typename T>
struct HeadPool {
  const T* input;
  int64_t images, image_pixels, in_channels, slab_images;
  const T* weight;
  int64_t channels;
  const Compute<T>*scale, *shift;
  int64_t activation;
  Compute<T>* output;  // [images][row_channels(channels)]
};

// A pointwise convolution's weights as they are found: rows are outputs. Row and column factors, or null, and
// one for all.
struct TilePacking {
  const float* weight;
  int64_t rows, columns, row_stride;
  const float *row_factor, *column_factor;
  float factor;
};

template <typename T>
struct Kernels {
  using C = Compute<T>;
  const char* name;
  int64_t group_width;
  int64_t depth_multiple;  // to which the input channels of packed weights are padded
  void (*expand_depthwise)(const ExpandDepthwise<T>&, int64_t first_unit, int64_t last_unit);
  // Blocks of the pixels of one slab, [first_block, last_block).
  void (*project)(const ProjectInput<T>&, const PointwiseOutput<T>&, int64_t slab, int64_t first_block,
                  int64_t last_block);
  void (*strided)(const StridedInput<T>&, const PointwiseOutput<T>&, int64_t first_block, int64_t last_block);
  void (*patches)(const PatchInput<T>&, const PointwiseOutput<T>&, int64_t first_block, int64_t last_block);
  void (*pool)(const Pool<T>&, int64_t first_block, int64_t last_block);
  // Adds to gram [padded][padded] (upper triangle of blocks) and sums [padded] where there is a pilot.
  void (*finish)(const FinishMap<T>&, int64_t first_unit, int64_t last_unit, double* gram, double* sums);
  // Mean and variance of a group of outputs of a pointwise convolution from those of its inputs.
  void (*pointwise_moments)(const C* mean, const C* covariance, int64_t depth, const T* weight,
                            int64_t channels, int64_t group, C* out_mean, C* out_variance);
  void (*squeeze)(const Squeeze<T>&, int64_t first_slab, int64_t last_slab);
  void (*linear)(const Linear<C>&, int64_t first_group, int64_t last_group);
  void (*head_pool)(const HeadPool<T>&, int64_t first_unit, int64_t last_unit);
  // Of kTiled kernels alone.
  void (*to_halves)(const float* values, int64_t count, uint16_t* halves);  // a multiple of 16
  void (*pack_tiles)(const TilePacking&, T* packed);
  void (*largest_of_rows)(const TilePacking&, float* largest);
};

}  // namespace greedynas::cpu
