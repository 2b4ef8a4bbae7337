// Cross-entropy of m paths on one batch, without a temporary of the size of the logits.
#pragma once

#include <cstdint>

#include "parallel.h"

namespace greedynas::cpu {

enum class LogitsType { kFloat64, kFloat32, kBFloat16, kFloat16 };

struct PathCrossEntropy {
  const void* logits;  // [paths, images, classes]
  LogitsType type;
  int64_t paths, images, classes;                   // images and classes at least 1
  int64_t path_stride, image_stride, class_stride;  // of the logits, in elements
  const int64_t* targets;                           // [images], each in [0, classes)
  double label_smoothing;
  int64_t* correct;  // [paths]
};

// Value: double for kFloat64, otherwise float. Writes losses [paths], image_losses [paths, images] and
// correct.
template <typename Value>
void path_cross_entropy(const PathCrossEntropy& arguments, Value* losses, Value* image_losses,
                        const ParallelFor& parallel_for);

}  // namespace greedynas::cpu
