// One node after the other, each in a few passes, each pass parallel over tiles of pixels (bands of rows for
// the depthwise convolution). A pass ends where batch statistics of the whole batch are needed:
//   1. expand: x -> `expanded`, moments
//   2. depthwise: BN and activation of `expanded` on the way in -> `filtered`, moments
//   3. squeeze-excitation: BN and activation of `filtered` -> mean of each image -> gates
//   4. project: BN, activation and gate of `filtered` on the way in -> outputs, moments
//   5. BN of the outputs in place, plus the residual
// `expanded` and `filtered` are the working memory: padded(hidden) channels of every pixel of one node.
// Left for later: nodes that share an input could share its expansion, and a fusion of 1 and 2 that takes the
// expand stage's statistics from the moments of x would keep `expanded` out of memory.
#include "mixed_op.h"

#include <algorithm>
#include <cstring>

#include "batch_norm.h"
#include "buffer.h"
#include "depthwise.h"
#include "pointwise.h"

namespace greedynas::cpu {
namespace {

constexpr int64_t kBandRows = 8;  // output rows of a depthwise band: the halo is computed again for each band
constexpr int64_t kBandPixels = 128;  // a band of small images has more rows than that

template <typename T>
struct Workspace {
  Buffer<T> expanded, filtered, gates;
};

template <typename T>
class NodeRun {
 public:
  NodeRun(const MixedOp<T>& arguments, const Workspace<T>& workspace, int64_t node,
          const ParallelFor& parallel_for)
      : a_(arguments),
        o_(arguments.operations[arguments.op_index[node]]),
        eps_(arguments.bn_eps[arguments.op_index[node]]),
        workspace_(workspace),
        parallel_for_(parallel_for),
        out_height_(ceil_div(a_.height, o_.stride)),
        out_width_(ceil_div(a_.width, o_.stride)),
        in_pixels_(a_.images * a_.height * a_.width),
        out_pixels_(a_.images * out_height_ * out_width_),
        hidden_stride_(padded(o_.hidden_channels)),
        input_(a_.inputs + a_.input_index[node] * in_pixels_ * a_.channels),
        output_(a_.outputs + node * out_pixels_ * o_.out_channels),
        given_(a_.statistics ? a_.statistics + node * a_.statistics_width : nullptr),
        used_(a_.used_statistics + node * a_.statistics_width) {}

  void run() {
    std::fill_n(used_, a_.statistics_width, T(0));
    switch (o_.kind) {
      case kIdentity:
        return copy();
      case kConvBn:
        return conv_bn();
      default:
        return inverted_bottleneck();
    }
  }

 private:
  void copy() {
    for_tiles(out_pixels_, a_.channels, [&](int64_t, int64_t first, int64_t rows) {
      std::copy_n(input_ + first * a_.channels, rows * a_.channels, output_ + first * a_.channels);
    });
  }

  void conv_bn() {
    const int64_t tiles = ceil_div(out_pixels_, kTileRows);
    Moments<T> moments = make_moments(tiles, o_.out_channels);
    parallel_for_(tiles, kTileRows * a_.channels * o_.out_channels, [&](int64_t begin, int64_t end) {
      const Buffer<T> tile = make_buffer<T>(kTileRows * a_.channels);
      for_tiles_in(begin, end, out_pixels_, [&](int64_t t, int64_t first, int64_t rows) {
        for (int64_t r = 0; r < rows; ++r) {
          std::copy_n(strided_pixel(first + r), a_.channels, tile.get() + r * a_.channels);
        }
        project_tile(tile.get(), a_.channels, a_.channels, t, first, rows, moments);
      });
    });
    finish(moments, o_.activation, false);
  }

  void inverted_bottleneck() {
    const T* in = input_;
    int64_t in_stride = a_.channels;
    Normalisation<T> expand_bn;
    if (o_.expand_weight != kNone) {
      expand_bn = expand();
      in = workspace_.expanded.get();
      in_stride = hidden_stride_;
    }
    const Normalisation<T> depthwise_bn = depthwise(in, in_stride, in == input_ ? nullptr : &expand_bn);
    if (o_.se_channels > 0) squeeze_excite(depthwise_bn);
    project(depthwise_bn);
  }

