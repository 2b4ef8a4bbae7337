#include "mixed_op.h"

#include <algorithm>
#include <utility>

#include "block_runner.h"
#include "launch_groups.h"

namespace greedynas::cuda {
namespace {

// Those operations that nodes run, as a chain's; `packed_of`: where each of them is.
ChainSource used_operations(const MixedOpBlock& block, const std::vector<MixedOpNode>& nodes,
                            std::vector<int64_t>& packed_of) {
  ChainSource source;
  packed_of.assign(block.operations.size(), -1);
  for (const MixedOpNode& node : nodes) {
    if (packed_of[node.op] >= 0) continue;
    packed_of[node.op] = static_cast<int64_t>(source.operations.size());
    source.operations.push_back(packed_source(
        block.operations[node.op], block.bn_eps.data() + node.op * kBatchNormStages, block.weights));
  }
  return source;
}

int64_t float_bytes(int64_t count) { return aligned(count * int64_t{sizeof(float)}); }

template <typename T>
class Evaluation final : public MixedOp {
 public:
  Evaluation(const MixedOpBlock& block, std::vector<MixedOpNode> nodes, int64_t images, int64_t height,
             int64_t width, bool known);

  int64_t bytes() const override { return bytes_; }
  void run(const MixedOpTensors& tensors, void* memory, Stream stream) override;

 private:
  struct Measured {
    int64_t input, moments;  // the offset of its moments
  };

  FeatureMap<T> input_map(int64_t input, const MixedOpTensors& tensors, char* memory) const;
  BlockWork<T> work_of(const MixedOpNode& node, const MixedOpTensors& tensors, char* memory,
                       int64_t& end) const;

  std::vector<ChoiceOperation> operations_;
  std::vector<MixedOpNode> nodes_;
  std::vector<int64_t> packed_of_;  // where an operation is in packed_; those that no node runs are not
  PackedChain<T> packed_;
  int64_t images_;
  Shape in_, out_;
  std::vector<std::vector<int32_t>> groups_;
  std::vector<Measured> measured_;  // inputs whose moments are needed
  int64_t workspace_ = 0, bytes_ = 0;
};

template <typename T>
Evaluation<T>::Evaluation(const MixedOpBlock& block, std::vector<MixedOpNode> nodes, int64_t images,
                          int64_t height, int64_t width, bool known)
    : operations_(block.operations),
      nodes_(std::move(nodes)),
      packed_(used_operations(block, nodes_, packed_of_)),
      images_(images),
      in_{height, width, int_of(block.operations[0].in_channels)},
      out_{} {
  AlikeGroups alike;
  int64_t end = packed_.bytes();
  for (std::size_t n = 0; n < nodes_.size(); ++n) {
    const OperationSource& op = packed_.operations[packed_of_[nodes_[n].op]].source;
    out_ = in_.after(op);  // the same for all of them
    alike.add(static_cast<int32_t>(n), op, depthwise_bytes<T>(op, images_, out_));
    const auto measured = [&](const Measured& m) { return m.input == nodes_[n].input; };
    if (known || !op.expand || std::any_of(measured_.begin(), measured_.end(), measured)) continue;
    measured_.push_back({nodes_[n].input, end});
    end += float_bytes(moments_floats(in_.channels));
  }
  groups_ = alike.groups();
  workspace_ = end;
  int64_t most_space = 0;
  if (!measured_.empty()) {
    most_space = std::min<int64_t>(measured_.size(), kMaxNodes) *
                 float_bytes(finish_map_floats<T>(images_ * in_.pixels(), in_.channels));
  }
  for (const std::vector<int32_t>& group : groups_) {
    int64_t space = 0;
    for (const int32_t n : group) {
      const OperationSource& op = packed_.operations[packed_of_[nodes_[n].op]].source;
      BlockRunner<T>::workspace(op, images_, in_, out_, false, space);
    }
    most_space = std::max(most_space, space);
  }
  bytes_ = workspace_ + most_space;
}

template <typename T>
FeatureMap<T> Evaluation<T>::input_map(int64_t input, const MixedOpTensors& tensors, char* memory) const {
  const int64_t size = images_ * in_.pixels() * row_channels(in_.channels);
  // Nobody writes to it.
  FeatureMap<T> map{static_cast<T*>(const_cast<void*>(tensors.inputs)) + input * size, in_};
  for (const Measured& m : measured_) {
    if (m.input != input) continue;
    map.mean = reinterpret_cast<float*>(memory + m.moments);
    map.covariance = map.mean + row_channels(in_.channels);
  }
  return map;
}

template <typename T>
BlockWork<T> Evaluation<T>::work_of(const MixedOpNode& node, const MixedOpTensors& tensors, char* memory,
                                    int64_t& end) const {
  const ChoiceOperation& o = operations_[node.op];
  BlockWork<T> w;
  w.op = &packed_.operations[packed_of_[node.op]];
  w.in = input_map(node.input, tensors, memory);
  w.out.data =
      static_cast<T*>(tensors.outputs) + node.place * images_ * out_.pixels() * row_channels(out_.channels);
  w.out.shape = out_;
  const int64_t columns[] = {o.expand_statistics, o.depthwise_statistics, o.project_statistics};
  for (int stage = 0; stage < kBatchNormStages; ++stage) {
    if (columns[stage] == kNone) continue;
    const int64_t at = node.place * tensors.statistics_width + columns[stage];
    StageStatistics& s = w.statistics[stage];
    s.keep = tensors.used_statistics + at;
    if (!tensors.statistics) continue;
    s.mean = tensors.statistics + at;
    s.variance = s.mean + padded(w.op->channels(stage));
  }
  w.space = BlockRunner<T>::workspace(w.op->source, images_, in_, out_, false, end);
  return w;
}

template <typename T>
void Evaluation<T>::run(const MixedOpTensors& tensors, void* memory, Stream stream) {
  char* const base = static_cast<char*>(memory);
  packed_.pack(base, stream);
  const int64_t pixels = images_ * in_.pixels();
  std::vector<FinishMap<T>> moments;
  for (const Measured& m : measured_) {
    const FeatureMap<T> map = input_map(m.input, tensors, base);
    const int64_t partials = float_bytes(finish_map_floats<T>(pixels, in_.channels));
    const auto of_launch = static_cast<int64_t>(moments.size()) % kMaxNodes;
    FinishMap<T> f{};
    f.map = map.data;
    f.mean = map.mean;
    f.covariance = map.covariance;
    f.partials = reinterpret_cast<float*>(base + workspace_ + of_launch * partials);
    f.pixels = pixels;
    f.channels = in_.channels;
    moments.push_back(f);
  }
  launch_groups(moments, finish_map, stream);
  const BlockRunner<T> runner(images_, base, stream);
  for (const std::vector<int32_t>& group : groups_) {
    std::vector<BlockWork<T>> works;
    int64_t end = workspace_;
    for (const int32_t n : group) works.push_back(work_of(nodes_[n], tensors, base, end));
    runner.run(works);
  }
}

}  // namespace

std::unique_ptr<MixedOp> make_mixed_op(const MixedOpBlock& block, std::vector<MixedOpNode> nodes,
                                       int64_t images, int64_t height, int64_t width, bool known,
                                       Precision precision) {
  const auto make = [&]<typename T>(T) {
    return std::make_unique<Evaluation<T>>(block, std::move(nodes), images, height, width, known);
  };
  switch (precision) {
    case Precision::kBFloat16:
      return make(BFloat16{});
    case Precision::kHalf:
      return make(Half{});
    default:
      return make(float{});
  }
}

}  // namespace greedynas::cuda
