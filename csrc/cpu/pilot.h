// Near which values the second moments of a map are taken, so that nothing cancels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <span>

#include "block_kernels.h"
#include "channel_memory.h"
#include "weights.h"

namespace greedynas::cpu {

inline constexpr int64_t kPilotPixels = 64;  // that a pilot is the mean of, at most

template <typename C>
C value_of(C x) {
  return x;
}
inline float value_of_bfloat16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float value_of(BFloat16 x) { return value_of_bfloat16(x.bits); }
inline float value_of(TiledBFloat16 x) { return value_of_bfloat16(x.bits); }

// Tiles multiply bfloat16. Of values whose mean is less than a few deviations from 0 nothing cancels, and
// they stay as they are; the distance of others from a pilot is mostly a bfloat16, if that is one.
template <typename T>
void keep_far_pilots(std::span<const T> values, int64_t samples, std::span<Compute<T>> pilot) {
  using C = Compute<T>;
  const auto stride = static_cast<int64_t>(pilot.size());
  for (int64_t c = 0; c < stride; ++c) {
    C variance = 0;
    for (int64_t i = 0; i < samples; ++i) {
      const C distance = value_of(values[i * stride + c]) - pilot[c];
      variance += distance * distance / static_cast<C>(samples);
    }
    const bool far = pilot[c] * pilot[c] > 64 * variance;
    pilot[c] = far ? value_of(round_to(pilot[c], static_cast<T*>(nullptr))) : C(0);
  }
}

// The mean of some pixels all over a map that `f` is to finish; kTiled kernels get it only where they need
// it.
template <typename T>
std::span<const Compute<T>> pilot_of(const Kernels<T>& kernels, const FinishMap<T>& f,
                                     ChannelMemory& memory) {
  using C = Compute<T>;
  const int64_t stride = row_channels<T>(f.channels), samples = std::min(f.pixels, kPilotPixels);
  FinishMap<T> sample = f;
  const auto rows = [&] { return memory.take<T>(samples * stride); };
  const std::span<T> raw = rows(), out = rows(), residual = rows();
  for (int64_t i = 0; i < samples; ++i) {
    const int64_t row = i * f.pixels / samples * stride;
    std::copy_n(f.raw + row, stride, raw.data() + i * stride);
    if (f.residual) std::copy_n(f.residual + row, stride, residual.data() + i * stride);
  }
  sample.raw = raw.data();
  sample.output = out.data();
  sample.pixels = samples;
  sample.residual = f.residual ? residual.data() : nullptr;
  sample.pilot = nullptr;
  kernels.finish(sample, 0, 1, nullptr, nullptr);
  const std::span<const T> values = f.scale ? out : raw;
  const std::span<C> pilot = memory.take<C>(stride);
  for (int64_t i = 0; i < samples; ++i) {
    for (int64_t c = 0; c < stride; ++c) pilot[c] += value_of(values[i * stride + c]);
  }
  for (C& mean : pilot) {
    mean /= static_cast<C>(samples);
    if (!(mean - mean == C(0))) mean = C(0);  // what is not finite shows in the products
  }
  if constexpr (kTiled<T>) keep_far_pilots<T>(values, samples, pilot);
  return pilot;
}

}  // namespace greedynas::cpu
