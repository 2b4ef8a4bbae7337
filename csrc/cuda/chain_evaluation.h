// ChainEvaluation for maps of type T (kernels.h). Nodes of a layer whose operations are alike are worked on
// by the same launches (block_runner.h).
#pragma once

#include <cstdint>
#include <vector>

#include "block_runner.h"
#include "chain.h"
#include "packed_chain.h"

namespace greedynas::cuda {

inline bool of_batch(Statistics s) { return s == Statistics::kBatch || s == Statistics::kCapture; }

// Where things lie in memory, and what is done in which order.
struct ChainPlaces {
  struct Map {
    Shape shape{};
    int64_t offset = 0;
    bool moments = false;  // whether they lie behind the map
  };
  // Offsets of what a head works in.
  struct HeadSpace {
    int64_t affine, pooled, logits;
  };
  enum class TaskKind { kStem, kNodes, kHead, kLoss };
  struct Task {
    TaskKind kind;
    std::vector<int32_t> nodes;
  };
  struct Layout {
    std::vector<Map> stem_maps;  // of the stem's convolution and blocks
    std::vector<Map> maps;       // of the stem and each node; identities share their parent's
    std::vector<Task> tasks;
    int64_t stem_affine = 0;
    int64_t workspace = 0;  // of the nodes, or heads, that are worked on
    int64_t bytes = 0;
  };
};

template <typename T>
class Evaluation final : public ChainEvaluation, private ChainPlaces {
 public:
  explicit Evaluation(const ChainSource& source);

  int64_t packed_bytes() const override { return packed_.bytes() + captured_bytes_; }
  void pack(void* memory, Stream stream) override;
  int64_t needed_bytes(const std::vector<PathStep>& steps, int64_t count, int64_t height, int64_t width,
                       Statistics statistics) const override;
  void start(const std::vector<PathStep>& steps, const Batch& batch, Statistics statistics, void* memory,
             Stream stream) override;
  int64_t next_stage() const override;
  int64_t advance() override;
  const char* kernels() const override;

 private:
  using Work = BlockWork<T>;

  const OperationSource& operation_of(int64_t node) const {
    return source_.operations[source_.nodes[node].op];
  }
  int64_t node_site(int64_t node) const {
    return 1 + static_cast<int64_t>(source_.stem_blocks.size()) + node;
  }
  bool stem_moments(std::size_t map) const;

  Layout lay_out(const std::vector<PathStep>& steps, int64_t count, int64_t height, int64_t width,
                 Statistics statistics) const;
  std::vector<std::vector<int32_t>> groups_of(const std::vector<PathStep>& steps, int64_t count,
                                              const std::vector<Map>& maps) const;
  HeadSpace head_space(int64_t count, int64_t& end) const;

  template <typename V>
  V* at(int64_t offset) const {
    return reinterpret_cast<V*>(memory_ + offset);
  }
  FeatureMap<T> placed(const Map& m) const;
  float* kept(int64_t site, int stage) const;
  bool known() const { return !of_batch(statistics_); }
  BlockRunner<T> runner() const { return {batch_.count, memory_, stream_}; }
  // `site`: where its statistics are kept. The rest of a Work is still to be filled in.
  Work work_of(const PackedOperation<T>& op, int64_t site) const;
  Work work_of(const PackedOperation<T>& op, int64_t site, const Map& in, const Map& out, int64_t& end) const;

  void run_stem();
  void run_nodes(const std::vector<int32_t>& nodes);
  void run_head(const std::vector<int32_t>& leaves);
  void run_loss(const std::vector<int32_t>& leaves);

  ChainSource source_;
  PackedChain<T> packed_;
  int64_t num_layers_ = 0;
  std::vector<int64_t> leaf_of_node_;
  std::vector<char> needs_moments_;  // of the stem's output and each node's
  std::vector<int64_t> kept_;        // offsets of each site's statistics
  int64_t captured_bytes_ = 0;
  char* packed_memory_ = nullptr;

  Batch batch_{};
  Statistics statistics_ = Statistics::kBatch;
  Layout layout_;
  char* memory_ = nullptr;
  Stream stream_ = nullptr;
  std::size_t next_task_ = 0;
};

}  // namespace greedynas::cuda
