// Evaluation of many paths of a supernet chain (stem, layers of alternative operations, head), driven over
// the path plan: every node of the plan is one operation on its parent's output, every leaf ends in a head
// and a loss.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "chain_source.h"
#include "parallel.h"
#include "stage_parts.h"

namespace greedynas::cpu {

enum class Precision { kFloat64, kFloat32, kBFloat16 };

struct Batch {
  const void* images;  // float, or double with kFloat64
  int64_t count, height, width;
  int64_t strides[4];      // of image, channel, row, column, in elements
  const int64_t* targets;  // in [0, classes); null with kCapture
  double label_smoothing;
  void* image_losses;  // [leaves][count], of the images' type; leaves in the order of their nodes
  int64_t* correct;    // [leaves]
  int64_t threads;     // that work at once, at most
};

struct StageTime {
  double seconds;
  int64_t calls;
  int64_t bytes;  // of outputs
  PartSeconds parts;
};

class ChainEvaluation {
 public:
  virtual ~ChainEvaluation() = default;

  // Copies the weights into the kernels' order. Later changes of the weights need another call.
  virtual void pack(const ParallelFor& parallel_for) = 0;

  // Bytes of activations and everything beside them, weights excluded, for a batch of that size.
  virtual int64_t needed_bytes(const std::vector<PathStep>& steps, int64_t count, int64_t height,
                               int64_t width, Statistics statistics, int64_t threads) const = 0;

  // Where steps, sizes, statistics and number of threads are those of the last time, this and what `advance`
  // does then allocate nothing, once each thread has worked before.
  virtual void start(const std::vector<PathStep>& steps, const Batch& batch, Statistics statistics) = 0;

  // Works for about that long. Returns whether all is done.
  virtual bool advance(double seconds, const ParallelFor& parallel_for) = 0;

  // Of the stem, each layer, the head and the loss, since the evaluation was made.
  virtual const std::vector<StageTime>& times() const = 0;

  virtual const char* kernels() const = 0;
};

// Throws std::invalid_argument for GREEDYNAS_CPU_CAPABILITY (capability.h). kBFloat16 computes in float where
// there are no bf16 products.
std::unique_ptr<ChainEvaluation> make_chain_evaluation(const ChainSource& source, Precision precision);

}  // namespace greedynas::cpu
