// The CUDA kernels that a chain of choice blocks is made of: their arguments, and the functions that launch
// them. No torch, no CUDA header: the chain that drives them is plain C++, and so is the emulation that
// executes them on the host (tests/emulation).
//
// Feature maps are of a type T, BFloat16, Half or float, in NHWC: a row of row_channels(C) channels per
// pixel, the padding zero. All of them begin at multiples of 16 bytes. Structs and launches that touch them
// are templates on T; sums are float whatever T is. Instantiations for float are in files of their own,
// float_*.cu; Half runs on compute capability 7.5, BFloat16 needs 8.0.
//
// Half precision has few exponents. What is stored in it is multiplied by powers of two, channel by channel:
// normalised values before a depthwise convolution or a projection by BatchNorm::factor, rows of weights by a
// factor of their own (pack.cu). What is computed from such weights, a convolution's sums or its stored
// output, is thus `stored_factor` times what it stands for, and the BatchNorm after it takes that away again.
// Only finished maps are what they stand for. Types with more exponents are treated alike.
//
// Partial sums of statistics lie as [unit][4][row_channels(C)]: pilot, sum, squares, count. Sums and squares
// are of the distances from the pilot, a value that the unit has seen, so that nothing cancels. A unit is
// what one block has summed up, in a fixed order; units are joined in double, in a fixed order: results are
// the same, bit for bit, in every run.
//
// A launch works on a group of nodes: operations of one layer, each run on an input of its own.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace greedynas::cuda {

using Stream = CUstream_st*;

inline constexpr int kMaxNodes = 16;  // of a launch
template <typename Node>
struct Group {
  Node nodes[kMaxNodes];
  int count;
};

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

// Channels of a pixel's row in memory, and of everything that is kept per channel.
constexpr int row_channels(int channels) { return round_up(channels, 8); }

// ---- types of maps

// As they lie in memory; arithmetic is in device.h and numbers.h.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// Stored: of depthwise convolutions' outputs, and of the weights of depthwise convolutions and projections.
// Weight: of all other convolutions.
template <typename T>
struct MapOf {
  using Stored = Half;
  using Weight = T;
};
template <>
struct MapOf<float> {
  using Stored = float;
  using Weight = float;
};
template <typename T>
using StoredOf = typename MapOf<T>::Stored;
template <typename T>
using WeightOf = typename MapOf<T>::Weight;

// ---- statistics (statistics.cu)

// All arrays are of row_channels(channels), padded with zeros (factor: with ones).
struct BatchNorm {
  const float* gamma;
  const float* beta;
  const float* factor;  // powers of two by which normalised values are multiplied for half precision; null: 1
  float eps;
};

// An affine map and what the activation after it needs to know, float [3][row_channels(channels)]:
//   scale, shift  u = value * scale + shift, `factor` times the normalised value; padding gives 0
//   bound         ReLU6: 6 * factor; H-swish: 1 / (6 * factor); SiLU: 1 / factor; else unused
// so that factor * activation(u / factor) is: max(u, 0); min(max(u, 0), bound); u * saturate(u * bound +
// 0.5); u / (1 + exp(-u * bound)). NaN stays NaN.

// BatchNorm from the statistics of the batch, or, where `mean` is not null, from known ones.
struct NormAffine {
  const float* partials;       // [units][4][row_channels]
  const float* mean;           // known statistics, or null
  const float* variance;       // biased
  const float* stored_factor;  // what the summed values were multiplied by, powers of two; null: 1. Known
                               // statistics are never.
  float* affine;               // written; maps stored values
  float* keep;  // written: the mean and biased variance that the map is made of, rounded and not
                // multiplied, [2][padded(channels)] as choice_block.h has them; or null
  BatchNorm norm;
  int units, channels;
  int activation;  // Activation (choice_block.h) after the affine map
};
void norm_affine(const Group<NormAffine>& group, Stream stream);

