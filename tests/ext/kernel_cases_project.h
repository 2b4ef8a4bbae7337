// project and squeeze, which read the output of a depthwise convolution: random arguments, the kernel in two
// calls, and every value compared.
#pragma once

#include <algorithm>

#include "kernel_cases_halves.h"
#include "kernel_cases_pointwise.h"

namespace reference {

struct DepthwiseOutputCase {
  int64_t images, image_pixels, hidden, slab_images, activation;
  bool gates, by_slab;
  bool halves = false;  // of kTiled kernels
  Values values = Values::kRandom;

  std::string text() const {
    return at({images, image_pixels, hidden, slab_images, activation, gates, by_slab, halves,
               static_cast<int64_t>(values)});
  }
};

// A depthwise output in its layout, and what the projection and squeeze make of it.
template <typename T>
struct DepthwiseOutput {
  using C = Compute<T>;
  DepthwiseOutputCase s;
  SlabLayout layout;
  Lines<T> values;
  std::vector<C> scale, shift, gates;
  std::vector<int> exponents;  // of factors
  std::vector<C> factor;

  DepthwiseOutput(const DepthwiseOutputCase& shape, int64_t group_width)
      : s(shape),
        layout{s.images, s.image_pixels, row_channels<T>(s.hidden), s.slab_images, group_width},
        values(layout.size(), T{}),
        scale(channel_values<C>(s.hidden, layout.stride, 1)),
        shift(channel_values<C>(s.hidden, layout.stride, 1)),
        exponents(s.hidden, 0),
        factor(layout.stride, 1) {
    const bool exact = s.values == Values::kWhole;
    for (int64_t c = 0; c < s.hidden; ++c) {
      if (exact) {
        scale[c] = static_cast<C>(pick({-1, 1}));
        shift[c] = static_cast<C>(whole(-3, 5));
        exponents[c] = pick({-14, -9, -3, 0, 4});
      } else {
        exponents[c] = std::ilogb(half_factor(std::hypot(scale[c], shift[c])));
        if (s.values == Values::kNotFinite) exponents[c] += pick({0, 8});
      }
      factor[c] = std::ldexp(C(1), exponents[c]);
      for (int64_t i = 0; i < s.images; ++i) {
        for (int64_t p = 0; p < s.image_pixels; ++p)
          set(i, p, c, exact ? static_cast<double>(whole(-6, 6)) : normal());
      }
    }
    for (int64_t i = 0; i < s.images; ++i) {
      auto of_image = channel_values<C>(s.hidden, layout.stride, 1);
      for (int64_t c = 0; exact && c < s.hidden; ++c) of_image[c] = pick<C>({1, 2, -2});
      gates.insert(gates.end(), of_image.begin(), of_image.end());
    }
    if (s.values != Values::kNotFinite) return;
    // And numbers that the greater factors take out of half precision's range.
    for (int64_t i = 0; i < std::max<int64_t>(2, layout.size() / 200); ++i)
      set(whole(0, s.images - 1), whole(0, s.image_pixels - 1), whole(0, s.hidden - 1),
          pick<double>({NAN, INFINITY, -INFINITY, 65000, -65000}));
  }

  void set(int64_t image, int64_t pixel, int64_t c, double x) {
    T& value = values[layout.index(image, pixel, c)];
    if constexpr (kTiled<T>) {
      value.bits = s.halves ? rounded<Half>(x).bits : rounded<T>(x).bits;
    } else {
      value = rounded<T>(x);
    }
  }
  Real raw(int64_t image, int64_t pixel, int64_t c) const {
    const T value = values[layout.index(image, pixel, c)];
    if constexpr (kTiled<T>) {
      if (s.halves) return value_of(Half{value.bits});
    }
    return value_of(value);
  }

  // The values of `slab` alone, as a kernel finds them that is told first_slab == slab.
  Lines<T> slab_values(int64_t slab) const {
    const int64_t first = slab * s.slab_images, last = std::min(first + s.slab_images, s.images);
    const int64_t image_size = s.image_pixels * layout.stride;
    return {values.begin() + first * image_size, values.begin() + last * image_size};
  }

  ProjectInput<T> input() const {
    return {values.data(),
            0,
            s.slab_images,
            s.images,
            s.image_pixels,
            scale.data(),
            shift.data(),
            s.activation,
            s.gates ? gates.data() : nullptr,
            s.halves,
            kTiled<T> ? factor.data() : nullptr};
  }

  // Mapped and activated.
  Bounded operator()(int64_t image, int64_t pixel, int64_t c) const {
    return activate<T>(s.activation, affine<T>({raw(image, pixel, c), 0}, scale[c], shift[c]));
  }

