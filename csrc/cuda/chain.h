// Evaluation of many paths of a supernet chain on a GPU: kernels are launched on a stream, in the order of
// the path plan, and nothing waits for them. Memory is the caller's.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "chain_source.h"
#include "kernels.h"

namespace greedynas::cuda {

enum class Precision { kFloat32, kBFloat16, kHalf };  // of maps

struct Batch {
  const float* images;
  int64_t count, height, width;
  int64_t strides[4];      // of image, channel, row, column, in elements
  const int64_t* targets;  // null with kCapture
  double label_smoothing;
  float* image_losses;  // written [leaves][count]; leaves in the order of their nodes
  int64_t* correct;     // written [leaves]
  int* status;          // set to 1 where a target is not in [0, classes)
};

class ChainEvaluation {
 public:
  virtual ~ChainEvaluation() = default;

  // Of the packed weights, and of the statistics that kCapture keeps for kConstants.
  virtual int64_t packed_bytes() const = 0;
  // Into `memory`, which evaluations read. Later changes of the weights need another call.
  virtual void pack(void* memory, Stream stream) = 0;

  // Of activations and everything beside them, packed_bytes() excluded, for a batch of that size.
  virtual int64_t needed_bytes(const std::vector<PathStep>& steps, int64_t count, int64_t height,
                               int64_t width, Statistics statistics) const = 0;

  virtual void start(const std::vector<PathStep>& steps, const Batch& batch, Statistics statistics,
                     void* memory, Stream stream) = 0;

  // Of what comes next: 0 for the stem, 1 + layer, then one for the head and one for the loss; -1 when
  // nothing is left.
  virtual int64_t next_stage() const = 0;

  // Launches what comes next. Returns its stage, or -1 when nothing was left.
  virtual int64_t advance() = 0;

  virtual const char* kernels() const = 0;
};

std::unique_ptr<ChainEvaluation> make_chain_evaluation(const ChainSource& source, Precision precision);

}  // namespace greedynas::cuda