// BatchNorm after a pointwise convolution, from the moments of the convolution's input: mean W m, variance
// diag(W S W').
template <typename T>
struct PointwiseAffine {
  const float* mean;           // [row_channels(in)]
  const float* covariance;     // [row_channels(in)][row_channels(in)], biased, all of it
  const WeightOf<T>* weight;   // [row_channels(channels)][row_channels(in)]
  const float* stored_factor;  // what the weight's rows were multiplied by; null: 1
  float* affine;
  float* keep;  // as in NormAffine
  BatchNorm norm;
  int in_channels, channels;
  int activation;
};
template <typename T>
void pointwise_affine(const Group<PointwiseAffine<T>>& group, Stream stream);

// ---- maps (finish_map.cu)

// map = activation(map * scale + shift) + residual, and the moments of the (rounded) result.
template <typename T>
struct FinishMap {
  T* map;               // [pixels][row_channels(channels)], read and written
  const float* affine;  // or null: the map as it is, moments alone
  const T* residual;    // as map, or null
  float* mean;          // written [row_channels], or null: no moments
  float* covariance;    // written [row_channels][row_channels], biased
  float* partials;      // working memory of finish_map_floats() floats where there are moments
  int64_t pixels;
  int channels;
  int activation;
};
template <typename T>
int64_t finish_map_floats(int64_t pixels, int channels);
template <typename T>
void finish_map(const Group<FinishMap<T>>& group, Stream stream);  // nodes of equal pixels and channels

// ---- inverted bottlenecks (expand_depthwise.cu, squeeze_excite.cu, project.cu)

// expand -> BatchNorm, activation -> depthwise convolution, padded by kernel / 2. The expanded map never
// reaches memory. Nodes of a group differ in pointers and hidden channels alone.
template <typename T>
struct ExpandDepthwise {
  const T* x;                    // [images][height][width][row_channels(in)]
  const WeightOf<T>* expand;     // [row_channels(hidden)][row_channels(in)]
  const float* affine;           // [3][row_channels(hidden)]
  const StoredOf<T>* depthwise;  // [kernel * kernel][row_channels(hidden)]
  StoredOf<T>* d;                // written [images][out height][out width][row_channels(hidden)]
  float* partials;               // written, of what was stored; or null
  int images, height, width;
  int in_channels, hidden_channels;
  int kernel, stride;  // 3, 5 or 7; 1 or 2
  int activation;
};
// Units of `partials`, whatever the group.
template <typename T>
int expand_depthwise_units(const ExpandDepthwise<T>& node);
template <typename T>
void expand_depthwise(const Group<ExpandDepthwise<T>>& group, Stream stream);

// Mean over each image of activation(d * scale + shift), not multiplied by the factor.
template <typename Stored>
struct Squeeze {
  const Stored* d;      // [images][image_pixels][row_channels(channels)]
  const float* affine;  // [3][row_channels(channels)]
  const float* factor;  // of the values that the affine map gives; null: 1
  float* pooled;        // written [images][row_channels(channels)]
  int images, image_pixels, channels;
  int activation;
};
template <typename Stored>
void squeeze(const Group<Squeeze<Stored>>& group, Stream stream);

enum LinearActivation : int { kNoActivation, kLinearRelu, kLinearHsigmoid, kLinearSigmoid };

// Rows of floats times a matrix of floats, plus bias, activated: squeeze-excitation's products, the
// classifier.
struct Linear {
  const float* input;   // [rows][in_stride]
  const float* weight;  // [channels][depth]
  const float* bias;    // [channels] or null
  float* output;        // written [rows][out_stride]; columns from channels to out_stride become 0
  int rows, depth, in_stride, channels, out_stride;
  int activation;  // LinearActivation
};
void linear(const Group<Linear>& group, Stream stream);

// What becomes of a pointwise convolution's sums: stored as they are, rounded, with their statistics; or,
// where `affine` is not null, mapped, activated, and the residual added.
template <typename T>
struct PointwiseOutput {
  T* y;                 // written [pixels][row_channels(channels)]
  float* partials;      // written, of what was stored; or null
  const float* affine;  // [3][row_channels(channels)] or null
  const T* residual;    // as y, or null
  int channels;
  int activation;
};
template <typename T>
int pointwise_units(int64_t pixels);  // of partials

