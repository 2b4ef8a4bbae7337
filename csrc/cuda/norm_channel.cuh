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
  // mean, variance: not multiplied.
  __device__ __forceinline__ void write(double mean, double variance, float eps, int activation, int c,
                                        int channels, float* affine, float* keep) const {
    const int row = row_channels(channels);
    if (c >= channels) {
      affine[c] = affine[row + c] = affine[2 * row + c] = 0.f;
      if (keep) keep[c] = keep[row + c] = 0.f;
      return;
    }
    if (variance < 0) variance = 0;
    const double slope = gamma / sqrt(variance + eps);
    affine[c] = static_cast<float>(factor * slope * (1.f / stored));
    affine[row + c] = static_cast<float>(factor * (beta - mean * slope));
    affine[2 * row + c] = activation == kRelu6    ? 6.f * factor
                          : activation == kHswish ? 1.f / (6.f * factor)
                          : activation == kSilu   ? 1.f / factor
                                                  : 0.f;
    if (keep) {
      keep[c] = static_cast<float>(mean);
      keep[row + c] = static_cast<float>(variance);
    }
  }
};

}  // namespace greedynas::cuda
