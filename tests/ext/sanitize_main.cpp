// Runs the CPU operations, which know no torch, on random problems of odd sizes: built with sanitizers by
// test_ops_sanitize.py. Compares mixed_op with plain loops, and one thread with three, bit by bit. Working
// memory and outputs begin as NaN (GREEDYNAS_POISON).
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cpu/mixed_op.h"
#include "cpu/path_cross_entropy.h"
#include "cpu/select_top_k.h"
#include "cpu/thread_team.h"

namespace {

using namespace greedynas;
using namespace greedynas::cpu;

std::mt19937 engine(7);

template <typename T>
std::vector<T> draw(int64_t size) {
  std::normal_distribution<double> normal;
  std::vector<T> values(size);
  for (T& value : values) value = static_cast<T>(normal(engine));
  return values;
}

void expect(bool condition, const std::string& what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what.c_str());
  std::exit(1);
}

// A packed block written by hand: sections one after the other, padding zero.
template <typename T>
struct Packer {
  std::vector<T> weights;
  int64_t statistics = 0;

  int64_t rows(int64_t count, int64_t channels) {
    const int64_t offset = static_cast<int64_t>(weights.size());
    weights.resize(offset + count * padded(channels));
    const std::vector<T> values = draw<T>(count * channels);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t c = 0; c < channels; ++c) {
        weights[offset + r * padded(channels) + c] =
            values[r * channels + c] / std::sqrt(static_cast<T>(count));
      }
    }
    return offset;
  }

  int64_t statistics_of(int64_t channels) {
    statistics += 2 * padded(channels);
    return statistics - 2 * padded(channels);
  }

  ChoiceOperation inverted_bottleneck(int64_t in, int64_t hidden, int64_t out, int64_t kernel, int64_t stride,
                                      Activation activation, Activation depthwise, Activation project,
                                      int64_t se, Gate gate) {
    const bool expand = hidden != in;
    statistics = 0;
    ChoiceOperation o{kInvertedBottleneck,
                      in,
                      hidden,
                      out,
                      kernel,
                      stride,
                      activation,
                      depthwise,
                      project,
                      se,
                      gate,
                      stride == 1 && in == out,
                      kNone,
                      kNone,
                      kNone,
                      0,
                      0,
                      0,
                      kNone,
                      kNone,
                      kNone,
                      kNone,
                      0,
                      0,
                      0};
    if (expand) {
      o.expand_weight = rows(in, hidden);
      o.expand_bn = rows(2, hidden);
      o.expand_statistics = statistics_of(hidden);
    }
    o.depthwise_weight = rows(kernel * kernel, hidden);
    o.depthwise_bn = rows(2, hidden);
    o.depthwise_statistics = statistics_of(hidden);
    if (se > 0) {
      o.se_reduce_weight = rows(hidden, se);
      o.se_reduce_bias = rows(1, se);
      o.se_expand_weight = rows(se, hidden);
      o.se_expand_bias = rows(1, hidden);
    }
    o.project_weight = rows(hidden, out);
    o.project_bn = rows(2, out);
    o.project_statistics = statistics_of(out);
    return o;
  }

  ChoiceOperation conv_bn(int64_t in, int64_t out, int64_t stride, Activation activation) {
    ChoiceOperation o{kConvBn, in,    0,     out,   1,     stride, activation, kLinear, kLinear,
                      0,       0,     0,     kNone, kNone, kNone,  kNone,      kNone,   kNone,
                      kNone,   kNone, kNone, kNone, 0,     0,      0};
    o.project_weight = rows(in, out);
    o.project_bn = rows(2, out);
    return o;
  }
};

// The same block by plain loops in double.
template <typename T>
struct Plain {
  const MixedOp<T>& a;
  const ChoiceOperation& o;
  using Values = std::vector<double>;  // [pixels][channels]

  static double act(int64_t kind, double x) {
    if (kind == kRelu) return std::max(x, 0.0);
    if (kind == kRelu6) return std::min(std::max(x, 0.0), 6.0);
    if (kind == kHswish) return x * std::min(std::max(x + 3, 0.0), 6.0) / 6;
    if (kind == kSilu) return x / (1 + std::exp(-x));
    return x;
  }

