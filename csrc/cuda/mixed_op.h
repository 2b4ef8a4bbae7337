// One choice block on a GPU for many nodes at once, of which each runs an operation on an input. Kernels are
// launched on a stream, and nothing waits for them. Memory is the caller's.
#pragma once

#include <cstdint>
#include <vector>

#include "block_runner.h"

namespace greedynas::cuda {

struct MixedOpNode {
  int64_t input, op;  // their numbers
  int64_t place;      // of its output, and of its rows of statistics
};

struct MixedOpBlock {
  std::vector<ChoiceOperation> operations;
  std::vector<double> bn_eps;  // kBatchNormStages of each operation
  const float* weights;
};

// What a run reads and writes; all of it begins at multiples of 16 bytes.
struct MixedOpTensors {
  const float* inputs;       // [B][images][height][width][row_channels(in)], the padding zero
  float* outputs;            // written [P][images][out height][out width][row_channels(out)]
  const float* statistics;   // [P][statistics_width] where they are known, or null
  float* used_statistics;    // [P][statistics_width]; columns that an operation does not use stay as they are
  int64_t statistics_width;  // S (choice_block.h)
};

class MixedOp {
 public:
  // `nodes`: at least one, none of an identity. `known`: whether statistics will be given.
  MixedOp(const MixedOpBlock& block, std::vector<MixedOpNode> nodes, int64_t images, int64_t height,
          int64_t width, bool known);

  // Of packed weights and of what operations work in.
  int64_t bytes() const { return bytes_; }

  // `memory` begins at a multiple of 16 bytes.
  void run(const MixedOpTensors& tensors, void* memory, Stream stream);

 private:
  struct Measured {
    int64_t input, moments;  // the offset of its moments
  };

  FeatureMap<float> input_map(int64_t input, const MixedOpTensors& tensors, char* memory) const;
  BlockWork<float> work_of(const MixedOpNode& node, const MixedOpTensors& tensors, char* memory,
                           int64_t& end) const;

  std::vector<ChoiceOperation> operations_;
  std::vector<MixedOpNode> nodes_;
  std::vector<int64_t> packed_of_;  // where an operation is in packed_; those that no node runs are not
  PackedChain<float> packed_;
  int64_t images_;
  Shape in_, out_;
  std::vector<std::vector<int32_t>> groups_;
  std::vector<Measured> measured_;  // inputs whose moments are needed
  int64_t workspace_ = 0, bytes_ = 0;
};

}  // namespace greedynas::cuda
