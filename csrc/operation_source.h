// One operation as it is given to the engine.
#pragma once

#include <cstdint>

#include "choice_block.h"

namespace greedynas {

// Weights where they are, on the device that is to use them: float, or double where kernels compute in it.
struct BatchNormSource {
  const void *gamma = nullptr, *beta = nullptr;     // null: 1 and 0
  const void *mean = nullptr, *variance = nullptr;  // of the running statistics; null where there are none
  double eps = 0;
};

struct OperationSource {
  int64_t kind = kIdentity;  // Kind; of the stem's convolution and the head kConvBn
  int64_t in_channels = 0, hidden_channels = 0, out_channels = 0;
  int64_t kernel = 1, stride = 1;
  // After expand, or of a kConvBn's output; after the depthwise convolution; after project.
  int64_t activation = kLinear, depthwise_activation = kLinear, project_activation = kLinear;
  int64_t se_channels = 0, se_gate = kHsigmoid;
  int64_t residual = 0;
  // Contiguous as [out, in] and [hidden, kernel, kernel], or, where channels_fastest, as choice_block.h packs
  // them.
  bool channels_fastest = false;
  const void* expand = nullptr;     // [hidden, in]
  const void* depthwise = nullptr;  // [hidden, kernel, kernel]
  const void *se_reduce_weight = nullptr, *se_reduce_bias = nullptr;
  const void *se_expand_weight = nullptr, *se_expand_bias = nullptr;
  const void* project = nullptr;  // [out, hidden]; of kConvBn [out, in, kernel, kernel]
  BatchNormSource batch_norms[kBatchNormStages];

  // Inputs of each output of `project`.
  int64_t depth() const { return kind == kConvBn ? in_channels * kernel * kernel : hidden_channels; }
};

}  // namespace greedynas
