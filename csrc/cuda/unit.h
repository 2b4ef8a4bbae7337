// Evaluation of one unit (unit_source.h) on a batch of images on a GPU. Kernels are launched on a stream, and
// nothing waits for them. Memory is the caller's, and begins at multiples of 16 bytes.
#pragma once

#include <cstdint>
#include <memory>

#include "chain.h"
#include "kernels.h"
#include "unit_source.h"

namespace greedynas::cuda {

// Maps are of the precision's type.
struct UnitBatch {
  const void* input;  // [count][height][width][in_channels]
  int64_t count, height, width;
  void* output;  // written [count][height'][width'][out_channels]
  // [statistics_size()] of each BatchNorm mean and biased variance, [2][padded(channels)]: written with
  // kCapture, read with kConstants.
  float* statistics;
};

class UnitEvaluation {
 public:
  virtual ~UnitEvaluation() = default;

  virtual int64_t packed_bytes() const = 0;
  // Into `memory`, which evaluations read. Later changes of the weights need another call.
  virtual void pack(void* memory, Stream stream) = 0;

  // Bytes of working memory for a batch of that size, weights, input and output excluded.
  virtual int64_t needed_bytes(int64_t count, int64_t height, int64_t width, Statistics statistics) const = 0;

  virtual int64_t statistics_size() const = 0;

  virtual void run(const UnitBatch& batch, Statistics statistics, void* memory, Stream stream) = 0;
};

// Throws std::invalid_argument for more than kMaxSources branches.
std::unique_ptr<UnitEvaluation> make_unit_evaluation(const UnitSource& source, Precision precision);

}  // namespace greedynas::cuda
