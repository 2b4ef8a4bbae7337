// expand_depthwise in half precision, of kTiled kernels.
#pragma once

#include <algorithm>

#include "kernel_cases_depthwise.h"
#include "kernel_halves.h"

namespace reference {

// kWhole: whole numbers, small enough that no kernel rounds anything; a term too many, too few or misplaced
// shows as such. kUneven: much smaller in one part of the pixels, the first or the last ones. kNotFinite:
// random with NaN and infinities among the inputs.
enum class Values { kRandom, kWhole, kUneven, kNotFinite };

// A power of two that brings a channel's root mean square below 2^-2, mostly not far; 1 where it is 0.
inline float half_factor(Real root_mean_square) {
  if (!(root_mean_square > 0 && std::isfinite(root_mean_square))) return 1;
  const auto exponent = static_cast<int>(std::floor(std::log2(root_mean_square))) + 1;
  return std::ldexp(1.f, -2 - exponent - static_cast<int>(engine() % 8 == 0 ? engine() % 6 : 0));
}

// Depthwise weights of all channels, the largest of each in [1/2, 1), and of the scale that they had before
// that nothing is left; or, where all is whole, multiples of 1/4.
inline Matrix<Half> half_weights(int64_t channels, int64_t taps, double weight_scale, Values values) {
  Matrix<Half> result(channels, taps, 1);
  for (int64_t c = 0; c < channels; ++c) {
    std::vector<float> row(taps);
    float largest = 0;
    for (float& x : row) {
      x = static_cast<float>(values == Values::kWhole ? static_cast<double>(whole(-3, 3)) / 4
                                                      : weight_scale * normal());
      largest = std::max(largest, std::abs(x));
    }
    const int exponent = largest > 0 && values != Values::kWhole ? -1 - std::ilogb(largest) : 0;
    for (int64_t tap = 0; tap < taps; ++tap) result.set(c, tap, std::ldexp(row[tap], exponent));
  }
  return result;
}

// The affine map, activation and factor of a case.
struct HalfMap {
  std::vector<float> scale, shift, factor;

  HalfMap(const ExpandDepthwiseMemory<TiledBFloat16>& m, Values values) {
    const ExpandDepthwiseCase& s = m.s;
    const int64_t stride = m.layout.stride;
    scale = channel_values<float>(s.hidden, stride, s.expands ? affine_scale(s.weight_scale, s.in) : 1);
    shift = channel_values<float>(s.hidden, stride, 1);
    factor.assign(stride, 1);
    for (int64_t c = 0; c < s.hidden; ++c) {
      if (values == Values::kWhole) {
        scale[c] = static_cast<float>(pick({-1, 1}));
        shift[c] = static_cast<float>(whole(-3, 5));
        factor[c] = pick({0x1p-18f, 0x1p-12f, 0x1p-6f});
        continue;
      }
      // As BatchNorm does, of which the mean is taken away.
      Real mean = s.expands ? 0 : s.mean;
      for (int64_t i = 0; s.expands && i < s.in; ++i) mean += s.mean * m.weight(c, i);
      shift[c] -= static_cast<float>(mean * scale[c]);
      Real squares = 0;
      int64_t count = 0;
      for (int64_t p = 0; p < s.pixels(); ++p) {
        const Real x = mapped(m, p, c).value;
        if (!std::isfinite(x)) continue;
        squares += x * x;
        ++count;
      }
      factor[c] = half_factor(std::sqrt(squares / static_cast<Real>(std::max<int64_t>(1, count))));
    }
  }

  Bounded mapped(const ExpandDepthwiseMemory<TiledBFloat16>& m, int64_t pixel, int64_t c) const {
    return activate<TiledBFloat16>(m.s.activation,
                                   affine<TiledBFloat16>(m.expanded(pixel, c), scale[c], shift[c]));
  }
};

inline void half_depthwise_case(const Kernels<TiledBFloat16>& k, const ExpandDepthwiseCase& s,
                                Values values) {
  const std::string what = std::string(k.name) + " expand_depthwise of halves " + s.text() + " " +
                           std::to_string(static_cast<int>(values));
  ExpandDepthwiseMemory<TiledBFloat16> m(k, s);
  const bool exact = values == Values::kWhole, finite = values != Values::kNotFinite;
  if (exact) {  // sums of at most three inputs, so that 49 products of them have no more than 11 bits
    for (int64_t p = 0; p < s.pixels(); ++p) {
      for (int64_t c = 0; c < s.in_channels(); ++c) m.input.set(p, c, static_cast<double>(whole(-2, 2)));
    }
    std::fill(m.weight.values.begin(), m.weight.values.end(), TiledBFloat16{});
    for (int64_t c = 0; c < s.hidden; ++c) {
      for (int i = 0; i < 3; ++i) m.weight.set(c, whole(0, s.in_channels() - 1), pick({-1.0, 1.0}));
    }
  }
  const auto quiet = pick({0x1p-6, 0x1p-10});
  const bool quiet_first = engine() % 2 == 0;
  for (int64_t p = 0; values == Values::kUneven && p < s.pixels(); ++p) {
    if ((3 * p < s.pixels()) != quiet_first) continue;
    for (int64_t c = 0; c < s.in_channels(); ++c)
      m.input.set(p, c, quiet * static_cast<double>(m.input(p, c)));
  }
  for (int64_t i = 0; !finite && i < 2 * s.images; ++i)
    m.input.set(whole(0, s.pixels() - 1), whole(0, s.in_channels() - 1),
                pick<double>({NAN, INFINITY, -INFINITY}));
  const Matrix<Half> depthwise = half_weights(s.hidden, s.kernel * s.kernel, s.weight_scale, values);
  const HalfMap map(m, values);
  const auto taps = depthwise.depthwise(k.group_width, m.layout.stride);
  m.run(k, what, map.scale.data(), map.shift.data(), nullptr, reinterpret_cast<const uint16_t*>(taps.data()),
        map.factor.data());
  if (finite) m.check_padding(what);
  std::vector<Bounded> expanded(s.pixels());
  for (int64_t c = 0; c < s.hidden; ++c) {
    for (int64_t p = 0; p < s.pixels(); ++p) {
      const Bounded x = map.mapped(m, p, c);
      expanded[p] = {x.value * map.factor[c], x.error * map.factor[c]};
      expanded[p] = exact ? Bounded{expanded[p].value, 0} : in_half(expanded[p]);
    }
    std::vector<Real> of_slab;
    s.for_outputs(
        [&](int64_t image, int64_t y, int64_t x) {
          HalfSum sum;
          s.for_taps(image, y, x,
                     [&](int64_t pixel, int64_t tap) { sum.add(expanded[pixel], depthwise(c, tap)); });
          const Bounded expected = exact ? Bounded{sum.result().value, 0} : sum.result();
          const int64_t index = m.layout.index(image, y * s.out_width() + x, c);
          of_slab.push_back(value_of(Half{m.output.data()[index].bits}));
          check(what, at({image, y, x, c}), static_cast<double>(of_slab.back()), expected);
        },
        [&](int64_t slab) {
          if (!s.by_slab && finite)
            check_half_partials(what, m.partials.data() + slab * 3 * m.layout.stride, m.layout.stride, c,
                                of_slab);
          of_slab.clear();
        });
  }
  ++cases;
}

}  // namespace reference
