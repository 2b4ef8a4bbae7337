// A chain as it is given to the engines of every device: a stem, layers of alternative operations, a head,
// and the nodes of the path plan that are to be evaluated.
#pragma once

#include <cstdint>
#include <vector>

#include "operation_source.h"
#include "path_plan.h"

namespace greedynas {

struct ChainSource {
  OperationSource stem;
  std::vector<OperationSource> stem_blocks;
  std::vector<OperationSource> operations;  // those in use
  std::vector<PathNode> nodes;              // `op` indexes operations; parents before children
  OperationSource head;
  const void* classifier_weight = nullptr;  // [classes, head.out_channels]
  const void* classifier_bias = nullptr;    // or null
  int64_t classes = 0;
};

// Which statistics BatchNorm uses.
enum class Statistics {
  kBatch,
  kCapture,   // as kBatch, and kept for kConstants
  kRunning,   // stored with the weights
  kConstants  // captured before
};

}  // namespace greedynas
