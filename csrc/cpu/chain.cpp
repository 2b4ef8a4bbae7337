#include "chain.h"

#include <iterator>
#include <type_traits>

#include "arena.h"
#include "block_runner.h"
#include "capability.h"
#include "memory_cache.h"
#include "path_cross_entropy.h"

namespace greedynas::cpu {
namespace {

template <typename T>
class Evaluation final : public ChainEvaluation {
  using C = Compute<T>;

 public:
  Evaluation(const ChainSource& source, const Kernels<T>& kernels) : s_(source), k_(kernels) {
    const auto num_nodes = static_cast<int64_t>(s_.nodes.size());
    num_layers_ = s_.nodes.back().layer + 1;
    leaf_of_node_.assign(num_nodes, -1);
    int64_t leaves = 0;
    for (int64_t n = 0; n < num_nodes; ++n) {
      if (s_.nodes[n].layer == num_layers_ - 1) leaf_of_node_[n] = leaves++;
    }
    needs_moments_.assign(num_nodes + 1, 0);
    for (int64_t n = num_nodes - 1; n >= 0; --n) {
      const OperationSource& op = operation_of(n);
      if (leaf_of_node_[n] >= 0) needs_moments_[n + 1] = 1;
      if (op.expand || (op.kind == kIdentity && needs_moments_[n + 1]))
        needs_moments_[s_.nodes[n].parent + 1] = 1;
    }
    captured_.resize(1 + s_.stem_blocks.size() + num_nodes + leaves);
    times_.resize(num_layers_ + 3);
  }

  void pack(const ParallelFor& parallel_for) override {
    std::vector<OperationSource> sources{s_.stem, s_.head};
    sources.insert(sources.end(), s_.stem_blocks.begin(), s_.stem_blocks.end());
    sources.insert(sources.end(), s_.operations.begin(), s_.operations.end());
    std::vector<PackedOperation<T>> packed =
        OperationPacker<T>(k_).pack(sources, packed_memory_, parallel_for);
    const auto blocks = packed.begin() + 2, operations = blocks + static_cast<int64_t>(s_.stem_blocks.size());
    stem_ = std::move(packed[0]);
    head_ = std::move(packed[1]);
    stem_blocks_.assign(std::make_move_iterator(blocks), std::make_move_iterator(operations));
    operations_.assign(std::make_move_iterator(operations), std::make_move_iterator(packed.end()));

    const int64_t size = padded(s_.classes) * s_.head.out_channels;
    classifier_ =
        reinterpret_cast<C*>(classifier_memory_.at_least((size + padded(s_.classes)) * int64_t{sizeof(C)}));
    classifier_bias_ = classifier_ + size;
    pack_pointwise<C>({static_cast<const C*>(s_.classifier_weight), s_.head.out_channels, 1}, s_.classes,
                      padded(s_.classes), s_.head.out_channels, k_.group_width, 1, classifier_);
    pack_bias<C>(static_cast<const C*>(s_.classifier_bias), s_.classes, padded(s_.classes), classifier_bias_);
  }

  int64_t needed_bytes(const std::vector<PathStep>& steps, int64_t count, int64_t height, int64_t width,
                       Statistics statistics, int64_t threads) const override {
    return lay_out(steps, count, height, width, statistics, threads).bytes;
  }

  void start(const std::vector<PathStep>& steps, const Batch& batch, Statistics statistics) override {
    const bool laid_out = layout_.bytes > 0 && steps == steps_ && batch.count == batch_.count &&
                          batch.height == batch_.height && batch.width == batch_.width &&
                          batch.threads == batch_.threads && statistics == statistics_;
    if (!laid_out)
      layout_ = lay_out(steps, batch.count, batch.height, batch.width, statistics, batch.threads);
    steps_ = steps;
    batch_ = batch;
    statistics_ = statistics;
    memory_.at_least(layout_.bytes);
    next_step_ = -1;
  }

  bool advance(double seconds, const ParallelFor& parallel_for) override {
    parallel_for_ = &parallel_for;
    const double since = steady_seconds();
    // One after the other, also those that share an input: few do (of 10 uniform paths of mbv2-7 14 of 205
    // nodes, all in the first two layers), and threads have even shares of each loop. What is saved together
    // is waking them and waiting for the last: on two idle cores 4.3 of mini-16's 73 ms in bf16, a third of
    // which would stay. So 4% of a call there at most, less than 1% on larger images.
    do {
      if (next_step_ < 0) {
        run_stem();
      } else {
        run_node(steps_[next_step_].node);
      }
      ++next_step_;
    } while (next_step_ < static_cast<int64_t>(steps_.size()) && steady_seconds() - since < seconds);
    return next_step_ == static_cast<int64_t>(steps_.size());
  }

