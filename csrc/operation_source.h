// One operation as it is given to the engine.
#pragma once

#include <cstdint>

#include "choice_block.h"

namespace greedynas {

// Of a unit (unit_source.h), beside the Kinds: maxima or means over windows of kernel x kernel pixels, padded
// by kernel / 2, [BN,] act. A mean is over the pixels that there are, or over all with the padding for zeros.
inline constexpr int64_t kPool = 3;
enum Pooling : int64_t { kNoPooling = 0, kMaximum = 1, kMean = 2, kMeanWithPadding = 3 };

// Weights where they are, on the device that is to use them: float, or double where kernels compute in it.
struct BatchNormSource {
  const void *gamma = nullptr, *beta = nullptr;     // null: 1 and 0
  const void *mean = nullptr, *variance = nullptr;  // of the running statistics; null where there are none
  double eps = 0;
};

struct OperationSource {
  int64_t kind = kIdentity;  // Kind or kPool; of the stem's convolution and the head kConvBn
  int64_t in_channels = 0, hidden_channels = 0, out_channels = 0;
  int64_t kernel = 1, stride = 1;
  // After expand, or of the output of a kConvBn or kPool; after the depthwise convolution; after project.
  int64_t activation = kLinear, depthwise_activation = kLinear, project_activation = kLinear;
  int64_t se_channels = 0, se_gate = kHsigmoid;
  int64_t residual = 0;
  int64_t pooling = kNoPooling;  // of a kPool
  // Stages without a BatchNorm, as bits: in units kDepthwiseBn, and kProjectBn, which a kPool's output is of.
  int64_t unnormalised = 0;
  // Contiguous as [out, in] and [hidden, kernel, kernel], or, where channels_fastest, as choice_block.h packs
  // them.
  bool channels_fastest = false;
  const void* expand = nullptr;     // [hidden, in]
  const void* depthwise = nullptr;  // [hidden, kernel, kernel]
  const void *se_reduce_weight = nullptr, *se_reduce_bias = nullptr;
  const void *se_expand_weight = nullptr, *se_expand_bias = nullptr;
  const void* project = nullptr;  // [out, hidden]; of kConvBn [out, in, kernel, kernel]
  BatchNormSource batch_norms[kBatchNormStages];

  bool normalises(int64_t stage) const {
    const bool stages[kBatchNormStages] = {expand != nullptr, depthwise != nullptr,
                                           project != nullptr || kind == kPool};
    return stages[stage] && !(unnormalised >> stage & 1);
  }

  // A depthwise convolution that no BatchNorm follows, and the 1x1 convolution after it.
  bool is_separable() const { return depthwise != nullptr && !normalises(kDepthwiseBn); }

  // Inputs of each output of `project`.
  int64_t depth() const { return kind == kConvBn ? in_channels * kernel * kernel : hidden_channels; }
};

// Of an operation of a packed choice block, whose weights are of type T. `eps`: of its BatchNorms.
template <typename T>
OperationSource packed_source(const ChoiceOperation& o, const double* eps, const T* weights) {
  const auto at = [&](int64_t offset) -> const void* { return offset == kNone ? nullptr : weights + offset; };
  OperationSource s;
  s.channels_fastest = true;
  s.kind = o.kind;
  s.in_channels = o.in_channels;
  s.hidden_channels = o.hidden_channels;
  s.out_channels = o.out_channels;
  s.kernel = o.kernel;
  s.stride = o.stride;
  s.activation = o.activation;
  s.depthwise_activation = o.depthwise_activation;
  s.project_activation = o.project_activation;
  s.se_channels = o.se_channels;
  s.se_gate = o.se_gate;
  s.residual = o.residual;
  s.expand = at(o.expand_weight);
  s.depthwise = at(o.depthwise_weight);
  s.project = at(o.project_weight);
  s.se_reduce_weight = at(o.se_reduce_weight);
  s.se_reduce_bias = at(o.se_reduce_bias);
  s.se_expand_weight = at(o.se_expand_weight);
  s.se_expand_bias = at(o.se_expand_bias);
  const int64_t norms[] = {o.expand_bn, o.depthwise_bn, o.project_bn};
  for (int stage = 0; stage < kBatchNormStages; ++stage) {
    if (norms[stage] == kNone) continue;
    const int64_t channels = stage == kProjectBn ? o.out_channels : o.hidden_channels;
    s.batch_norms[stage] = {at(norms[stage]), at(norms[stage] + padded(channels)), nullptr, nullptr,
                            eps[stage]};
  }
  return s;
}

}  // namespace greedynas
