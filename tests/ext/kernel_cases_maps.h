// finish, pointwise_moments, linear and head_pool: random arguments, the kernel in two calls, and every value
// compared.
#pragma once

#include <algorithm>

#include "kernel_cases_depthwise.h"

namespace reference {

// A distance from the pilot, as it is multiplied: in C, and by tiles as a T, where mostly nothing is rounded.
template <typename T>
Bounded distance(Real x, Real pilot) {
  const Real exact = x - pilot;
  const bool is_rounded = kTiled<T> && value_of(rounded<T>(static_cast<double>(exact))) != exact;
  return {exact, (kComputeRoundoff<T> + (is_rounded ? 1.001L * kStoreRoundoff<T> : 0)) * std::abs(exact)};
}

struct FinishCase {
  int64_t pixels, channels, activation;
  bool maps, moments, residual, in_place;
  double mean;
  bool far_pilots;  // of kTiled kernels: not all of them 0
};

template <typename T>
void finish_case(const Kernels<T>& k, const FinishCase& s) {
  using C = Compute<T>;
  const std::string what = std::string(k.name) + " finish " +
                           at({s.pixels, s.channels, s.activation, s.maps, s.moments, s.residual, s.in_place,
                               static_cast<int64_t>(s.mean), s.far_pilots});
  const int64_t stride = row_channels<T>(s.channels);
  const Map<T> raw(s.pixels, s.channels, s.mean), residual(s.pixels, s.channels);
  const auto scale = channel_values<C>(s.channels, stride, 1),
             shift = channel_values<C>(s.channels, stride, 1);
  Output<T> output(s.pixels * stride);
  if (s.in_place) std::copy_n(raw.memory.data(), s.pixels * stride, output.data());
  FinishMap<T> f{s.in_place ? output.data() : raw.memory.data(),
                 s.maps ? output.data() : nullptr,
                 s.pixels,
                 s.channels,
                 s.maps ? scale.data() : nullptr,
                 s.maps ? shift.data() : nullptr,
                 s.activation,
                 s.residual ? residual.memory.data() : nullptr,
                 nullptr};
  std::vector<C> pilot(stride, C(0));
  for (int64_t c = 0; c < s.channels; ++c) {
    pilot[c] = static_cast<C>(s.maps ? activated(s.activation, s.mean * scale[c] + shift[c]) : s.mean);
    if constexpr (kTiled<T>)  // 0, or a number of that type
      pilot[c] = s.far_pilots && c % 3 < 2 ? value_of(rounded<T>(static_cast<double>(pilot[c]))) : 0;
  }
  if (s.moments) f.pilot = pilot.data();
  Output<double> gram(stride * stride), sums(stride);
  std::fill_n(gram.data(), stride * stride, 1.0);  // they are added to
  std::fill_n(sums.data(), stride, 2.0);
  const int64_t units = ceil_div(s.pixels, kGramPixels);
  k.finish(f, units / 2, units, gram.data(), sums.data());
  k.finish(f, 0, units / 2, gram.data(), sums.data());
  output.check_guard(what);
  gram.check_guard(what);
  sums.check_guard(what);

  std::vector<Bounded> centred(s.pixels * stride);
  for (int64_t p = 0; p < s.pixels; ++p) {
    for (int64_t c = 0; c < stride; ++c) {
      Bounded x{raw(p, c), 0};
      if (s.maps) {
        Bounded expected;
        if (c < s.channels) {
          expected = activate<T>(s.activation, affine<T>(x, scale[c], shift[c]));
          if (s.residual) expected = plus<T>(expected, residual(p, c));
        }
        check(what, at({p, c}), output[p * stride + c], stored<T>(expected));
        x.value = output[p * stride + c];  // moments are of what is stored
      }
      centred[p * stride + c] = distance<T>(x.value, pilot[c]);
    }
  }
  for (int64_t i = 0; s.moments && i < stride; ++i) {
    Sum<T> sum;
    for (int64_t p = 0; p < s.pixels; ++p) sum.add(centred[p * stride + i], 1);
    const Bounded expected = sum.result();
    check(what, "sum " + at({i}), sums[i], {expected.value + 2, expected.error + 1e-15L});
    for (int64_t j = i; j < stride; ++j) {
      Sum<T> product;
      for (int64_t p = 0; p < s.pixels; ++p) product.add(centred[p * stride + i], centred[p * stride + j]);
      const Bounded moment = product.result();
      check(what, "product " + at({i, j}), gram[i * stride + j], {moment.value + 1, moment.error + 1e-15L});
    }
  }
  ++cases;
}

// Inputs of mean `ratio` standard deviations, the first channel constant: the statistics of the convolution
// as the sums over its explicitly computed outputs give them.
template <typename T>
void pointwise_moments_case(const Kernels<T>& k, int64_t depth, int64_t channels, double ratio,
                            double weight_scale) {
  using C = Compute<T>;
  const std::string what =
      std::string(k.name) + " pointwise_moments " + at({depth, channels, static_cast<int64_t>(ratio)});
  constexpr int64_t kPixels = 40;
  Map<T> map(kPixels, depth, ratio);
  for (int64_t p = 0; p < kPixels; ++p) map.set(p, 0, ratio + 1);
  std::vector<Real> mean(depth, 0), covariance(depth * depth, 0);
  for (int64_t p = 0; p < kPixels; ++p) {
    for (int64_t c = 0; c < depth; ++c) mean[c] += map(p, c) / kPixels;
  }
  std::vector<C> given_mean(mean.begin(), mean.end()), given(depth * depth, poison<C>());
  for (int64_t i = 0; i < depth; ++i) {
    for (int64_t j = i; j < depth; ++j) {
      Real& sum = covariance[i * depth + j];
      for (int64_t p = 0; p < kPixels; ++p) sum += (map(p, i) - mean[i]) * (map(p, j) - mean[j]) / kPixels;
      given[i * depth + j] = static_cast<C>(i == j ? sum : 2 * sum);  // below the diagonal stays NaN
    }
  }
  const Matrix<T> weight(channels, depth, weight_scale);
  const auto packed = weight.pointwise(k.group_width, k.depth_multiple);
  const int64_t stride = row_channels<T>(channels);
  Output<C> out_mean(stride), out_variance(stride);
  for (int64_t group = ceil_div(stride, k.group_width) - 1; group >= 0; --group) {
    k.pointwise_moments(given_mean.data(), given.data(), depth, packed.data(), channels, group,
                        out_mean.data(), out_variance.data());
  }
  out_mean.check_guard(what);
  out_variance.check_guard(what);
  for (int64_t c = 0; c < stride; ++c) {
    Sum<T> of_means;
    Real explicit_mean = 0, explicit_variance = 0, magnitude = 0;
    if (c < channels) {
      std::vector<Real> outputs(kPixels, 0);
      for (int64_t p = 0; p < kPixels; ++p) {
        for (int64_t i = 0; i < depth; ++i) outputs[p] += map(p, i) * weight(c, i);
        explicit_mean += outputs[p] / kPixels;
      }
      for (const Real x : outputs) explicit_variance += (x - explicit_mean) * (x - explicit_mean) / kPixels;
      for (int64_t i = 0; i < depth; ++i) {
        of_means.add({mean[i], kComputeRoundoff<T> * std::abs(mean[i])}, weight(c, i));
        for (int64_t j = i; j < depth; ++j) {
          magnitude += std::abs(weight(c, i) * weight(c, j) * covariance[i * depth + j]) * (i == j ? 1 : 2);
        }
      }
    }
    check(what, "mean " + at({c}), out_mean[c], {explicit_mean, c < channels ? of_means.result().error : 0});
    check(
        what, "variance " + at({c}), out_variance[c],
        {explicit_variance, (2 * depth + 5) * kComputeRoundoff<T> * magnitude +
                                1e-36L * explicit_mean * explicit_mean + (sizeof(C) < 8 ? 1e-36L : 1e-300L)});
    if (!(out_variance[c] >= 0)) fail(what + ": negative variance");
  }
  ++cases;
}

template <typename T>
void linear_case(const Kernels<T>& k, int64_t rows, int64_t depth, int64_t channels, int64_t activation,
                 bool has_bias, bool padded_output, int64_t gap) {
  using C = Compute<T>;
  const std::string what = std::string(k.name) + " linear " +
                           at({rows, depth, channels, activation, has_bias, padded_output, gap});
  const Matrix<C> input(rows, depth + gap, 1),
      weight(channels, depth, 1.5 / std::sqrt(static_cast<double>(depth)));
  const auto packed = weight.pointwise(k.group_width, 1);
  const auto bias = channel_values<C>(channels, padded(channels), 2);
  const int64_t written = padded_output ? padded(channels) : channels, out_stride = written + gap;
  Output<C> output((rows - 1) * out_stride + written);
  const Linear<C> l{input.values.data(),
                    rows,
                    depth + gap,
                    depth,
                    packed.data(),
                    has_bias ? bias.data() : nullptr,
                    channels,
                    activation,
                    output.data(),
                    out_stride,
                    padded_output};
  const int64_t groups = ceil_div(padded(channels), k.group_width),
                cut = static_cast<int64_t>(engine() % (groups + 1));
  k.linear(l, cut, groups);
  k.linear(l, 0, cut);
  output.check_guard(what);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < std::min(out_stride, (rows - r) * out_stride - gap); ++c) {
      const double got = output[r * out_stride + c];
      if (c >= written) {
        if (!std::isnan(got)) fail(what + ": wrote between rows, " + at({r, c}));
        continue;
      }
      Sum<C> sum;
      for (int64_t i = 0; c < channels && i < depth; ++i) sum.add({input(r, i), 0}, weight(c, i));
      Bounded x = plus<C>(sum.result(), c < channels && has_bias ? static_cast<Real>(bias[c]) : 0.0L);
      if (activation == kLinearRelu) x = activate<C>(kRelu, x);
      const Real own = 10 * kComputeRoundoff<C> * (std::abs(x.value) + 3);
      if (activation == kLinearHsigmoid) x = {activated(kRelu6, x.value + 3) / 6, x.error + own};
      if (activation == kLinearSigmoid) x = {1 / (1 + std::exp(-x.value)), x.error + own};
      check(what, at({r, c}), got, x);
    }
  }
  ++cases;
}