  const std::vector<StageTime>& times() const override { return times_; }
  const char* kernels() const override { return k_.name; }

 private:
  const OperationSource& operation_of(int64_t node) const { return s_.operations[s_.nodes[node].op]; }

  // ---- memory

  struct Layout {
    int64_t bytes = 0;
    // Offsets of the stem's output and of each node's; identities share their parent's.
    std::vector<int64_t> map;
    std::vector<Shape> shape;       // likewise
    std::vector<int64_t> stem_map;  // of the stem's convolution and blocks; the last is map[0]
    WorkspaceLayout<T> workspace;
    int64_t pooled, logits;
  };

  int64_t map_bytes(int64_t count, const Shape& shape, bool moments) const {
    const int64_t lines = (map_elements<T>(count, shape) * int64_t{sizeof(T)} + 63) / 64 * 64;
    return lines + (moments ? MapMoments<C>::size(row_channels<T>(shape.channels), shape.channels) *
                                  int64_t{sizeof(C)}
                            : 0);
  }

  static bool of_batch(Statistics statistics) {
    return statistics == Statistics::kBatch || statistics == Statistics::kCapture;
  }

  Layout lay_out(const std::vector<PathStep>& steps, int64_t count, int64_t height, int64_t width,
                 Statistics statistics, int64_t threads) const {
    Layout result;
    Arena arena;
    const bool batch = of_batch(statistics);
    WorkspaceNeeds<T> needs{count, threads, batch};
    const auto map = [&](const Shape& shape, bool moments) {
      if (moments && batch) needs.consider_moments(shape);
      return arena.allocate(map_bytes(count, shape, moments && batch));
    };

    Shape shape{height, width, s_.stem.in_channels};
    needs.consider(s_.stem, shape);
    shape = shape.after(s_.stem);
    result.stem_map.push_back(map(shape, s_.stem_blocks.empty() ? needs_moments_[0] : expands(0)));
    for (std::size_t i = 0; i < s_.stem_blocks.size(); ++i) {
      needs.consider(s_.stem_blocks[i], shape);
      shape = shape.after(s_.stem_blocks[i]);
      const bool last = i + 1 == s_.stem_blocks.size();
      result.stem_map.push_back(map(shape, last ? needs_moments_[0] : expands(i + 1)));
      arena.release(result.stem_map[i]);
    }

    const std::size_t slots = s_.nodes.size() + 1;
    result.map.resize(slots);
    result.shape.resize(slots);
    std::vector<int64_t> owner(slots), readers(slots, 0);
    result.map[0] = result.stem_map.back();
    result.shape[0] = shape;
    readers[0] = 1;
    const auto release = [&](int64_t slot) {
      if (--readers[owner[slot]] == 0) arena.release(result.map[owner[slot]]);
    };
    for (const PathStep& step : steps) {
      const int64_t slot = step.node + 1, parent = s_.nodes[step.node].parent + 1;
      const OperationSource& o = operation_of(step.node);
      const Shape& in = result.shape[parent];
      needs.consider(o, in);
      if (o.kind == kIdentity) {
        owner[slot] = owner[parent];
        result.map[slot] = result.map[parent];
        result.shape[slot] = in;
      } else {
        owner[slot] = slot;
        result.shape[slot] = in.after(o);
        result.map[slot] = map(result.shape[slot], needs_moments_[slot]);
      }
      ++readers[owner[slot]];
      if (step.frees_parent) release(parent);
      if (leaf_of_node_[step.node] >= 0) release(slot);
    }

    needs.consider_channels(s_.head);
    WorkspaceLayout<T> workspace(needs, arena.size());
    result.pooled = workspace.add(count * row_channels<T>(s_.head.out_channels), sizeof(C));
    result.logits = workspace.add(count * s_.classes, sizeof(C));
    result.workspace = workspace;
    result.bytes = workspace.end;
    return result;
  }

  bool expands(std::size_t stem_block) const { return s_.stem_blocks[stem_block].expand != nullptr; }