// y = W activation(d * scale + shift) * gates
template <typename T>
struct Project {
  const StoredOf<T>* d;       // [pixels][row_channels(hidden)]
  const float* affine;        // [3][row_channels(hidden)]
  const float* gates;         // [images][row_channels(hidden)], or null
  const StoredOf<T>* weight;  // [row_channels(channels)][row_channels(hidden)]
  PointwiseOutput<T> out;
  int64_t pixels;
  int image_pixels, hidden_channels;
  int activation;  // of what d is mapped to
};
template <typename T>
void project(const Group<Project<T>>& group, Stream stream);  // of equal pixels, channels and activation

// ---- other convolutions (conv_bn.cu)

// Every stride-th pixel of a map times a matrix.
template <typename T>
struct StridedConv {
  const T* x;                 // [images][height][width][row_channels(in)]
  const WeightOf<T>* weight;  // [row_channels(channels)][row_channels(in)]
  PointwiseOutput<T> out;
  int images, height, width, in_channels, stride;
};
template <typename T>
void strided_conv(const Group<StridedConv<T>>& group, Stream stream);

// Dense convolution of the images themselves, padded by kernel / 2; they are rounded to T.
template <typename T>
struct StemConv {
  const float* images;        // of any strides
  int64_t strides[4];         // of image, channel, row, column, in elements
  const WeightOf<T>* weight;  // [row_channels(channels)][round_up(kernel * kernel * in, 16)], a row as
                              // [ky][kx][channel], zeros behind
  PointwiseOutput<T> out;
  int images_count, height, width, in_channels, kernel, stride;
};
template <typename T>
void stem_conv(const StemConv<T>& node, Stream stream);

// ---- what only units have (arrange_channels.cu, depthwise.cu, pool.cu)

// `count` channels of a map, first, first + step, ..., which become columns to_first, to_first + to_step, ...
template <typename From>
struct ChannelSource {
  const From* map;
  int row;  // numbers from one pixel to the next
  int first, step, count, to_first, to_step;
};
inline constexpr int kMaxSources = 16;

// Rows of a map from channels of others; columns that come from nowhere become 0. `out` alone has to begin at
// a multiple of 16 bytes, and only where its rows are of whole vectors of 8.
template <typename From, typename To>
struct ArrangeChannels {
  ChannelSource<From> sources[kMaxSources];
  int count;
  To* out;         // written [pixels][out_row]
  int out_row;     // of any length
  int activation;  // of what is read
  int64_t pixels;
};
template <typename From, typename To>
void arrange_channels(const ArrangeChannels<From, To>& node, Stream stream);

// Depthwise convolution, padded by kernel / 2, of activation(x * scale + shift), which is not multiplied by a
// factor.
template <typename T>
struct DepthwiseConv {
  const T* x;                  // [images][height][width][row_channels(channels)]
  const float* affine;         // [3][row_channels(channels)], or null: the activation alone
  const float* weight;         // [kernel * kernel][row_channels(channels)]
  const float* stored_factor;  // [row_channels(channels)]: what the weights were multiplied by
  T* y;                        // written [images][out height][out width][row_channels(channels)]
  int images, height, width, channels;
  int kernel, stride;  // kernel odd
  int activation;
};
template <typename T>
void depthwise_conv(const DepthwiseConv<T>& node, Stream stream);

// activation(pooled * scale + shift), over windows padded by kernel / 2.
template <typename T>
struct Pool {
  const T* x;           // [images][height][width][row_channels(channels)]
  const float* affine;  // [3][row_channels(channels)], factor 1; or null: the activation alone
  T* y;                 // written [images][out height][out width][row_channels(channels)]
  float* partials;      // written, of what was stored, pointwise_units() units; or null
  int images, height, width, channels;
  int kernel, stride;  // kernel odd
  int pooling;         // Pooling (operation_source.h)
  int activation;
};
template <typename T>
void pool(const Pool<T>& node, Stream stream);

