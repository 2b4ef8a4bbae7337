// One choice block on a GPU for many nodes at once, of which each runs an operation on an input. Kernels are
// launched on a stream, and nothing waits for them. Memory is the caller's.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "chain.h"
#include "choice_block.h"

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

// What a run reads and writes; all of it begins at multiples of 16 bytes. Maps are of the precision's type.
struct MixedOpTensors {
  const void* inputs;        // [B][images][height][width][row_channels(in)], the padding zero
  void* outputs;             // written [P][images][out height][out width][row_channels(out)]
  const float* statistics;   // [P][statistics_width] where they are known, or null
  float* used_statistics;    // [P][statistics_width]; columns that an operation does not use stay as they are
  int64_t statistics_width;  // S (choice_block.h)
};

class MixedOp {
 public:
  virtual ~MixedOp() = default;

  // Of packed weights and of what operations work in.
  virtual int64_t bytes() const = 0;

  // `memory` begins at a multiple of 16 bytes.
  virtual void run(const MixedOpTensors& tensors, void* memory, Stream stream) = 0;
};

// `nodes`: at least one, none of an identity. `known`: whether statistics will be given.
std::unique_ptr<MixedOp> make_mixed_op(const MixedOpBlock& block, std::vector<MixedOpNode> nodes,
                                       int64_t images, int64_t height, int64_t width, bool known,
                                       Precision precision);

}  // namespace greedynas::cuda
