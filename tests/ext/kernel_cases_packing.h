// What kTiled kernels have for packing weights: to_halves, pack_tiles and largest_of_rows.
#pragma once

#include <algorithm>

#include "kernel_halves.h"

namespace reference {

// Random numbers of all magnitudes, and those at the edges of half precision's range and half way between
// two.
inline void to_halves_case(const Kernels<TiledBFloat16>& k, int64_t count) {
  const std::string what = std::string(k.name) + " to_halves " + at({count});
  Lines<float> values(count);
  for (int64_t i = 0; i < count; ++i) {
    values[i] = static_cast<float>(std::ldexp(normal(), static_cast<int>(whole(-30, 18))));
    if (i % 3 == 1)
      values[i] = static_cast<float>(std::ldexp(2 * whole(0, 2048) + 1, static_cast<int>(whole(-25, 6))));
    if (i % 3 == 2) {
      values[i] =
          pick<float>({0, -0.f, 65504, 65519.99f, 65520, -65520, 0x1p-14f, 0x1p-24f, 0x1p-25f,
                       std::nextafter(0x1p-25f, 1.f), -0x1.8p-24f, INFINITY, -INFINITY, NAN, 1e-40f, 1e30f});
    }
  }
  Output<Half> output(count);
  k.to_halves(values.data(), count, reinterpret_cast<uint16_t*>(output.data()));
  output.check_guard(what);
  for (int64_t i = 0; i < count; ++i) {
    const Half expected = rounded<Half>(values[i]);
    check(what, at({i}), output[i], {value_of(expected), 0});
    if (!std::isnan(values[i]) && output.data()[i].bits != expected.bits)
      fail(what + ": a sign at " + at({i}));
  }
  ++cases;
}

struct PackingCase {
  int64_t rows, columns, gap;
  bool row_factors, column_factors;
};

inline void packing_case(const Kernels<TiledBFloat16>& k, const PackingCase& s) {
  const std::string at_case = at({s.rows, s.columns, s.gap, s.row_factors, s.column_factors});
  const int64_t row_stride = s.columns + s.gap;
  Lines<float> weight(s.rows * row_stride, NAN);
  std::vector<float> row_factor(s.rows), column_factor(s.columns);
  const auto power = [] { return std::ldexp(1.f, static_cast<int>(whole(-9, 9))); };
  for (float& x : row_factor) x = s.row_factors ? power() : 1;
  for (float& x : column_factor) x = s.column_factors ? power() : 1;
  const float all = pick({1.f, 0x1p96f});
  Matrix<TiledBFloat16> expected(s.rows, s.columns, 1);
  std::vector<float> most(s.rows, 0);
  for (int64_t r = 0; r < s.rows; ++r) {
    for (int64_t c = 0; c < s.columns; ++c) {
      float& x = weight[r * row_stride + c];
      x = static_cast<float>(normal());
      if (engine() % 10 == 0) x = pick<float>({0, -0.f, 1e-20f, 1e6f, INFINITY, -INFINITY, NAN});
      if (r % 5 == 4) x = pick<float>({0, INFINITY, NAN});
      expected.set(r, c, x * row_factor[r] * column_factor[c] * all);
      const float magnitude = std::abs(x * column_factor[c]);
      if (std::isfinite(magnitude)) most[r] = std::max(most[r], magnitude);
    }
  }
  const TilePacking packing{weight.data(),
                            s.rows,
                            s.columns,
                            row_stride,
                            s.row_factors ? row_factor.data() : nullptr,
                            s.column_factors ? column_factor.data() : nullptr,
                            all};
  const auto packed = expected.pointwise(k.group_width, k.depth_multiple);
  const auto size = static_cast<int64_t>(packed.size());
  Output<TiledBFloat16> output(size);
  k.pack_tiles(packing, output.data());
  output.check_guard("pack_tiles " + at_case);
  for (int64_t i = 0; i < size; ++i)
    check("pack_tiles " + at_case, at({i}), output[i], {value_of(packed[i]), 0});
  Output<float> largest(s.rows);
  k.largest_of_rows(packing, largest.data());
  largest.check_guard("largest_of_rows " + at_case);
  for (int64_t r = 0; r < s.rows; ++r) check("largest_of_rows " + at_case, at({r}), largest[r], {most[r], 0});
  ++cases;
}

}  // namespace reference