  Values pointwise(const Values& in, int64_t in_channels, int64_t offset, int64_t out_channels) const {
    const int64_t pixels = static_cast<int64_t>(in.size()) / in_channels;
    Values out(pixels * out_channels, 0.0);
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t k = 0; k < in_channels; ++k)
        for (int64_t c = 0; c < out_channels; ++c)
          out[p * out_channels + c] +=
              in[p * in_channels + k] * a.weights[offset + k * padded(out_channels) + c];
    return out;
  }

  void batch_norm(Values& x, int64_t channels, int64_t offset, double eps, int64_t activation) const {
    const int64_t pixels = static_cast<int64_t>(x.size()) / channels;
    for (int64_t c = 0; c < channels; ++c) {
      double mean = 0, var = 0;
      for (int64_t p = 0; p < pixels; ++p) mean += x[p * channels + c] / static_cast<double>(pixels);
      for (int64_t p = 0; p < pixels; ++p)
        var += std::pow(x[p * channels + c] - mean, 2) / static_cast<double>(pixels);
      for (int64_t p = 0; p < pixels; ++p) {
        double& value = x[p * channels + c];
        value = (value - mean) / std::sqrt(var + eps) * a.weights[offset + c] +
                a.weights[offset + padded(channels) + c];
        value = act(activation, value);
      }
    }
  }

  Values subsampled(const Values& in) const {
    Values out;
    for (int64_t n = 0; n < a.images; ++n)
      for (int64_t y = 0; y < a.height; y += o.stride)
        for (int64_t x = 0; x < a.width; x += o.stride) {
          const double* pixel = in.data() + ((n * a.height + y) * a.width + x) * a.channels;
          out.insert(out.end(), pixel, pixel + a.channels);
        }
    return out;
  }

  Values depthwise(const Values& in) const {
    const int64_t h = ceil_div(a.height, o.stride), w = ceil_div(a.width, o.stride), c_n = o.hidden_channels;
    Values out(a.images * h * w * c_n, 0.0);
    for (int64_t n = 0; n < a.images; ++n)
      for (int64_t y = 0; y < h; ++y)
        for (int64_t x = 0; x < w; ++x)
          for (int64_t tap = 0; tap < o.kernel * o.kernel; ++tap) {
            const int64_t iy = y * o.stride + tap / o.kernel - o.kernel / 2;
            const int64_t ix = x * o.stride + tap % o.kernel - o.kernel / 2;
            if (iy < 0 || iy >= a.height || ix < 0 || ix >= a.width) continue;
            for (int64_t c = 0; c < c_n; ++c)
              out[((n * h + y) * w + x) * c_n + c] += in[((n * a.height + iy) * a.width + ix) * c_n + c] *
                                                      a.weights[o.depthwise_weight + tap * padded(c_n) + c];
          }
    return out;
  }

  void squeeze_excite(Values& x) const {
    const int64_t hidden = o.hidden_channels, pixels = static_cast<int64_t>(x.size()) / hidden / a.images;
    for (int64_t n = 0; n < a.images; ++n) {
      double* image = x.data() + n * pixels * hidden;
      Values pooled(hidden, 0.0);
      for (int64_t i = 0; i < pixels * hidden; ++i)
        pooled[i % hidden] += image[i] / static_cast<double>(pixels);
      Values squeezed = pointwise(pooled, hidden, o.se_reduce_weight, o.se_channels);
      for (int64_t c = 0; c < o.se_channels; ++c)
        squeezed[c] = std::max(0.0, squeezed[c] + a.weights[o.se_reduce_bias + c]);
      const Values gates = pointwise(squeezed, o.se_channels, o.se_expand_weight, hidden);
      for (int64_t i = 0; i < pixels * hidden; ++i) {
        const double z = gates[i % hidden] + a.weights[o.se_expand_bias + i % hidden];
        image[i] *= o.se_gate == kSigmoid ? 1 / (1 + std::exp(-z)) : std::min(std::max(z + 3, 0.0), 6.0) / 6;
      }
    }
  }

  Values run(const T* input, const std::array<double, 3>& eps) const {
    const Values x(input, input + a.images * a.height * a.width * a.channels);
    if (o.kind == kConvBn) {
      Values z = pointwise(subsampled(x), a.channels, o.project_weight, o.out_channels);
      batch_norm(z, o.out_channels, o.project_bn, eps[2], o.activation);
      return z;
    }
    Values y = x;
    if (o.expand_weight != kNone) {
      y = pointwise(y, a.channels, o.expand_weight, o.hidden_channels);
      batch_norm(y, o.hidden_channels, o.expand_bn, eps[0], o.activation);
    }
    y = depthwise(y);
    batch_norm(y, o.hidden_channels, o.depthwise_bn, eps[1], o.depthwise_activation);
    if (o.se_channels > 0) squeeze_excite(y);
    y = pointwise(y, o.hidden_channels, o.project_weight, o.out_channels);
    batch_norm(y, o.out_channels, o.project_bn, eps[2], o.project_activation);
    if (o.residual)
      for (std::size_t i = 0; i < y.size(); ++i) y[i] += x[i];
    return y;
  }
};