  Normalisation<T> expand() {
    const int64_t tiles = ceil_div(in_pixels_, kTileRows);
    Moments<T> moments = make_moments(tiles, o_.hidden_channels);
    for_tiles(in_pixels_, a_.channels * o_.hidden_channels, [&](int64_t t, int64_t first, int64_t rows) {
      T* out = workspace_.expanded.get() + first * hidden_stride_;
      pointwise<T>({input_ + first * a_.channels, a_.channels, rows, a_.channels,
                    a_.weights + o_.expand_weight, hidden_stride_, out, hidden_stride_, hidden_stride_});
      add_moments(moments, t, out, hidden_stride_, rows);
    });
    return batch_norm(moments, o_.expand_bn, o_.expand_statistics, o_.hidden_channels, eps_[kExpandBn]);
  }

  Normalisation<T> depthwise(const T* in, int64_t in_stride, const Normalisation<T>* normalisation) {
    const int64_t band_rows = std::min(out_height_, std::max(kBandRows, kBandPixels / out_width_));
    const int64_t bands = ceil_div(out_height_, band_rows);
    const int64_t columns = (out_width_ - 1) * o_.stride + o_.kernel;
    const int64_t buffer_size = ((band_rows - 1) * o_.stride + o_.kernel) * columns * kLanes;
    Moments<T> moments = make_moments(a_.images * bands, o_.hidden_channels);
    const int64_t band_work = band_rows * out_width_ * o_.hidden_channels * o_.kernel * o_.kernel;
    parallel_for_(a_.images * bands, band_work, [&](int64_t begin, int64_t end) {
      const Buffer<T> band_input = make_buffer<T>(buffer_size);
      std::fill_n(band_input.get(), buffer_size, T(0));
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t image = unit / bands;
        const int64_t first_row = unit % bands * band_rows;
        const int64_t rows = std::min(band_rows, out_height_ - first_row);
        const T* image_in = in + image * a_.height * a_.width * in_stride;
        T* out = workspace_.filtered.get() + (image * out_height_ + first_row) * out_width_ * hidden_stride_;
        for (int64_t channel = 0; channel < o_.hidden_channels; channel += kLanes) {
          fill_band(image_in, in_stride, channel, first_row, rows, columns, normalisation, band_input.get());
          depthwise_band<T>({band_input.get(), columns, a_.weights + o_.depthwise_weight + channel,
                             hidden_stride_, o_.kernel, o_.stride, out + channel, hidden_stride_, rows,
                             out_width_});
        }
        add_moments(moments, unit, out, hidden_stride_, rows * out_width_);
      }
    });
    return batch_norm(moments, o_.depthwise_bn, o_.depthwise_statistics, o_.hidden_channels,
                      eps_[kDepthwiseBn]);
  }

  // The input rows of a band of output rows, in kLanes channels from `channel` on. The columns of padding are
  // zero from the beginning and never written; rows above and below the image are zeroed.
  void fill_band(const T* image_in, int64_t in_stride, int64_t channel, int64_t first_row, int64_t out_rows,
                 int64_t columns, const Normalisation<T>* normalisation, T* band) {
    const int64_t padding = o_.kernel / 2;
    const int64_t rows = (out_rows - 1) * o_.stride + o_.kernel;
    const int64_t pixels = std::min(a_.width, columns - padding);
    const int64_t lanes = std::min(kLanes, o_.hidden_channels - channel);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t y = first_row * o_.stride - padding + r;
      T* out = band + (r * columns + padding) * kLanes;
      if (y < 0 || y >= a_.height) {
        std::fill_n(out, pixels * kLanes, T(0));
        continue;
      }
      const T* in = image_in + y * a_.width * in_stride + channel;
      if (normalisation) {  // the input is padded to whole kLanes too
        normalise_rows(in, in_stride, out, kLanes, pixels, kLanes, *normalisation, o_.activation, channel);
        continue;
      }
      for (int64_t x = 0; x < pixels; ++x) {
        std::copy_n(in + x * in_stride, lanes, out + x * kLanes);
        std::fill_n(out + x * kLanes + lanes, kLanes - lanes, T(0));
      }
    }
  }