  // What the projection multiplies.
  Bounded projected(int64_t image, int64_t pixel, int64_t c) const {
    Bounded x = (*this)(image, pixel, c);
    if (s.gates) {
      const Real gate = gates[image * layout.stride + c];
      x = {x.value * gate, x.error * std::abs(gate) + kComputeRoundoff<T> * std::abs(x.value * gate)};
    }
    if (s.values == Values::kWhole) return {x.value, 0};
    if (!std::isfinite(x.value)) return x;
    const Real by = std::abs(raw(image, pixel, c));
    if (s.halves && !s.gates && (s.activation == kRelu || s.activation == kRelu6) && std::isfinite(by)) {
      // The kernel may compute this in half precision, scale, shift and result times the factor each rounded
      // to it.
      const Real unit = kHalfUnderflow / factor[c];
      x.error += by * (kHalfRoundoff * std::abs(scale[c]) + unit) + kHalfRoundoff * std::abs(shift[c]) + unit;
      x.error += 1.001L * kHalfRoundoff * (std::abs(x.value) + x.error) + unit;
    }
    x = stored<T>(x);
    // Times factor and 2^-112 it is 0 to tiles where it is subnormal, that is below 2^-126.
    if (kTiled<T>) x.error += 0x1p-14L / factor[c];
    return x;
  }
};

template <typename T>
void project_case(const Kernels<T>& k, const DepthwiseOutputCase& s, const PointwiseCase& o) {
  const std::string what =
      std::string(k.name) + " project " + s.text() + at({o.channels, o.batch, o.residual, o.row_factors});
  const DepthwiseOutput<T> depthwise(s, k.group_width);
  std::vector<std::vector<Bounded>> inputs;
  for (int64_t image = 0; image < s.images; ++image) {
    for (int64_t p = 0; p < s.image_pixels; ++p) {
      std::vector<Bounded>& row = inputs.emplace_back(s.hidden);
      for (int64_t c = 0; c < s.hidden; ++c) row[c] = depthwise.projected(image, p, c);
    }
  }
  WeightFactors factors;
  if (kTiled<T>) {
    factors.all = kTileExponent;
    for (const int exponent : depthwise.exponents) factors.columns.push_back(-exponent);
  }
  const int64_t slabs = depthwise.layout.slabs(),
                blocks = ceil_div(s.slab_images * s.image_pixels, kBlockPixels);
  const auto slab_pixels = [&](int64_t slab) {
    return std::min(s.slab_images, s.images - slab * s.slab_images) * s.image_pixels;
  };
  std::vector<int64_t> begin{0}, index;
  for (int64_t slab = 0; slab < slabs; ++slab) {
    for (int64_t b = 0; b * kBlockPixels < slab_pixels(slab); ++b) {
      begin.push_back(begin.back() + std::min(kBlockPixels, slab_pixels(slab) - b * kBlockPixels));
      index.push_back(slab * blocks + b);
    }
  }
  const auto run = [&](const PointwiseOutput<T>& to) {
    for (int64_t slab = slabs - 1; slab >= 0; --slab) {
      ProjectInput<T> in = depthwise.input();
      Lines<T> alone;
      if (s.by_slab) {
        alone = depthwise.slab_values(slab);
        in.depthwise = alone.data();
        in.first_slab = slab;
      }
      const int64_t last = ceil_div(slab_pixels(slab), kBlockPixels),
                    cut = static_cast<int64_t>(engine() % (last + 1));
      k.project(in, to, slab, cut, last);
      k.project(in, to, slab, 0, cut);
    }
  };
  check_pointwise<T>(k, what, o, s.images * s.image_pixels, inputs, begin, index, run,
                     s.values != Values::kNotFinite, factors);
}

template <typename T>
void squeeze_case(const Kernels<T>& k, const DepthwiseOutputCase& s) {
  using C = Compute<T>;
  const std::string what = std::string(k.name) + " squeeze " + s.text();
  const DepthwiseOutput<T> depthwise(s, k.group_width);
  const int64_t stride = depthwise.layout.stride, slabs = depthwise.layout.slabs();
  Output<C> output(s.images * stride);
  if (s.by_slab) {
    for (int64_t slab = 0; slab < slabs; ++slab) {
      const Lines<T> alone = depthwise.slab_values(slab);
      Squeeze<T> a{depthwise.input(), s.hidden, output.data()};
      a.input.depthwise = alone.data();
      a.input.first_slab = slab;
      k.squeeze(a, slab, slab + 1);
    }
  } else {
    const Squeeze<T> a{depthwise.input(), s.hidden, output.data()};
    k.squeeze(a, slabs / 2, slabs);
    k.squeeze(a, 0, slabs / 2);
  }
  output.check_guard(what);
  for (int64_t image = 0; image < s.images; ++image) {
    for (int64_t c = 0; c < stride; ++c) {
      Sum<T> sum;
      for (int64_t p = 0; c < s.hidden && p < s.image_pixels; ++p)
        sum.add(depthwise(image, p, c), 1.0L / s.image_pixels);
      check(what, at({image, c}), output[image * stride + c], c < s.hidden ? sum.result() : Bounded{});
    }
  }
  ++cases;
}

}  // namespace reference
