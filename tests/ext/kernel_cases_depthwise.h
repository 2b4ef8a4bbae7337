// expand_depthwise: random arguments, the kernel in two calls or slab by slab, and every value compared.
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

  int64_t in_channels() const { return expands ? in : hidden; }
  int64_t pixels() const { return images * height * width; }
  int64_t out_height() const { return ceil_div(height, stride); }
  int64_t out_width() const { return ceil_div(width, stride); }
  int64_t out_pixels() const { return out_height() * out_width(); }

  std::string text() const {
    return at({images, height, width, in_channels(), hidden, kernel, stride, slab_images, activation, expands,
               has_affine, by_slab, streams, static_cast<int64_t>(mean)});
  }

  // body(pixel of the input, tap) of those taps that lie inside the image.
  template <typename Body>
  void for_taps(int64_t image, int64_t y, int64_t x, const Body& body) const {
    for (int64_t tap = 0; tap < kernel * kernel; ++tap) {
      const int64_t in_y = y * stride + tap / kernel - kernel / 2;
      const int64_t in_x = x * stride + tap % kernel - kernel / 2;
      if (in_y < 0 || in_y >= height || in_x < 0 || in_x >= width) continue;
      body((image * height + in_y) * width + in_x, tap);
    }
  }

  // body(image, y, x) of all output pixels, then after_slab(slab) for each slab.
  template <typename Body, typename AfterSlab>
  void for_outputs(const Body& body, const AfterSlab& after_slab) const {
    for (int64_t image = 0; image < images; ++image) {
      for (int64_t y = 0; y < out_height(); ++y) {
        for (int64_t x = 0; x < out_width(); ++x) body(image, y, x);
      }
      if ((image + 1) % slab_images == 0 || image + 1 == images) after_slab(image / slab_images);
    }
  }
};

// The input and the expansion of a case, and room for what comes out.
template <typename T>
struct ExpandDepthwiseMemory {
  using C = Compute<T>;
  const ExpandDepthwiseCase s;
  Map<T> input;
  Matrix<T> weight;
  SlabLayout layout;
  Output<T> output;
  Output<double> partials;

  ExpandDepthwiseMemory(const Kernels<T>& k, const ExpandDepthwiseCase& shape)
      : s(shape),
        input(s.pixels(), s.in_channels(), s.mean),
        weight(s.hidden, s.in_channels(), s.weight_scale),
        layout{s.images, s.out_pixels(), row_channels<T>(s.hidden), s.slab_images, k.group_width},
        output(layout.size()),
        partials(layout.slabs() * 3 * layout.stride) {}

  // Of the hidden channels before the depthwise convolution.
  Bounded expanded(int64_t pixel, int64_t channel) const {
    if (!s.expands) return {input(pixel, channel), 0};
    Sum<T> sum;
    for (int64_t i = 0; i < s.in; ++i) sum.add({input(pixel, i), 0}, weight(channel, i));
    return sum.result();
  }

  void run(const Kernels<T>& k, const std::string& what, const C* scale, const C* shift, const C* depthwise,
           const uint16_t* half_depthwise, const C* factor) {
    const auto packed = weight.pointwise(k.group_width, k.depth_multiple);
    const int64_t groups = ceil_div(layout.stride, k.group_width), slabs = layout.slabs();
    ExpandDepthwise<T> a{input.memory.data(),
                         s.images,
                         s.height,
                         s.width,
                         s.in_channels(),
                         s.expands ? packed.data() : nullptr,
                         scale,
                         shift,
                         s.activation,
                         depthwise,
                         s.hidden,
                         s.kernel,
                         s.stride,
                         s.slab_images,
                         half_depthwise,
                         factor,
                         output.data(),
                         0,
                         partials.data(),
                         s.streams};
    if (s.by_slab) {  // each slab into memory of its own, without statistics
      a.partials = nullptr;
      for (int64_t slab = 0; slab < slabs; ++slab) {
        const int64_t first = slab * s.slab_images, count = std::min(s.slab_images, s.images - first);
        const int64_t size = count * layout.image_pixels * layout.stride;
        Output<T> one(size);
        a.output = one.data();
        a.first_slab = slab;
        k.expand_depthwise(a, slab * groups, (slab + 1) * groups);
        one.check_guard(what);
        std::copy_n(one.data(), size, output.data() + first * layout.image_pixels * layout.stride);
      }
    } else {
      const int64_t cut = static_cast<int64_t>(engine() % (slabs * groups + 1));
      k.expand_depthwise(a, cut, slabs * groups);
      k.expand_depthwise(a, 0, cut);
    }
    output.check_guard(what);
    partials.check_guard(what);
  }

  void check_padding(const std::string& what) const {
    for (int64_t c = s.hidden; c < layout.stride; ++c) {
      for (int64_t i = 0; i < s.images; ++i) {
        for (int64_t p = 0; p < layout.image_pixels; ++p)
          check(what, at({i, p, c}), output[layout.index(i, p, c)], {});
      }
    }
  }
};

template <typename T>
void expand_depthwise_case(const Kernels<T>& k, const ExpandDepthwiseCase& s) {
  using C = Compute<T>;
  const std::string what = std::string(k.name) + " expand_depthwise " + s.text();
  ExpandDepthwiseMemory<T> m(k, s);
  const int64_t stride = m.layout.stride;
  const Matrix<C> depthwise(s.hidden, s.kernel * s.kernel, s.weight_scale);
  const auto scale = channel_values<C>(s.hidden, stride, s.expands ? affine_scale(s.weight_scale, s.in) : 1);
  const auto shift = channel_values<C>(s.hidden, stride, 1);
  const auto taps = depthwise.depthwise(k.group_width, stride);
  m.run(k, what, s.has_affine ? scale.data() : nullptr, s.has_affine ? shift.data() : nullptr, taps.data(),
        nullptr, nullptr);
  m.check_padding(what);
  std::vector<Bounded> expanded(s.pixels());
  for (int64_t c = 0; c < s.hidden; ++c) {
    for (int64_t p = 0; p < s.pixels(); ++p) {
      expanded[p] = m.expanded(p, c);
      if (s.has_affine) expanded[p] = activate<T>(s.activation, affine<T>(expanded[p], scale[c], shift[c]));
    }
    std::vector<Bounded> of_slab;
    s.for_outputs(
        [&](int64_t image, int64_t y, int64_t x) {
          Sum<T> sum;
          s.for_taps(image, y, x,
                     [&](int64_t pixel, int64_t tap) { sum.add(expanded[pixel], depthwise(c, tap)); });
          of_slab.push_back(sum.result());
          const int64_t index = m.layout.index(image, y * s.out_width() + x, c);
          check(what, at({image, y, x, c}), m.output[index], stored<T>(of_slab.back()));
        },
        [&](int64_t slab) {
          if (!s.by_slab) check_partials<T>(what, m.partials.data() + slab * 3 * stride, stride, c, of_slab);
          of_slab.clear();
        });
  }
  ++cases;
}

}  // namespace reference
