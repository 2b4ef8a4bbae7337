// One case of each kernel: random arguments, the kernel in two calls, and every value of the output compared.
#pragma once

#include <algorithm>

#include "kernel_reference.h"

namespace reference {

// 1 / deviation of a dot product's result, so that activations see values of about 1.
inline double affine_scale(double weight_scale, int64_t depth) {
  return 1 / (weight_scale * std::sqrt(static_cast<double>(depth)));
}

struct ExpandDepthwiseCase {
  int64_t images, height, width, in, hidden, kernel, stride, slab_images, activation;
  bool expands, has_affine, by_slab, streams;
  double weight_scale, mean;
};

template <typename T>
void expand_depthwise_case(const Kernels<T>& k, const ExpandDepthwiseCase& s) {
  using C = Compute<T>;
  const int64_t in = s.expands ? s.in : s.hidden, hidden = s.hidden, taps = s.kernel * s.kernel;
  const std::string what = std::string(k.name) + " expand_depthwise " +
                           at({s.images, s.height, s.width, in, hidden, s.kernel, s.stride, s.slab_images,
                               s.activation, s.expands, s.has_affine, s.by_slab, s.streams});
  const int64_t pixels = s.images * s.height * s.width;
  const Map<T> input(pixels, in, s.mean);
  const Matrix<T> weight(hidden, in, s.weight_scale);
  const Matrix<C> depthwise(hidden, taps, s.weight_scale);
  const auto scale = channel_values<C>(hidden, s.expands ? affine_scale(s.weight_scale, in) : 1);
  const auto shift = channel_values<C>(hidden, 1);
  const auto packed = weight.pointwise(k.group_width, k.depth_multiple);
  const auto taps_packed = depthwise.depthwise(k.group_width);
  const int64_t out_height = ceil_div(s.height, s.stride), out_width = ceil_div(s.width, s.stride);
  const SlabLayout layout{s.images, out_height * out_width, hidden, s.slab_images, k.group_width};
  const int64_t groups = ceil_div(padded(hidden), k.group_width), slabs = layout.slabs();
  Output<double> partials(slabs * 3 * padded(hidden));
  Output<T> output(layout.size());
  ExpandDepthwise<T> a{input.memory.data(),
                       s.images,
                       s.height,
                       s.width,
                       in,
                       s.expands ? packed.data() : nullptr,
                       s.has_affine ? scale.data() : nullptr,
                       s.has_affine ? shift.data() : nullptr,
                       s.activation,
                       taps_packed.data(),
                       hidden,
                       s.kernel,
                       s.stride,
                       s.slab_images,
                       output.data(),
                       0,
                       partials.data(),
                       s.streams};
  if (s.by_slab) {  // each slab into memory of its own, without statistics
    a.partials = nullptr;
    for (int64_t slab = 0; slab < slabs; ++slab) {
      const int64_t first = slab * s.slab_images, count = std::min(s.slab_images, s.images - first);
      const int64_t size = count * layout.image_pixels * padded(hidden);
      Output<T> one(size);
      a.output = one.data();
      a.first_slab = slab;
      k.expand_depthwise(a, slab * groups, (slab + 1) * groups);
      one.check_guard(what);
      std::copy_n(one.data(), size, output.data() + first * layout.image_pixels * padded(hidden));
    }
  } else {
    const int64_t cut = static_cast<int64_t>(engine() % (slabs * groups + 1));
    k.expand_depthwise(a, cut, slabs * groups);
    k.expand_depthwise(a, 0, cut);
  }
  output.check_guard(what);
  partials.check_guard(what);

  std::vector<Bounded> expanded(pixels);
  for (int64_t c = 0; c < padded(hidden); ++c) {
    if (c >= hidden) {
      for (int64_t i = 0; i < s.images; ++i) {
        for (int64_t p = 0; p < layout.image_pixels; ++p)
          check(what, at({i, p, c}), output[layout.index(i, p, c)], {});
      }
      continue;
    }
    for (int64_t p = 0; p < pixels; ++p) {
      Bounded x{input(p, c % in), 0};
      if (s.expands) {
        Sum<T> sum;
        for (int64_t i = 0; i < in; ++i) sum.add({input(p, i), 0}, weight(c, i));
        x = sum.result();
      }
      expanded[p] = s.has_affine ? activate<T>(s.activation, affine<T>(x, scale[c], shift[c])) : x;
    }
    std::vector<Bounded> of_slab;
    for (int64_t image = 0; image < s.images; ++image) {
      for (int64_t y = 0; y < out_height; ++y) {
        for (int64_t x = 0; x < out_width; ++x) {
          Sum<T> sum;
          for (int64_t tap = 0; tap < taps; ++tap) {
            const int64_t in_y = y * s.stride + tap / s.kernel - s.kernel / 2;
            const int64_t in_x = x * s.stride + tap % s.kernel - s.kernel / 2;
            if (in_y < 0 || in_y >= s.height || in_x < 0 || in_x >= s.width) continue;
            sum.add(expanded[(image * s.height + in_y) * s.width + in_x], depthwise(c, tap));
          }
          of_slab.push_back(sum.result());
          const int64_t index = layout.index(image, y * out_width + x, c);
          check(what, at({image, y, x, c}), output[index], stored<T>(of_slab.back()));
        }
      }
      if ((image + 1) % s.slab_images != 0 && image + 1 != s.images) continue;
      if (!s.by_slab) {
        check_partials<T>(what, partials.data() + image / s.slab_images * 3 * padded(hidden), padded(hidden),
                          c, of_slab);
      }
      of_slab.clear();
    }
  }
  ++cases;
}

struct PointwiseCase {
  int64_t channels, activation;
  bool batch, residual;
  double weight_scale;
};

// Calls run(output, units) and compares with the products of inputs[pixel][k]. `unit_begin`: the first pixel
// of each block of statistics, in order, and the number of pixels at the end; `unit_index`: where its
// partials lie.
template <typename T, typename Run>
void check_pointwise(const Kernels<T>& k, const std::string& what, const PointwiseCase& s, int64_t pixels,
                     const std::vector<std::vector<Bounded>>& inputs, const std::vector<int64_t>& unit_begin,
                     const std::vector<int64_t>& unit_index, const Run& run, bool checks_padding = true) {
  using C = Compute<T>;
  const auto depth = static_cast<int64_t>(inputs[0].size());
  const int64_t stride = padded(s.channels);
  const Matrix<T> weight(s.channels, depth, s.weight_scale);
  const auto packed = weight.pointwise(k.group_width, k.depth_multiple);
  const auto scale = channel_values<C>(s.channels, affine_scale(s.weight_scale, depth));
  const auto shift = channel_values<C>(s.channels, 1);
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

struct DepthwiseOutputCase {
  int64_t images, image_pixels, hidden, slab_images, activation;
  bool gates, by_slab;
};

// A depthwise output in its layout, and what the projection and squeeze make of it.
template <typename T>
struct DepthwiseOutput {
  using C = Compute<T>;
  DepthwiseOutputCase s;
  SlabLayout layout;
  std::vector<T> values;
  std::vector<C> scale, shift, gates;

  DepthwiseOutput(const DepthwiseOutputCase& shape, int64_t group_width)
      : s(shape),
        layout{s.images, s.image_pixels, s.hidden, s.slab_images, group_width},
        values(layout.size(), T{}),
        scale(channel_values<C>(s.hidden, 1)),
        shift(channel_values<C>(s.hidden, 1)) {
    for (int64_t i = 0; i < s.images; ++i) {
      for (int64_t p = 0; p < s.image_pixels; ++p) {
        for (int64_t c = 0; c < s.hidden; ++c) values[layout.index(i, p, c)] = rounded<T>(normal());
      }
      const auto of_image = channel_values<C>(s.hidden, 1);
      gates.insert(gates.end(), of_image.begin(), of_image.end());
    }
  }

  // The values of `slab` alone, as a kernel finds them that is told first_slab == slab.
  std::vector<T> slab_values(int64_t slab) const {
    const int64_t first = slab * s.slab_images, last = std::min(first + s.slab_images, s.images);
    const int64_t image_size = s.image_pixels * padded(s.hidden);
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
            s.gates ? gates.data() : nullptr};
  }

  Bounded operator()(int64_t image, int64_t pixel, int64_t c) const {
    const Bounded x{value_of(values[layout.index(image, pixel, c)]), 0};
    return activate<T>(s.activation, affine<T>(x, scale[c], shift[c]));
  }
};

template <typename T>
void project_case(const Kernels<T>& k, const DepthwiseOutputCase& s, const PointwiseCase& o) {
  const std::string what = std::string(k.name) + " project " +
                           at({s.images, s.image_pixels, s.hidden, s.slab_images, s.activation, s.gates,
                               s.by_slab, o.channels, o.batch, o.residual});
  const DepthwiseOutput<T> depthwise(s, k.group_width);
  std::vector<std::vector<Bounded>> inputs;
  for (int64_t image = 0; image < s.images; ++image) {
    for (int64_t p = 0; p < s.image_pixels; ++p) {
      std::vector<Bounded>& row = inputs.emplace_back(s.hidden);
      for (int64_t c = 0; c < s.hidden; ++c) {
        row[c] = depthwise(image, p, c);
        if (s.gates) {
          const Real gate = depthwise.gates[image * padded(s.hidden) + c];
          row[c] = {row[c].value * gate,
                    row[c].error * std::abs(gate) + kComputeRoundoff<T> * std::abs(row[c].value * gate)};
        }
        row[c] = stored<T>(row[c]);
      }
    }
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
  check_pointwise<T>(k, what, o, s.images * s.image_pixels, inputs, begin, index,
                     [&](const PointwiseOutput<T>& to) {
                       for (int64_t slab = slabs - 1; slab >= 0; --slab) {
                         ProjectInput<T> in = depthwise.input();
                         std::vector<T> alone;
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
                     });
}

template <typename T>
void squeeze_case(const Kernels<T>& k, const DepthwiseOutputCase& s) {
  using C = Compute<T>;
  const std::string what = std::string(k.name) + " squeeze " +
                           at({s.images, s.image_pixels, s.hidden, s.slab_images, s.activation, s.by_slab});
  const DepthwiseOutput<T> depthwise(s, k.group_width);
  const int64_t stride = padded(s.hidden), slabs = depthwise.layout.slabs();
  Output<C> output(s.images * stride);
  if (s.by_slab) {
    for (int64_t slab = 0; slab < slabs; ++slab) {
      const std::vector<T> alone = depthwise.slab_values(slab);
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
  const std::string what = std::string(k.name) + " strided " +
                           at({s.images, s.height, s.width, s.in, s.stride, static_cast<int64_t>(s.mean),
                               s.not_finite, s.constant, o.channels, o.activation, o.batch, o.residual});
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
        for (int64_t i = 0; s.constant && i < last * 3 * padded(o.channels); ++i) {
          if (i / padded(o.channels) % 3 != 0 && to.partials[i] != 0)
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
                               o.channels, o.activation, o.batch, o.residual});
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
    for (int64_t c = 0; c < s.channels; ++c) {
      for (int64_t tap = 0; tap < s.kernel * s.kernel; ++tap) {
        const int64_t y = p / width % height * s.stride + tap / s.kernel - s.kernel / 2;
        const int64_t x = p % width * s.stride + tap % s.kernel - s.kernel / 2;
        const bool inside = y >= 0 && y < s.height && x >= 0 && x < s.width;
        const int64_t at_pixel =
            p / (height * width) * in.strides[0] + c * in.strides[1] + y * in.strides[2] + x * in.strides[3];
        row.push_back({inside ? static_cast<Real>(value_of(rounded<T>(images.values[at_pixel]))) : 0.0L, 0});
      }
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

struct FinishCase {
  int64_t pixels, channels, activation;
  bool maps, moments, residual, in_place;
  double mean;
};

template <typename T>
void finish_case(const Kernels<T>& k, const FinishCase& s) {
  using C = Compute<T>;
  const std::string what = std::string(k.name) + " finish " +
                           at({s.pixels, s.channels, s.activation, s.maps, s.moments, s.residual, s.in_place,
                               static_cast<int64_t>(s.mean)});
  const int64_t stride = padded(s.channels);
  const Map<T> raw(s.pixels, s.channels, s.mean), residual(s.pixels, s.channels);
  const auto scale = channel_values<C>(s.channels, 1), shift = channel_values<C>(s.channels, 1);
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
      const Real distance = x.value - static_cast<Real>(pilot[c]);
      centred[p * stride + c] = {distance, kComputeRoundoff<T> * std::abs(distance)};
    }
  }
  for (int64_t i = 0; s.moments && i < stride; ++i) {
    Sum<T> sum;
    for (int64_t p = 0; p < s.pixels; ++p) sum.add(centred[p * stride + i], 1);
    const Bounded expected = sum.result();
    check(what, "sum " + at({i}), sums[i], {expected.value + 2, expected.error + 1e-15L});
    for (int64_t j = i; j < stride; ++j) {
      Sum<T> product;
      for (int64_t p = 0; p < s.pixels; ++p) {
        const Bounded &x = centred[p * stride + i], &y = centred[p * stride + j];
        product.add({x.value, 2 * x.error}, y.value);
      }
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
  Output<C> out_mean(padded(channels)), out_variance(padded(channels));
  for (int64_t group = ceil_div(padded(channels), k.group_width) - 1; group >= 0; --group) {
    k.pointwise_moments(given_mean.data(), given.data(), depth, packed.data(), channels, group,
                        out_mean.data(), out_variance.data());
  }
  out_mean.check_guard(what);
  out_variance.check_guard(what);
  for (int64_t c = 0; c < padded(channels); ++c) {
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
  const auto bias = channel_values<C>(channels, 2);
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
  const int64_t stride = padded(s.channels);
  const Map<T> map(s.images * s.image_pixels, s.in);
  const Matrix<T> weight(s.channels, s.in, s.weight_scale);
  const auto packed = weight.pointwise(k.group_width, k.depth_multiple);
  const auto scale = channel_values<C>(s.channels, affine_scale(s.weight_scale, s.in));
  const auto shift = channel_values<C>(s.channels, 1);
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
