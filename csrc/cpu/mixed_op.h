// The choice block for P nodes at once, each running its one chosen operation on its chosen input.
#pragma once

#include <array>
#include <cstdint>

#include "choice_block.h"
#include "parallel.h"

namespace greedynas::cpu {

template <typename T>  // float or double
struct MixedOp {
  const T* inputs;  // [B, images, height, width, channels], dense
  int64_t images, height, width, channels;
  const int64_t* input_index;  // [nodes]
  const int64_t* op_index;     // [nodes]
  int64_t nodes;
  const T* weights;
  const ChoiceOperation* operations;  // [operations_count]
  int64_t operations_count;
  const std::array<double, kBatchNormStages>* bn_eps;  // one per operation
  const T* statistics;  // [nodes, statistics_width], or null: those of the batch
  int64_t statistics_width;
  T* outputs;          // [nodes, images, out_height, out_width, out_channels]
  T* used_statistics;  // [nodes, statistics_width]; what an operation has no use for is 0
  int64_t threads;     // that work at once, at most
};

template <typename T>
void mixed_op(const MixedOp<T>& arguments, const ParallelFor& parallel_for);

}  // namespace greedynas::cpu