  void squeeze_excite(const Normalisation<T>& normalisation) {
    const int64_t image_pixels = out_height_ * out_width_;
    const int64_t hidden = o_.hidden_channels;
    parallel_for_(a_.images, image_pixels * hidden * 4, [&](int64_t begin, int64_t end) {
      const Buffer<T> tile = make_buffer<T>(kTileRows * hidden);
      std::vector<double> sums(hidden);
      std::vector<T> squeezed(padded(o_.se_channels)), pooled(hidden);
      for (int64_t image = begin; image < end; ++image) {
        std::fill(sums.begin(), sums.end(), 0.0);
        for (int64_t first = 0; first < image_pixels; first += kTileRows) {
          const int64_t rows = std::min(kTileRows, image_pixels - first);
          normalise_rows(workspace_.filtered.get() + (image * image_pixels + first) * hidden_stride_,
                         hidden_stride_, tile.get(), hidden, rows, hidden, normalisation, o_.activation);
          for (int64_t r = 0; r < rows; ++r) {
            for (int64_t c = 0; c < hidden; ++c) sums[c] += static_cast<double>(tile[r * hidden + c]);
          }
        }
        for (int64_t c = 0; c < hidden; ++c)
          pooled[c] = static_cast<T>(sums[c] / static_cast<double>(image_pixels));
        T* gates = workspace_.gates.get() + image * hidden;
        linear(pooled.data(), hidden, o_.se_reduce_weight, o_.se_channels, squeezed.data());
        for (int64_t c = 0; c < o_.se_channels; ++c) {
          squeezed[c] = activate<kRelu>(squeezed[c] + a_.weights[o_.se_reduce_bias + c]);
        }
        linear(squeezed.data(), o_.se_channels, o_.se_expand_weight, hidden, gates);
        for (int64_t c = 0; c < hidden; ++c) {
          gates[c] = gate(o_.se_gate, gates[c] + a_.weights[o_.se_expand_bias + c]);
        }
      }
    });
  }

  void linear(const T* in, int64_t in_channels, int64_t weight, int64_t out_channels, T* out) const {
    pointwise<T>({in, in_channels, 1, in_channels, a_.weights + weight, padded(out_channels), out,
                  out_channels, out_channels});
  }

  void project(const Normalisation<T>& normalisation) {
    const int64_t hidden = o_.hidden_channels;
    const int64_t image_pixels = out_height_ * out_width_;
    const int64_t tiles = ceil_div(out_pixels_, kTileRows);
    Moments<T> moments = make_moments(tiles, o_.out_channels);
    parallel_for_(tiles, kTileRows * hidden * o_.out_channels, [&](int64_t begin, int64_t end) {
      const Buffer<T> tile = make_buffer<T>(kTileRows * hidden);
      for_tiles_in(begin, end, out_pixels_, [&](int64_t t, int64_t first, int64_t rows) {
        normalise_rows(workspace_.filtered.get() + first * hidden_stride_, hidden_stride_, tile.get(), hidden,
                       rows, hidden, normalisation, o_.activation);
        if (o_.se_channels > 0) {
          for (int64_t r = 0; r < rows; ++r) {
            const T* gates = workspace_.gates.get() + (first + r) / image_pixels * hidden;
            for (int64_t c = 0; c < hidden; ++c) tile[r * hidden + c] *= gates[c];
          }
        }
        project_tile(tile.get(), hidden, hidden, t, first, rows, moments);
      });
    });
    finish(moments, kLinear, o_.residual != 0);
  }

  void project_tile(const T* in, int64_t in_stride, int64_t in_channels, int64_t t, int64_t first,
                    int64_t rows, Moments<T>& moments) {
    T* out = output_ + first * o_.out_channels;
    pointwise<T>({in, in_stride, rows, in_channels, a_.weights + o_.project_weight, padded(o_.out_channels),
                  out, o_.out_channels, o_.out_channels});
    add_moments(moments, t, out, o_.out_channels, rows);
  }

