// pool: maxima or means over windows of a map. As torch has it, a maximum with NaN in its window is NaN.

template <Pooling kPooling, typename C>
INLINE Vec<C> pooled_with(Vec<C> value, Vec<C> next) {
  if constexpr (kPooling != kMaximum) return value + next;
  const Vec<C> larger = next > value ? next : value;
  return next != next ? next : larger;
}

// Pixels [begin, end) of the output, and their sums (block_kernels.h) unless `sums` is null.
template <Pooling kPooling, typename T>
void pool_pixels(const Pool<T>& p, int64_t begin, int64_t end, Compute<T>* sums) {
  using C = Compute<T>;
  const int64_t stride = row_channels<T>(p.channels), padding = p.kernel / 2;
  const int64_t out_height = ceil_div(p.height, p.stride), out_width = ceil_div(p.width, p.stride);
  for (int64_t pixel = begin; pixel < end; ++pixel) {
    const int64_t row = pixel / out_width, image = row / out_height;
    const int64_t first_row = row % out_height * p.stride - padding;
    const int64_t first_column = pixel % out_width * p.stride - padding;
    const int64_t top = std::max<int64_t>(first_row, 0), bottom = std::min(first_row + p.kernel, p.height);
    const int64_t left = std::max<int64_t>(first_column, 0);
    const int64_t right = std::min(first_column + p.kernel, p.width);
    const T* source = p.input + (image * p.height * p.width + left) * stride;
    [[maybe_unused]] const C count =
        static_cast<C>(kPooling == kMean ? (bottom - top) * (right - left) : p.kernel * p.kernel);
    for (int64_t channel = 0; channel < stride; channel += kVectorLanes<C>) {
      const T* column = source + channel;
      Vec<C> value = kPooling == kMaximum ? load_values<T>(column + top * p.width * stride) : Vec<C>{};
      for (int64_t y = top; y < bottom; ++y) {
        const T* from = column + y * p.width * stride;
        for (int64_t x = left; x < right; ++x, from += stride)
          value = pooled_with<kPooling, C>(value, load_values<T>(from));
      }
      if constexpr (kPooling != kMaximum) value /= count;
      store_values<T>(p.output + pixel * stride + channel, value);
      if (!sums) continue;
      if (pixel == begin) store<C>(sums + channel, value);
      const Vec<C> distance = value - load<C>(sums + channel);
      store<C>(sums + stride + channel, load<C>(sums + stride + channel) + distance);
      store<C>(sums + 2 * stride + channel, load<C>(sums + 2 * stride + channel) + distance * distance);
    }
  }
}

template <typename T>
void pool(const Pool<T>& p, int64_t first_block, int64_t last_block) {
  using C = Compute<T>;
  const int64_t stride = row_channels<T>(p.channels);
  const int64_t pixels = p.images * ceil_div(p.height, p.stride) * ceil_div(p.width, p.stride);
  thread_local Scratch<C> sums_memory;
  C* sums = p.partials ? sums_memory.get(3 * stride) : nullptr;
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t begin = block * kBlockPixels, end = std::min(begin + kBlockPixels, pixels);
    if (sums) std::fill_n(sums, 3 * stride, C(0));
    if (p.pooling == kMaximum) {
      pool_pixels<kMaximum>(p, begin, end, sums);
    } else if (p.pooling == kMean) {
      pool_pixels<kMean>(p, begin, end, sums);
    } else {
      pool_pixels<kMeanWithPadding>(p, begin, end, sums);
    }
    if (!sums) continue;
    double* partial = p.partials + block * 3 * stride;
    for (int64_t c = 0; c < 3 * stride; ++c) partial[c] = static_cast<double>(sums[c]);
  }
}