// ---- head and loss (head.cu, path_cross_entropy.cu, select_top_k.cu)

// Mean over each image of activation(x W' * scale + shift); the map is not stored.
template <typename T>
struct HeadPool {
  const T* x;                 // [images][image_pixels][row_channels(in)]
  const WeightOf<T>* weight;  // [row_channels(channels)][row_channels(in)]
  const float* affine;        // [3][row_channels(channels)], factor 1
  float* pooled;              // written [images][row_channels(channels)]
  int images, image_pixels, in_channels, channels;
  int activation;
};
template <typename T>
void head_pool(const Group<HeadPool<T>>& group, Stream stream);

struct PathCrossEntropy {
  const float* logits;     // [paths][images][classes], contiguous
  const int64_t* targets;  // [images]
  float* image_losses;     // written [paths][images]
  int64_t* correct;  // written [paths]: images whose class has the highest logit (the first of equal ones)
  int* status;       // set to 1 where a target is not in [0, classes); its losses are NaN then
  int paths, images, classes;
  float label_smoothing;
};
void path_cross_entropy(const PathCrossEntropy& arguments, Stream stream);

// Indices of the k lowest losses, lowest first; NaN last, ties to the lower index.
struct SelectTopK {
  const float* losses;  // [count]
  int64_t* indices;     // written [k]
  int count, k;
};
void select_top_k(const SelectTopK& arguments, Stream stream);

// ---- weights (pack.cu), from float as modules hold them

// Arrays of one BatchNorm, padded; and, where asked for, its factor.
struct PackNorm {
  const float *gamma, *beta;          // [channels] or null: 1 and 0
  float *packed_gamma, *packed_beta;  // written [row_channels]
  float* factor;                      // written [row_channels], powers of two; or null
  int channels;
};
void pack_norms(const Group<PackNorm>& group, Stream stream);

// Weights lie as modules hold them, output channels slowest, or, where there is a `pitch`, as choice_block.h
// packs them: output channels fastest, that many of them.

// A pointwise (or dense) convolution: [rows][columns] -> [row_channels(rows)][packed_columns].
template <typename T>
struct PackPointwise {
  const float* weight;   // [rows][in][taps], or [in][pitch]; null: the identity matrix
  WeightOf<T>* packed;   // written [row_channels(rows)][packed_columns], a row as [taps][in], zeros behind
  float* stored_factor;  // written [row_channels(rows)]: the powers of two that bring a row's largest weight
                         // to [1/32, 1/16), and that rows are multiplied by; null: they are not
  int rows, in_channels, taps, packed_columns;
  int pitch;  // or 0; then taps is 1
};
template <typename T>
void pack_pointwise(const Group<PackPointwise<T>>& group, Stream stream);

// A depthwise convolution, each channel multiplied by the power of two that brings its largest weight to
// [0.5, 1).
template <typename Stored>
struct PackDepthwise {
  const float* weight;         // [channels][taps], or [taps][pitch]
  const float* before_factor;  // of what the weights meet [row_channels], or null
  Stored* packed;              // written [taps][row_channels(channels)]
  float* stored_factor;        // written [row_channels]: before_factor times the channel's power of two
  int channels, taps, pitch;
};
template <typename Stored>
void pack_depthwise(const Group<PackDepthwise<Stored>>& group, Stream stream);

// A projection: columns divided by the factors of what they meet, rows multiplied by the powers of two that
// then bring their largest weight to [0.5, 1).
template <typename Stored>
struct PackProject {
  const float* weight;         // [rows][columns], or [columns][pitch]
  const float* column_factor;  // [row_channels(columns)] or null
  Stored* packed;              // written [row_channels(rows)][row_channels(columns)]
  float* stored_factor;        // written [row_channels(rows)]: the rows' powers of two
  int rows, columns, pitch;
};
template <typename Stored>
void pack_project(const Group<PackProject<Stored>>& group, Stream stream);

}  // namespace greedynas::cuda
