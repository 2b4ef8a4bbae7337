// One channel's BatchNorm, with which kernels end that know its mean and variance.
#pragma once

#include "choice_block.h"
#include "device.h"
#include "kernels.h"

namespace greedynas::cuda {

// What a channel's BatchNorm does, fetched before it is needed.
struct Channel {
  float gamma = 0.f, beta = 0.f, factor = 1.f;
  float stored = 1.f;  // what its values were multiplied by, a power of two

  __device__ __forceinline__ Channel(const BatchNorm& norm, const float* stored_factor, int c, int channels) {
    if (c >= channels) return;
    gamma = norm.gamma[c];
    beta = norm.beta[c];
    if (norm.factor) factor = norm.factor[c];
    if (stored_factor) stored = stored_factor[c];
  }
  // Of statistics that are not multiplied. They are rounded as they are kept: given back as known ones they
  // make the same affine map, bit for bit.
  __device__ __forceinline__ void write(double exact_mean, double exact_variance, float eps, int activation,
                                        int c, int channels, float* affine, float* keep) const {
    const int row = row_channels(channels), kept_row = static_cast<int>(padded(channels));
    if (c >= channels) {
      affine[c] = affine[row + c] = affine[2 * row + c] = 0.f;
      if (keep) keep[c] = keep[kept_row + c] = 0.f;
      return;
    }
    const auto mean = static_cast<float>(exact_mean);
    const float variance = exact_variance < 0 ? 0.f : static_cast<float>(exact_variance);
    const double slope = gamma / sqrt(static_cast<double>(variance) + eps);
    affine[c] = static_cast<float>(factor * slope * (1.f / stored));
    affine[row + c] =
        static_cast<float>(factor * fma(-static_cast<double>(mean), slope, static_cast<double>(beta)));
    affine[2 * row + c] = activation == kRelu6    ? 6.f * factor
                          : activation == kHswish ? 1.f / (6.f * factor)
                          : activation == kSilu   ? 1.f / factor
                                                  : 0.f;
    if (keep) {
      keep[c] = mean;
      keep[kept_row + c] = variance;
    }
  }
};

}  // namespace greedynas::cuda
