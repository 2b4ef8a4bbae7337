// The activations of a choice block, as torch computes them, NaN passing through.
#pragma once

#include <cmath>

#include "choice_block.h"
#include "instruction_set.h"

namespace greedynas::cpu {

template <typename T>
GREEDYNAS_INLINE T clamp_to_six(T x) {
  const T positive = x < T(0) ? T(0) : x;  // written so that NaN stays, unlike with std::max
  return positive > T(6) ? T(6) : positive;
}

template <Activation kActivation, typename T>
GREEDYNAS_INLINE T activate(T x) {
  if constexpr (kActivation == kRelu) return x < T(0) ? T(0) : x;
  if constexpr (kActivation == kRelu6) return clamp_to_six(x);
  if constexpr (kActivation == kHswish) return x * clamp_to_six(x + T(3)) / T(6);
  if constexpr (kActivation == kSilu) return x / (T(1) + std::exp(-x));
  return x;
}

template <typename T>
T gate(int64_t kind, T x) {
  return kind == kSigmoid ? T(1) / (T(1) + std::exp(-x)) : clamp_to_six(x + T(3)) / T(6);
}

}  // namespace greedynas::cpu
