// The pointwise convolutions strided and patches, and what becomes of the sums of any: random arguments, the
// kernel in two calls, and every value compared.
#pragma once

#include <algorithm>

#include "kernel_cases_depthwise.h"

namespace reference {

struct PointwiseCase {
  int64_t channels, activation;
  bool batch, residual;
  double weight_scale;
  bool whole_weights = false;  // small whole numbers
  bool row_factors = false;    // of kTiled kernels: PointwiseOutput::factor
};

// Powers of two that weights are multiplied by when they are packed, and sums then divided by.
struct WeightFactors {
  std::vector<int> rows, columns;  // exponents; empty: 0
  int all = 0;

  int operator()(int64_t row, int64_t column) const {
    return all + (rows.empty() ? 0 : rows[row]) + (columns.empty() ? 0 : columns[column]);
  }
};

// For each row what brings its largest weight to [1/2, 1).
template <typename T>
std::vector<int> row_exponents(const Matrix<T>& weight, const WeightFactors& others) {
  std::vector<int> exponents(weight.rows, 0);
  for (int64_t r = 0; r < weight.rows; ++r) {
    Real largest = 0;
    for (int64_t k = 0; k < weight.columns; ++k)
      largest = std::max(largest, std::ldexp(std::abs(weight(r, k)), others(r, k) - others.all));
    if (largest > 0) exponents[r] = -1 - std::ilogb(largest);
  }
  return exponents;
}

// Calls run(output, units) and compares with the products of inputs[pixel][k]. `unit_begin`: the first pixel
// of each block of statistics, in order, and the number of pixels at the end; `unit_index`: where its
// partials lie. `factors`: those of columns and all weights, by which the kernel's inputs are divided.
template <typename T, typename Run>
void check_pointwise(const Kernels<T>& k, const std::string& what, const PointwiseCase& s, int64_t pixels,
                     const std::vector<std::vector<Bounded>>& inputs, const std::vector<int64_t>& unit_begin,
                     const std::vector<int64_t>& unit_index, const Run& run, bool checks_padding = true,
                     WeightFactors factors = {}) {
  using C = Compute<T>;
  const auto depth = static_cast<int64_t>(inputs[0].size());
  const int64_t stride = row_channels<T>(s.channels);
  Matrix<T> weight(s.channels, depth, s.weight_scale);
  for (T& x : weight.values) {
    if (s.whole_weights) x = rounded<T>(static_cast<double>(whole(-3, 3)));
  }
  std::vector<C> factor(stride, C(0));
  if (kTiled<T> && s.row_factors) factors.rows = row_exponents(weight, factors);
  Matrix<T> scaled = weight;
  for (int64_t c = 0; c < s.channels; ++c) {
    for (int64_t i = 0; i < depth; ++i)
      scaled.set(c, i, static_cast<double>(std::ldexp(weight(c, i), factors(c, i))));
    factor[c] = std::ldexp(C(1), factors.rows.empty() ? 0 : -factors.rows[c]);
  }
  const auto packed = scaled.pointwise(k.group_width, k.depth_multiple);
  const auto scale = channel_values<C>(s.channels, stride, affine_scale(s.weight_scale, depth));
  const auto shift = channel_values<C>(s.channels, stride, 1);
  const Map<T> residual(pixels, s.channels);
  Output<T> output(pixels * stride);
  Output<double> partials((unit_index.back() + 1) * 3 * stride);
  PointwiseOutput<T> to{packed.data(), depth,        s.channels, output.data(), nullptr,
                        nullptr,       s.activation, nullptr,    nullptr};
  if (s.batch) {
    to.partials = partials.data();
  } else {
    to.scale = scale.data();
    to.shift = shift.data();
    to.residual = s.residual ? residual.memory.data() : nullptr;
  }
  if (!factors.rows.empty()) to.factor = factor.data();
  run(to);
  output.check_guard(what);
  partials.check_guard(what);
  for (int64_t c = 0; c < stride; ++c) {
    std::vector<Bounded> raw(pixels);
    for (int64_t p = 0; p < pixels; ++p) {
      if (c < s.channels) {
        Sum<T> sum;
        for (int64_t i = 0; i < depth; ++i) sum.add(inputs[p][i], weight(c, i));
        raw[p] = sum.result();
        raw[p].error += kUnderflow<T> * static_cast<Real>(factor[c]);  // before the factor is taken away
      } else if (!checks_padding) {
        continue;
      }
      Bounded expected = raw[p];
      if (!s.batch && c < s.channels) {
        expected = activate<T>(s.activation, affine<T>(expected, scale[c], shift[c]));
        if (s.residual) expected = plus<T>(expected, residual(p, c));
      }
      check(what, at({p, c}), output[p * stride + c], stored<T>(expected));
    }
    if (!s.batch || (c >= s.channels && !checks_padding)) continue;
    for (std::size_t u = 0; u < unit_index.size(); ++u) {
      const std::vector<Bounded> of_unit(raw.begin() + unit_begin[u], raw.begin() + unit_begin[u + 1]);
      check_partials<T>(what, partials.data() + unit_index[u] * 3 * stride, stride, c, of_unit);
    }
  }
  ++cases;
}

inline std::vector<int64_t> block_begins(int64_t pixels, std::vector<int64_t>& index) {
  std::vector<int64_t> begin{0};
  for (int64_t b = 0; b * kBlockPixels < pixels; ++b) {
    begin.push_back(std::min(pixels, (b + 1) * kBlockPixels));
    index.push_back(b);
  }
  return begin;
}

struct StridedCase {
  int64_t images, height, width, in, stride;
  double mean;      // of inputs of standard deviation 1
  bool not_finite;  // NaN and infinities among the inputs
  bool constant;    // all pixels alike: no variance at all
};

template <typename T>
void strided_case(const Kernels<T>& k, const StridedCase& s, const PointwiseCase& o) {
  const std::string what =
      std::string(k.name) + " strided " +
      at({s.images, s.height, s.width, s.in, s.stride, static_cast<int64_t>(s.mean), s.not_finite, s.constant,
          o.channels, o.activation, o.batch, o.residual, o.row_factors});
  Map<T> map(s.images * s.height * s.width, s.in, s.mean);
  for (int64_t p = 0; p < map.pixels; ++p) {
    for (int64_t c = 0; s.constant && c < s.in; ++c) map.set(p, c, static_cast<double>(map(0, c)));
    if (s.not_finite && p % 2 == 0) {
      map.set(p, p % s.in,
              std::initializer_list<double>{NAN, INFINITY, -INFINITY, 1e30, -1e30}.begin()[p / 2 % 5]);
    }
  }
  const int64_t height = ceil_div(s.height, s.stride), width = ceil_div(s.width, s.stride);
  const int64_t pixels = s.images * height * width;
  std::vector<std::vector<Bounded>> inputs;
  for (int64_t p = 0; p < pixels; ++p) {
    const int64_t image = p / (height * width), y = p / width % height, x = p % width;
    std::vector<Bounded>& row = inputs.emplace_back(s.in);
    for (int64_t c = 0; c < s.in; ++c) {
      row[c] = {map((image * s.height + y * s.stride) * s.width + x * s.stride, c), 0};
    }
  }
  const StridedInput<T> in{map.memory.data(), s.images, s.height, s.width, s.in, s.stride};
  std::vector<int64_t> index;
  const auto begin = block_begins(pixels, index);
  check_pointwise<T>(
      k, what, o, pixels, inputs, begin, index,
      [&](const PointwiseOutput<T>& to) {
        const auto last = static_cast<int64_t>(index.size()),
                   cut = static_cast<int64_t>(engine() % (last + 1));
        k.strided(in, to, cut, last);
        k.strided(in, to, 0, cut);
        const int64_t channels = row_channels<T>(o.channels);
        for (int64_t i = 0; s.constant && i < last * 3 * channels; ++i) {
          if (i / channels % 3 != 0 && to.partials[i] != 0)
            fail(what + ": equal pixels differ from the pilot");
        }
      },
      !s.not_finite);
}

struct PatchCase {
  int64_t images, height, width, channels, kernel, stride;
  bool nhwc;
};

template <typename T>
void patches_case(const Kernels<T>& k, const PatchCase& s, const PointwiseCase& o) {
  using C = Compute<T>;
  const std::string what = std::string(k.name) + " patches " +
                           at({s.images, s.height, s.width, s.channels, s.kernel, s.stride, s.nhwc,
                               o.channels, o.activation, o.batch, o.residual, o.row_factors});
  const Matrix<C> images(s.images * s.height * s.width, s.channels, 1);  // in either order
  const int64_t image_size = s.height * s.width * s.channels;
  PatchInput<T> in{images.values.data(),
                   s.images,
                   s.height,
                   s.width,
                   s.channels,
                   {image_size, s.height * s.width, s.width, 1},
                   s.kernel,
                   s.stride};
  if (s.nhwc) {
    const int64_t strides[4] = {image_size, 1, s.width * s.channels, s.channels};
    std::copy_n(strides, 4, in.strides);
  }
  const int64_t height = ceil_div(s.height, s.stride), width = ceil_div(s.width, s.stride);
  const int64_t pixels = s.images * height * width;
  std::vector<std::vector<Bounded>> inputs;
  for (int64_t p = 0; p < pixels; ++p) {
    std::vector<Bounded>& row = inputs.emplace_back();
    const int64_t taps = s.kernel * s.kernel;
    for (int64_t depth = 0; depth < s.channels * taps; ++depth) {
      const bool by_taps = takes_tap_by_tap(s.channels);
      const int64_t c = by_taps ? depth % s.channels : depth / taps;
      const int64_t tap = by_taps ? depth / s.channels : depth % taps;
      const int64_t y = p / width % height * s.stride + tap / s.kernel - s.kernel / 2;
      const int64_t x = p % width * s.stride + tap % s.kernel - s.kernel / 2;
      const bool inside = y >= 0 && y < s.height && x >= 0 && x < s.width;
      const int64_t at_pixel =
          p / (height * width) * in.strides[0] + c * in.strides[1] + y * in.strides[2] + x * in.strides[3];
      row.push_back({inside ? static_cast<Real>(value_of(rounded<T>(images.values[at_pixel]))) : 0.0L, 0});
    }
  }
  std::vector<int64_t> index;
  const auto begin = block_begins(pixels, index);
  check_pointwise<T>(k, what, o, pixels, inputs, begin, index, [&](const PointwiseOutput<T>& to) {
    const auto last = static_cast<int64_t>(index.size()), cut = static_cast<int64_t>(engine() % (last + 1));
    k.patches(in, to, cut, last);
    k.patches(in, to, 0, cut);
  });
}

}  // namespace reference
