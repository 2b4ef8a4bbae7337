// Rows of outputs of the depthwise convolution in half precision: a vector is a group's 32 channels of one
// pixel. Where rows are short, two of them are computed at once: an input is loaded once for both.

struct HalfRows {
  const Half* const*
      inputs;  // rows of the ring that the first row of outputs sees, and stride more for the second
  int64_t first_input, last_input;  // those that lie inside the image
  const Half* weight;               // [kernel * kernel][32]
  Half* outputs[2];                 // [columns][32]
  int64_t columns;
  HalfSums* sums;  // or null
  bool streams;    // past the cache
};

// One row of inputs times the weights of the rows of outputs that see it: bit r of kMask is row r's.
template <int kKernel, int kStride, int kColumns, int kMask>
INLINE void add_input_row(const Half* in, const Half* weight, int64_t input, Halves (&sums)[2][kColumns]) {
  Halves w[2][kKernel];
  UNROLL
  for (int x = 0; x < kKernel; ++x) {
    if (kMask & 1) w[0][x] = load_halves(weight + (input * kKernel + x) * kHalfLanes);
    if (kMask & 2) w[1][x] = load_halves(weight + ((input - kStride) * kKernel + x) * kHalfLanes);
  }
  _Pragma("GCC unroll 40") for (int i = 0; i < (kColumns - 1) * kStride + kKernel; ++i) {
    const Halves value = load_halves(in + i * kHalfLanes);
    UNROLL
    for (int x = 0; x < kKernel; ++x) {
      if (i - x < 0 || (i - x) % kStride != 0 || (i - x) / kStride >= kColumns) continue;
      const int c = (i - x) / kStride;
      if (kMask & 1) sums[0][c] = _mm512_fmadd_ph(value, w[0][x], sums[0][c]);
      if (kMask & 2) sums[1][c] = _mm512_fmadd_ph(value, w[1][x], sums[1][c]);
    }
  }
}

// A tile of outputs, of which `columns` lie inside the rows.
template <int kRows, int kColumns>
INLINE void store_tile(const HalfRows& d, int64_t column, int64_t columns, const Halves (&out)[2][kColumns]) {
  // What is measured is read again at once.
  const bool streams = d.streams && !(d.sums && d.sums->measures());
  UNROLL
  for (int r = 0; r < kRows; ++r) {
    Half* output = d.outputs[r] + column * kHalfLanes;
    UNROLL
    for (int c = 0; c < kColumns; ++c) {
      if (c >= columns) break;
      if (streams) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(output + c * kHalfLanes),
                            _mm512_castph_si512(out[r][c]));
      } else {
        _mm512_store_ph(output + c * kHalfLanes, out[r][c]);
      }
    }
  }
  const Half* const stored[2] = {d.outputs[0] + column * kHalfLanes, d.outputs[1] + column * kHalfLanes};
  if (d.sums) d.sums->add<kRows>(out, stored, columns);
}

template <int kKernel, int kStride, int kColumns, int kRows>
void half_depthwise_rows(const HalfRows& d) {
  for (int64_t column = 0; column < d.columns; column += kColumns) {
    Halves out[2][kColumns];
    UNROLL
    for (int c = 0; c < kColumns; ++c) out[0][c] = out[1][c] = _mm512_setzero_ph();
    const int64_t offset = column * kStride * kHalfLanes;
    int64_t y = d.first_input;
    if constexpr (kRows == 1) {
      for (; y < d.last_input; ++y)
        add_input_row<kKernel, kStride, kColumns, 1>(d.inputs[y] + offset, d.weight, y, out);
    } else {
      for (; y < std::min<int64_t>(kStride, d.last_input); ++y)
        add_input_row<kKernel, kStride, kColumns, 1>(d.inputs[y] + offset, d.weight, y, out);
      for (; y < std::min<int64_t>(kKernel, d.last_input); ++y)
        add_input_row<kKernel, kStride, kColumns, 3>(d.inputs[y] + offset, d.weight, y, out);
      for (; y < d.last_input; ++y)
        add_input_row<kKernel, kStride, kColumns, 2>(d.inputs[y] + offset, d.weight, y, out);
    }
    if (column + kColumns <= d.columns) {
      store_tile<kRows, kColumns>(d, column, kColumns, out);
    } else {
      store_tile<kRows, kColumns>(d, column, d.columns - column, out);
    }
  }
}

struct HalfRowKernels {
  void (*one)(const HalfRows&);
  void (*two)(const HalfRows&);  // two rows at once; null where one at a time is as fast
  int64_t columns;               // computed at once
};

// The fewest columns computed in vain; else the widest tiles. Wide ones take one row: fewer weights are in
// registers.
template <int kKernel, int kStride>
HalfRowKernels choose_half_columns(int64_t out_width) {
  HalfRowKernels best{&half_depthwise_rows<kKernel, kStride, 4, 1>,
                      &half_depthwise_rows<kKernel, kStride, 4, 2>, 4};
  const auto consider = [&](void (*one)(const HalfRows&), void (*two)(const HalfRows&), int64_t columns) {
    if (ceil_div(out_width, columns) * columns <= ceil_div(out_width, best.columns) * best.columns)
      best = {one, two, columns};
  };
  consider(&half_depthwise_rows<kKernel, kStride, 7, 1>, &half_depthwise_rows<kKernel, kStride, 7, 2>, 7);
  consider(&half_depthwise_rows<kKernel, kStride, 8, 1>, &half_depthwise_rows<kKernel, kStride, 8, 2>, 8);
  consider(&half_depthwise_rows<kKernel, kStride, 14, 1>, nullptr, 14);
  consider(&half_depthwise_rows<kKernel, kStride, 16, 1>, nullptr, 16);
  return best;
}

inline HalfRowKernels choose_half_rows(int64_t kernel, int64_t stride, int64_t out_width) {
  if (stride == 1 && kernel == 3) return choose_half_columns<3, 1>(out_width);
  if (stride == 1 && kernel == 5) return choose_half_columns<5, 1>(out_width);
  if (stride == 1 && kernel == 7) return choose_half_columns<7, 1>(out_width);
  if (stride == 2 && kernel == 3) return choose_half_columns<3, 2>(out_width);
  if (stride == 2 && kernel == 5) return choose_half_columns<5, 2>(out_width);
  return choose_half_columns<7, 2>(out_width);
}
