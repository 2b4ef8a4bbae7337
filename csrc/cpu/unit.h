// Evaluation of one unit (unit_source.h) on a batch of images by the kernels of chains.
#pragma once

#include <cstdint>
#include <memory>

#include "chain.h"
#include "chain_source.h"
#include "parallel.h"
#include "unit_source.h"

namespace greedynas::cpu {

struct UnitBatch {
  // double with kFloat64, float with kFloat32; with kBFloat16 bfloat16, or float where `wide`.
  const void* input;
  bool wide;
  int64_t count, height, width;
  int64_t strides[4];  // of image, channel, row, column, in elements
  void* output;        // [count][height'][width'][out_channels], bfloat16 with kBFloat16
  // [statistics_size()] mean and variance of each BatchNorm, of double or float: written with kCapture, read
  // with kConstants.
  void* statistics;
  int64_t threads;  // that work at once, at most
};

class UnitEvaluation {
 public:
  virtual ~UnitEvaluation() = default;

  // Copies the weights into the kernels' order. Later changes of the weights need another call.
  virtual void pack(const ParallelFor& parallel_for) = 0;

  // Bytes of working memory for a batch of that size, weights, input and output excluded.
  virtual int64_t needed_bytes(int64_t count, int64_t height, int64_t width, bool wide, Statistics statistics,
                               int64_t threads) const = 0;

  virtual int64_t statistics_size() const = 0;

  virtual void run(const UnitBatch& batch, Statistics statistics, const ParallelFor& parallel_for) = 0;

  virtual const char* kernels() const = 0;
};

// Throws std::invalid_argument for GREEDYNAS_CPU_CAPABILITY (capability.h), and for kBFloat16 where there are
// no bf16 products.
std::unique_ptr<UnitEvaluation> make_unit_evaluation(const UnitSource& source, Precision precision);

}  // namespace greedynas::cpu