struct HeadPoolCase {
  int64_t images, image_pixels, in, channels, slab_images, activation;
  double weight_scale;
};

template <typename T>
void head_pool_case(const Kernels<T>& k, const HeadPoolCase& s) {
  using C = Compute<T>;
  const std::string what = std::string(k.name) + " head_pool " +
                           at({s.images, s.image_pixels, s.in, s.channels, s.slab_images, s.activation});
  const int64_t stride = row_channels<T>(s.channels);
  const Map<T> map(s.images * s.image_pixels, s.in);
  const Matrix<T> weight(s.channels, s.in, s.weight_scale);
  const auto packed = weight.pointwise(k.group_width, k.depth_multiple);
  const auto scale = channel_values<C>(s.channels, stride, affine_scale(s.weight_scale, s.in));
  const auto shift = channel_values<C>(s.channels, stride, 1);
  Output<C> output(s.images * stride);
  const HeadPool<T> h{map.memory.data(), s.images,      s.image_pixels, s.in,
                      s.slab_images,     packed.data(), s.channels,     scale.data(),
                      shift.data(),      s.activation,  output.data()};
  const int64_t units = ceil_div(s.images, s.slab_images) * ceil_div(stride, k.group_width);
  const int64_t cut = static_cast<int64_t>(engine() % (units + 1));
  k.head_pool(h, cut, units);
  k.head_pool(h, 0, cut);
  output.check_guard(what);
  for (int64_t image = 0; image < s.images; ++image) {
    for (int64_t c = 0; c < stride; ++c) {
      Sum<T> mean;
      for (int64_t p = 0; c < s.channels && p < s.image_pixels; ++p) {
        Sum<T> sum;
        for (int64_t i = 0; i < s.in; ++i) sum.add({map(image * s.image_pixels + p, i), 0}, weight(c, i));
        mean.add(activate<T>(s.activation, affine<T>(sum.result(), scale[c], shift[c])),
                 1.0L / s.image_pixels);
      }
      check(what, at({image, c}), output[image * stride + c], c < s.channels ? mean.result() : Bounded{});
    }
  }
  ++cases;
}

}  // namespace reference