  template <typename V>
  V* at(int64_t offset) const {
    return reinterpret_cast<V*>(memory_.get() + offset);
  }

  Map<T> map_at(int64_t offset, const Shape& shape, bool moments) const {
    Map<T> map{at<T>(offset), shape, {}};
    if (moments && of_batch(statistics_)) {
      C* values = at<C>(offset + map_bytes(batch_.count, shape, false));
      map.moments = {values, values + row_channels<T>(shape.channels)};
    }
    return map;
  }

  BlockRunner<T> runner(int64_t stage) {
    return {k_, batch_.count, layout_.workspace.at(memory_.get()), *parallel_for_, &times_[stage].parts};
  }

  // ---- statistics

  // Those that are known before anything is computed; null with those of the batch.
  const OperationStatistics<C>* known(const PackedOperation<T>& op, int64_t site) const {
    if (statistics_ == Statistics::kRunning) return &op.running;
    if (statistics_ == Statistics::kConstants) return &captured_[site];
    return nullptr;
  }

  // Where those of the batch are kept; null where nobody asks for them.
  OperationStatistics<C>* used(int64_t site) {
    return statistics_ == Statistics::kCapture ? &captured_[site] : nullptr;
  }

  // ---- the chain

  void run_stem() {
    const double since = steady_seconds();
    const bool batch = of_batch(statistics_);
    const auto blocks = static_cast<int64_t>(stem_blocks_.size());
    Shape shape{batch_.height, batch_.width, s_.stem.in_channels};
    PatchInput<T> images{static_cast<const C*>(batch_.images),
                         batch_.count,
                         batch_.height,
                         batch_.width,
                         s_.stem.in_channels,
                         {batch_.strides[0], batch_.strides[1], batch_.strides[2], batch_.strides[3]},
                         s_.stem.kernel,
                         s_.stem.stride};
    shape = shape.after(s_.stem);
    Map<T> map = map_at(layout_.stem_map[0], shape, blocks ? expands(0) : needs_moments_[0]);
    clear_slack(map, batch_.count);
    BlockRunner<T> run = runner(0);
    const Affine<C> pending = run.convolution(stem_, known(stem_, 0), used(0), map,
                                              [&](const PointwiseOutput<T>& to, int64_t begin, int64_t end) {
                                                k_.patches(images, to, begin, end);
                                              });
    // The first block reads the convolution as it is where it begins with the depthwise convolution.
    const bool passes_on = blocks > 0 && !stem_blocks_[0].expand && !stem_blocks_[0].source.residual;
    if (batch && !passes_on) run.finish(map, &pending, s_.stem.activation, nullptr);
    for (int64_t i = 0; i < blocks; ++i) {
      const PackedOperation<T>& op = stem_blocks_[i];
      shape = shape.after(op.source);
      const Map<T> out =
          map_at(layout_.stem_map[i + 1], shape, i + 1 < blocks ? expands(i + 1) : needs_moments_[0]);
      clear_slack(out, batch_.count);
      if (batch && i == 0 && passes_on) {
        run.bottleneck_of_batch(op, used(1), map, &pending, s_.stem.activation, out);
      } else {
        runner(0).run(op, known(op, 1 + i), used(1 + i), map, out);
      }
      map = out;
    }
    record(0, since, bytes_of(map));
  }

  void run_node(int64_t node) {
    const double since = steady_seconds();
    const int64_t slot = node + 1, parent = s_.nodes[node].parent + 1;
    const int64_t site = 1 + static_cast<int64_t>(stem_blocks_.size()) + node;
    const PackedOperation<T>& op = operations_[s_.nodes[node].op];
    const Map<T> in = map_at(layout_.map[parent], layout_.shape[parent], needs_moments_[parent]);
    Map<T> out = in;
    if (op.source.kind != kIdentity) {
      out = map_at(layout_.map[slot], layout_.shape[slot], needs_moments_[slot]);
      clear_slack(out, batch_.count);
      runner(1 + s_.nodes[node].layer).run(op, known(op, site), used(site), in, out);
    }
    record(1 + s_.nodes[node].layer, since, bytes_of(out));
    if (leaf_of_node_[node] >= 0) run_head(node, out);
  }

