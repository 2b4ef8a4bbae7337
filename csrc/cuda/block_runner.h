// Operations on feature maps of a whole batch of images, made of the kernels. Those that are alike are worked
// on by the same launches. The chain and mixed_op are made of these.
#pragma once

#include <cstdint>
#include <map>
#include <tuple>
#include <vector>

#include "kernels.h"
#include "packed_chain.h"

namespace greedynas::cuda {

// Pieces of memory begin at multiples of this many bytes.
inline int64_t aligned(int64_t bytes) { return ceil_div(bytes, int64_t{256}) * 256; }

struct Shape {
  int64_t height, width;
  int channels;
  int64_t pixels() const { return height * width; }
  Shape after(const OperationSource& op) const;
};

template <typename T>
struct FeatureMap {
  T* data = nullptr;
  Shape shape{};
  float *mean = nullptr, *covariance = nullptr;  // its moments; null where nobody needs them
};

// Floats of a map's moments: the mean, then the covariance.
inline int64_t moments_floats(int channels) {
  return int64_t{row_channels(channels)} * (row_channels(channels) + 1);
}

// Offsets of what an operation works in.
struct Workspace {
  // `depthwise`: the output of a depthwise convolution, or the input of a dense one, as floats
  int64_t affines[kBatchNormStages], depthwise, partials, finish, pooled, squeezed, gates;
};

// Which statistics a BatchNorm uses: known ones, or, where `mean` is null, those of the batch.
struct StageStatistics {
  const float *mean = nullptr, *variance = nullptr;
  float* keep = nullptr;  // as in NormAffine
};

// An operation on a map. Either all of its BatchNorms have known statistics, or none has.
template <typename T>
struct BlockWork {
  const PackedOperation<T>* op = nullptr;
  StageStatistics statistics[kBatchNormStages];
  FeatureMap<T> in, out;
  Workspace space{};
  // What the input still has to undergo before the depthwise convolution of a block without expansion: an
  // affine map, or null, and an activation.
  const float* first_affine = nullptr;
  int first_activation = kLinear;
  // Whether BatchNorm and activation are applied to the output where statistics are of the batch; or else
  // they are left to who reads it.
  bool finishes = true;

  bool known() const { return statistics[kProjectBn].mean != nullptr; }
};

// Nodes whose operations are alike, together as far as their depthwise outputs take little memory: large maps
// fill a GPU by themselves. They have inputs of one shape, and outputs too.
class AlikeGroups {
 public:
  void add(int32_t node, const OperationSource& op, int64_t depthwise_bytes);
  const std::vector<std::vector<int32_t>>& groups() const { return groups_; }

 private:
  using Key = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool>;
  struct Open {
    std::size_t group;
    int64_t bytes;
  };
  std::vector<std::vector<int32_t>> groups_;
  std::map<Key, Open> open_;
};

template <typename T>
int64_t depthwise_bytes(const OperationSource& op, int64_t images, const Shape& out) {
  return images * out.pixels() * row_channels(int_of(op.hidden_channels)) * int64_t{sizeof(StoredOf<T>)};
}

template <typename T>
class BlockRunner {
 public:
  using Work = BlockWork<T>;

  // Offsets of workspaces count from `memory`.
  BlockRunner(int64_t images, char* memory, Stream stream)
      : images_(images), memory_(memory), stream_(stream) {}

  // From `end` on, which becomes what comes after it. `moments`: of the output.
  static Workspace workspace(const OperationSource& op, int64_t images, const Shape& in, const Shape& out,
                             bool moments, int64_t& end);

  // Writes the outputs. Works of one of AlikeGroups; identities have none.
  void run(const std::vector<Work>& group) const;

  // ---- what it is made of, for the first and the last convolution of a chain

  float* affine(const Work& w, int stage) const { return at<float>(w.space.affines[stage]); }
  // Of a BatchNorm whose statistics are known, or summed up in that many units of partials.
  NormAffine norm_affine_of(const Work& w, int stage, int units) const;
  PointwiseAffine<T> pointwise_affine_of(const Work& w, int stage, const WeightOf<T>* weight) const;
  // Where statistics are of the batch, sums are stored, to be finished when they are known.
  PointwiseOutput<T> output_of(const Work& w) const;
  // BatchNorm, activation and residual of outputs whose sums are stored, and their moments.
  void sum_up_and_finish(const std::vector<Work>& group) const;
  int64_t pixels(const FeatureMap<T>& m) const { return images_ * m.shape.pixels(); }

 private:
  template <typename V>
  V* at(int64_t offset) const {
    return reinterpret_cast<V*>(memory_ + offset);
  }

  void run_strided(const std::vector<Work>& group) const;
  void run_bottlenecks(const std::vector<Work>& group) const;
  void run_squeeze_excite(const std::vector<Work>& group) const;

  int64_t images_;
  char* memory_;
  Stream stream_;
};

}  // namespace greedynas::cuda
