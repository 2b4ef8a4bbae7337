// One operation of a unit on a batch of images: those that only units have, and all others by BlockRunner.
#pragma once

#include <cstdint>

#include "block_runner.h"

namespace greedynas::cuda {

template <typename T>
class UnitRunner {
 public:
  using Work = BlockWork<T>;

  // Offsets of workspaces count from `memory`.
  UnitRunner(int64_t images, char* memory, Stream stream)
      : blocks_(images, memory, stream), images_(images), memory_(memory), stream_(stream) {}

  // As BlockRunner::workspace.
  static Workspace workspace(const OperationSource& op, int64_t images, const Shape& in, const Shape& out,
                             bool moments, int64_t& end);

  // Whether it applies what is left to do of its input, as it reads it.
  static bool takes_pending(const OperationSource& o) { return o.depthwise && !o.expand && !o.residual; }

  // Writes the output.
  void run(const Work& work) const;

  // The moments of a map as it is, in `partials` (finish_map_floats()).
  void take_moments(const FeatureMap<T>& map, float* partials) const;

  // Where what the output still has to undergo lies, when `work` does not finish it.
  const float* left_affine(const Work& work) const { return blocks_.affine(work, kProjectBn); }

 private:
  template <typename V>
  V* at(int64_t offset) const {
    return reinterpret_cast<V*>(memory_ + offset);
  }

  void run_separable(const Work& work) const;
  void run_dense(const Work& work) const;
  void run_pool(const Work& work) const;

  BlockRunner<T> blocks_;
  int64_t images_;
  char* memory_;
  Stream stream_;
};

}  // namespace greedynas::cuda