  void run_head(int64_t node, const Map<T>& in) {
    double since = steady_seconds();
    const int64_t leaf = leaf_of_node_[node];
    const int64_t site = 1 + static_cast<int64_t>(stem_blocks_.size() + s_.nodes.size()) + leaf;
    BlockRunner<T> run = runner(num_layers_ + 1);
    const OperationStatistics<C>* given = known(head_, site);
    const Affine<C> after = given
                                ? run.affine(head_, kProjectBn, *given)
                                : run.affine(head_, kProjectBn, used(site),
                                             run.pointwise_moments(in, head_.project, s_.head.out_channels));
    if (statistics_ == Statistics::kCapture) return;
    const int64_t channels = s_.head.out_channels;
    const SlabCut cut(batch_.count, in.shape.pixels());
    C* pooled = at<C>(layout_.pooled);
    const HeadPool<T> h{
        in.data,  batch_.count,       in.shape.pixels(),  in.shape.channels,  cut.images, head_.project,
        channels, after.scale.data(), after.shift.data(), s_.head.activation, pooled};
    const int64_t units = cut.slabs * ceil_div(row_channels<T>(channels), k_.group_width);
    const int64_t work = cut.images * in.shape.pixels() * in.shape.channels * k_.group_width;
    (*parallel_for_)(units, work, [&](int64_t begin, int64_t end) { k_.head_pool(h, begin, end); });
    C* logits = at<C>(layout_.logits);
    Linear<C> l = run.linear(pooled, batch_.count, row_channels<T>(channels), channels, classifier_,
                             classifier_bias_, s_.classes, kNoActivation, logits);
    l.out_stride = s_.classes;
    l.padded_output = false;
    run.linear_everywhere(l);
    record(num_layers_ + 1, since, batch_.count * s_.classes * int64_t{sizeof(C)});

    since = steady_seconds();
    C loss;
    const PathCrossEntropy arguments{logits,
                                     std::is_same_v<C, double> ? LogitsType::kFloat64 : LogitsType::kFloat32,
                                     1,
                                     batch_.count,
                                     s_.classes,
                                     batch_.count * s_.classes,
                                     s_.classes,
                                     1,
                                     batch_.targets,
                                     batch_.label_smoothing,
                                     batch_.correct + leaf};
    path_cross_entropy(arguments, &loss, static_cast<C*>(batch_.image_losses) + leaf * batch_.count,
                       *parallel_for_);
    record(num_layers_ + 2, since, batch_.count * int64_t{sizeof(C)});
  }

  int64_t bytes_of(const Map<T>& map) const {
    return batch_.count * map.shape.pixels() * map.shape.channels * int64_t{sizeof(T)};
  }

  void record(int64_t stage, double since, int64_t output_bytes) {
    times_[stage].seconds += steady_seconds() - since;
    ++times_[stage].calls;
    times_[stage].bytes += output_bytes;
  }

  ChainSource s_;
  const Kernels<T>& k_;
  int64_t num_layers_;
  std::vector<int64_t> leaf_of_node_;  // or -1
  std::vector<char> needs_moments_;    // [node + 1], 0: the stem's output
  CachedMemory packed_memory_, classifier_memory_;
  PackedOperation<T> stem_, head_;
  std::vector<PackedOperation<T>> stem_blocks_, operations_;
  C *classifier_ = nullptr, *classifier_bias_ = nullptr;
  std::vector<OperationStatistics<C>> captured_;  // stem, its blocks, nodes, heads of leaves
  std::vector<StageTime> times_;

  std::vector<PathStep> steps_;
  Batch batch_{};
  Statistics statistics_ = Statistics::kBatch;
  Layout layout_;
  CachedMemory memory_;
  int64_t next_step_ = -1;
  const ParallelFor* parallel_for_ = nullptr;
};

}  // namespace

std::unique_ptr<ChainEvaluation> make_chain_evaluation(const ChainSource& source, Precision precision) {
  const Capability capability = used_capability();
  if (precision == Precision::kFloat64) {
    return std::make_unique<Evaluation<double>>(source, kernels_for<double>(capability));
  }
  if (precision == Precision::kBFloat16 && capability == kAmx) {
    return std::make_unique<Evaluation<TiledBFloat16>>(source, tiled_kernels());
  }
  if (precision == Precision::kBFloat16 && *bf16_kernels_name() != '\0') {
    return std::make_unique<Evaluation<BFloat16>>(source, bf16_kernels());
  }
  return std::make_unique<Evaluation<float>>(source, kernels_for<float>(capability));
}

}  // namespace greedynas::cpu