  // The last BatchNorm, in place.
  void finish(const Moments<T>& moments, int64_t activation, bool residual) {
    const int64_t channels = o_.out_channels;
    const Normalisation<T> bn =
        batch_norm(moments, o_.project_bn, o_.project_statistics, channels, eps_[kProjectBn]);
    for_tiles(out_pixels_, 4 * channels, [&](int64_t, int64_t first, int64_t rows) {
      T* out = output_ + first * channels;
      normalise_rows<T>(out, channels, out, channels, rows, channels, bn, activation);
      if (!residual) return;
      const T* in = input_ + first * channels;
      for (int64_t i = 0; i < rows * channels; ++i) out[i] += in[i];
    });
  }

  Moments<T> make_moments(int64_t tiles, int64_t channels) const { return {given_ ? 0 : tiles, channels}; }

  void add_moments(Moments<T>& moments, int64_t tile, const T* rows, int64_t stride, int64_t count) const {
    if (!given_) moments.add(tile, rows, stride, count);
  }

  // The batch's statistics are rounded to T before use, so that giving used_statistics back as statistics
  // repeats the result bit for bit.
  Normalisation<T> batch_norm(const Moments<T>& moments, int64_t gamma_beta, int64_t statistics,
                              int64_t channels, double eps) {
    if (given_) {
      for (const int64_t part : {int64_t{0}, padded(channels)}) {
        std::copy_n(given_ + statistics + part, channels, used_ + statistics + part);
      }
    } else {
      moments.join(used_ + statistics, parallel_for_);
    }
    return make_normalisation(used_ + statistics, a_.weights + gamma_beta, channels, eps);
  }

  const T* strided_pixel(int64_t out_pixel) const {
    const int64_t x = out_pixel % out_width_ * o_.stride;
    const int64_t y = out_pixel / out_width_ % out_height_ * o_.stride;
    const int64_t image = out_pixel / (out_width_ * out_height_);
    return input_ + ((image * a_.height + y) * a_.width + x) * a_.channels;
  }

  // body(tile, first pixel, number of pixels)
  template <typename Body>
  static void for_tiles_in(int64_t begin, int64_t end, int64_t pixels, const Body& body) {
    for (int64_t t = begin; t < end; ++t) body(t, t * kTileRows, std::min(kTileRows, pixels - t * kTileRows));
  }

  template <typename Body>
  void for_tiles(int64_t pixels, int64_t pixel_work, const Body& body) const {
    parallel_for_(ceil_div(pixels, kTileRows), kTileRows * pixel_work,
                  [&](int64_t begin, int64_t end) { for_tiles_in(begin, end, pixels, body); });
  }

  const MixedOp<T>& a_;
  const ChoiceOperation& o_;
  const std::array<double, kBatchNormStages>& eps_;
  const Workspace<T>& workspace_;
  const ParallelFor& parallel_for_;
  int64_t out_height_, out_width_, in_pixels_, out_pixels_, hidden_stride_;
  const T* input_;
  T* output_;
  const T* given_;  // this node's row of statistics, or null
  T* used_;
};

template <typename T>
Workspace<T> make_workspace(const MixedOp<T>& a) {
  int64_t expanded = 0, filtered = 0, gates = 0;
  for (int64_t node = 0; node < a.nodes; ++node) {
    const ChoiceOperation& o = a.operations[a.op_index[node]];
    if (o.kind != kInvertedBottleneck) continue;
    const int64_t hidden = padded(o.hidden_channels);
    const int64_t out_pixels = a.images * ceil_div(a.height, o.stride) * ceil_div(a.width, o.stride);
    if (o.expand_weight != kNone) expanded = std::max(expanded, a.images * a.height * a.width * hidden);
    if (o.se_channels > 0) gates = std::max(gates, a.images * hidden);
    filtered = std::max(filtered, out_pixels * hidden);
  }
  return {make_buffer<T>(expanded), make_buffer<T>(filtered), make_buffer<T>(gates)};
}

}  // namespace

template <typename T>
void mixed_op(const MixedOp<T>& arguments, const ParallelFor& parallel_for) {
  const Workspace<T> workspace = make_workspace(arguments);
  for (int64_t node = 0; node < arguments.nodes; ++node)
    NodeRun<T>(arguments, workspace, node, parallel_for).run();
}

template void mixed_op<float>(const MixedOp<float>&, const ParallelFor&);
template void mixed_op<double>(const MixedOp<double>&, const ParallelFor&);

}  // namespace greedynas::cpu