template <typename T>
void mixed_op_case(int64_t images, int64_t height, int64_t width, int64_t in, int64_t out, int64_t stride,
                   double tolerance) {
  Packer<T> packer;
  const std::vector<ChoiceOperation> operations{
      packer.inverted_bottleneck(in, 3 * in, out, 3, stride, kRelu6, kRelu6, kLinear, 0, kHsigmoid),
      packer.inverted_bottleneck(in, 2 * in + 1, out, 5, stride, kHswish, kLinear, kRelu, 5, kHsigmoid),
      packer.inverted_bottleneck(in, in, out, 7, stride, kLinear, kSilu, kHswish, 1, kSigmoid),
      packer.conv_bn(in, out, stride, kRelu),
  };
  const std::vector<std::array<double, 3>> eps(4, {1e-5, 1e-3, 1e-5});
  const int64_t width_of_statistics = 2 * (padded(3 * in) * 2 + padded(out));
  const std::vector<T> inputs = draw<T>(2 * images * height * width * in);
  const std::vector<int64_t> input_index{0, 1, 1, 0}, op_index{0, 1, 2, 3};
  const int64_t size = images * ceil_div(height, stride) * ceil_div(width, stride) * out;
  std::vector<T> previous;
  for (const int count : {1, 3}) {
    const ThreadTeam team(count);
    std::vector<T> outputs(4 * size, std::numeric_limits<T>::quiet_NaN());
    std::vector<T> used(4 * width_of_statistics, std::numeric_limits<T>::quiet_NaN());
    MixedOp<T> a{inputs.data(),
                 images,
                 height,
                 width,
                 in,
                 input_index.data(),
                 op_index.data(),
                 4,
                 packer.weights.data(),
                 operations.data(),
                 static_cast<int64_t>(operations.size()),
                 eps.data(),
                 nullptr,
                 width_of_statistics,
                 outputs.data(),
                 used.data(),
                 count};
    mixed_op(a, team);
    for (int64_t p = 0; p < 4; ++p) {
      const T* input = inputs.data() + input_index[p] * images * height * width * in;
      const auto expected = Plain<T>{a, operations[p]}.run(input, eps[p]);
      for (int64_t i = 0; i < size; ++i) {
        const double distance = std::abs(outputs[p * size + i] - expected[i]);
        expect(distance <= tolerance * (1 + std::abs(expected[i])), "mixed_op equals plain loops");
      }
    }
    expect(previous.empty() || std::memcmp(previous.data(), outputs.data(), outputs.size() * sizeof(T)) == 0,
           "mixed_op has the same bits with three threads");
    previous = outputs;
    // Its own statistics, given back.
    const std::vector<T> given = used;
    std::fill(outputs.begin(), outputs.end(), std::numeric_limits<T>::quiet_NaN());
    a.statistics = given.data();
    mixed_op(a, team);
    expect(std::memcmp(previous.data(), outputs.data(), outputs.size() * sizeof(T)) == 0,
           "statistics given back");
  }
}

void path_cross_entropy_case(LogitsType type, int64_t paths, int64_t images, int64_t classes) {
  const std::vector<double> doubles = draw<double>(paths * images * classes);
  const std::vector<float> floats(doubles.begin(), doubles.end());
  std::vector<uint16_t> halves(doubles.size());
  for (uint16_t& bits : halves) bits = static_cast<uint16_t>(engine());
  std::vector<int64_t> targets(images), correct(paths);
  for (int64_t& target : targets) target = static_cast<int64_t>(engine() % classes);
  std::vector<std::vector<float>> results;
  for (const int count : {1, 3}) {
    const ThreadTeam team(count);
    PathCrossEntropy a{nullptr, type,   paths,          images, classes,       images * classes,
                       1,       images, targets.data(), 0.1,    correct.data()};
    if (type == LogitsType::kFloat64) {
      a.logits = doubles.data();
      std::vector<double> losses(paths), image_losses(paths * images);
      path_cross_entropy(a, losses.data(), image_losses.data(), team);
      results.emplace_back(losses.begin(), losses.end());
    } else {
      a.logits = type == LogitsType::kFloat32 ? static_cast<const void*>(floats.data()) : halves.data();
      std::vector<float> losses(paths), image_losses(paths * images);
      path_cross_entropy(a, losses.data(), image_losses.data(), team);
      results.push_back(losses);
    }
  }
  expect(std::memcmp(results[0].data(), results[1].data(), paths * sizeof(float)) == 0,
         "path_cross_entropy has the same bits with three threads");
}

void select_top_k_case() {
  const std::vector<double> losses{NAN, 2.0, -0.0, INFINITY, 0.0, NAN, -1.0};
  std::vector<int64_t> selected(7);
  select_top_k(losses.data(), 7, 7, selected.data());
  expect(selected == std::vector<int64_t>({6, 2, 4, 1, 3, 0, 5}), "select_top_k");
  select_top_k<float>(nullptr, 0, 0, nullptr);
}

}  // namespace

int main() {
  for (const int64_t stride : {1, 2}) {
    mixed_op_case<double>(2, 9, 5, 3, 3, stride, 1e-11);
    mixed_op_case<float>(1, 17, 13, 17, 16, stride, 1e-4);
    mixed_op_case<double>(3, 2, 11, 16, 33, stride, 1e-11);
    mixed_op_case<float>(5, 1, 2, 1, 1, stride, 1e-3);
  }
  for (const auto type :
       {LogitsType::kFloat64, LogitsType::kFloat32, LogitsType::kBFloat16, LogitsType::kFloat16}) {
    path_cross_entropy_case(type, 2, 65, 7);
    path_cross_entropy_case(type, 3, 1, 1);
  }
  select_top_k_case();
  std::puts("all as expected");
  return 0;
}
