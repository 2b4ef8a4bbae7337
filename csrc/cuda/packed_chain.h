// The weights of a chain as the kernels read them (kernels.h), in one piece of device memory.
#pragma once

#include <cstdint>
#include <vector>

#include "chain_source.h"
#include "kernels.h"

namespace greedynas::cuda {

inline int int_of(int64_t value) { return static_cast<int>(value); }

// Addresses are null until the weights are packed, and where the operation has no such part.
template <typename T>
struct PackedOperation {
  OperationSource source;
  WeightOf<T>* expand = nullptr;
  StoredOf<T>*depthwise = nullptr, *project = nullptr;
  WeightOf<T>* dense = nullptr;      // of a kConvBn; of a separable convolution the 1x1 one
  float* plain_depthwise = nullptr;  // of a separable convolution
  // Of squeeze-excitation: [out][row_channels(in)].
  float *se_reduce = nullptr, *se_expand = nullptr;
  BatchNorm norms[kBatchNormStages] = {};
  // Stored statistics; null where there are none.
  float *running_mean[kBatchNormStages] = {}, *running_variance[kBatchNormStages] = {};
  float* stored_factor[kBatchNormStages] = {};  // of what each BatchNorm takes
  // Of a block without expansion: its input goes through the identity matrix (`expand`) and this affine map.
  float* unit_affine = nullptr;

  int channels(int stage) const {
    return static_cast<int>(stage == kProjectBn ? source.out_channels : source.hidden_channels);
  }
};

template <typename T>
class PackedChain {
 public:
  explicit PackedChain(const ChainSource& source);

  int64_t bytes() const { return bytes_; }
  void pack(char* memory, Stream stream);

  // Whether the first block takes the stem's convolution as it is, before its BatchNorm.
  bool stem_passes_on() const {
    return !stem_blocks.empty() && !stem_blocks[0].source.expand && !stem_blocks[0].source.residual;
  }

  PackedOperation<T> stem, head;
  std::vector<PackedOperation<T>> stem_blocks, operations;

 private:
  int64_t place(char* memory);
  std::vector<PackedOperation<T>*> all();

  int64_t bytes_ = 0;
};

}  // namespace greedynas::cuda
