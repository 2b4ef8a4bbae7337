#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "chain_evaluation.h"
#include "launch_groups.h"

namespace greedynas::cuda {

template <typename T>
Evaluation<T>::Evaluation(const ChainSource& source) : source_(source), packed_(source) {
  const auto num_nodes = static_cast<int64_t>(source_.nodes.size());
  num_layers_ = source_.nodes.back().layer + 1;
  leaf_of_node_.assign(num_nodes, -1);
  int64_t leaves = 0;
  for (int64_t n = 0; n < num_nodes; ++n) {
    if (source_.nodes[n].layer == num_layers_ - 1) leaf_of_node_[n] = leaves++;
  }
  needs_moments_.assign(num_nodes + 1, 0);
  for (int64_t n = num_nodes - 1; n >= 0; --n) {
    const OperationSource& op = operation_of(n);
    if (leaf_of_node_[n] >= 0) needs_moments_[n + 1] = 1;
    if (op.expand || (op.kind == kIdentity && needs_moments_[n + 1]))
      needs_moments_[source_.nodes[n].parent + 1] = 1;
  }
  const auto keep = [&](const OperationSource& op) {
    kept_.push_back(packed_.bytes() + captured_bytes_);
    const int64_t channels = 2 * padded(op.hidden_channels) + padded(op.out_channels);
    captured_bytes_ += aligned(2 * channels * int64_t{sizeof(float)});
  };
  keep(source_.stem);
  for (const OperationSource& op : source_.stem_blocks) keep(op);
  for (int64_t n = 0; n < num_nodes; ++n) keep(operation_of(n));
  for (int64_t leaf = 0; leaf < leaves; ++leaf) keep(source_.head);
}

template <typename T>
void Evaluation<T>::pack(void* memory, Stream stream) {
  packed_memory_ = static_cast<char*>(memory);
  packed_.pack(packed_memory_, stream);
}

template <typename T>
FeatureMap<T> Evaluation<T>::placed(const Map& m) const {
  FeatureMap<T> map{at<T>(m.offset), m.shape};
  if (m.moments) {
    const int64_t row = row_channels(m.shape.channels);
    map.mean = at<float>(m.offset + aligned(batch_.count * m.shape.pixels() * row * int64_t{sizeof(T)}));
    map.covariance = map.mean + row;
  }
  return map;
}

// Mean and variance of one of the site's BatchNorms; of its operation's widths.
template <typename T>
float* Evaluation<T>::kept(int64_t site, int stage) const {
  const auto blocks = static_cast<int64_t>(source_.stem_blocks.size());
  const auto nodes = static_cast<int64_t>(source_.nodes.size());
  const OperationSource& op = site == 0                 ? source_.stem
                              : site <= blocks          ? source_.stem_blocks[site - 1]
                              : site < node_site(nodes) ? operation_of(site - node_site(0))
                                                        : source_.head;
  return reinterpret_cast<float*>(packed_memory_ + kept_[site]) + stage * 2 * padded(op.hidden_channels);
}

template <typename T>
BlockWork<T> Evaluation<T>::work_of(const PackedOperation<T>& op, int64_t site) const {
  Work w;
  w.op = &op;
  for (int stage = 0; stage < kBatchNormStages; ++stage) {
    StageStatistics& s = w.statistics[stage];
    if (statistics_ == Statistics::kCapture) s.keep = kept(site, stage);
    if (statistics_ == Statistics::kRunning) {
      s.mean = op.running_mean[stage];
      s.variance = op.running_variance[stage];
    } else if (statistics_ == Statistics::kConstants) {
      s.mean = kept(site, stage);
      s.variance = s.mean + padded(op.channels(stage));
    }
  }
  return w;
}

template <typename T>
BlockWork<T> Evaluation<T>::work_of(const PackedOperation<T>& op, int64_t site, const Map& in, const Map& out,
                                    int64_t& end) const {
  Work w = work_of(op, site);
  w.in = placed(in);
  w.out = placed(out);
  w.space = BlockRunner<T>::workspace(op.source, batch_.count, in.shape, out.shape, out.moments, end);
  return w;
}

template <typename T>
void Evaluation<T>::start(const std::vector<PathStep>& steps, const Batch& batch, Statistics statistics,
                          void* memory, Stream stream) {
  batch_ = batch;
  statistics_ = statistics;
  layout_ = lay_out(steps, batch.count, batch.height, batch.width, statistics);
  memory_ = static_cast<char*>(memory);
  stream_ = stream;
  next_task_ = 0;
}

template <typename T>
int64_t Evaluation<T>::next_stage() const {
  if (next_task_ == layout_.tasks.size()) return -1;
  const Task& task = layout_.tasks[next_task_];
  switch (task.kind) {
    case TaskKind::kStem:
      return 0;
    case TaskKind::kNodes:
      return 1 + source_.nodes[task.nodes[0]].layer;
    case TaskKind::kHead:
      return 1 + num_layers_;
    default:
      return 2 + num_layers_;
  }
}

template <typename T>
int64_t Evaluation<T>::advance() {
  const int64_t stage = next_stage();
  if (stage < 0) return stage;
  const Task& task = layout_.tasks[next_task_++];
  switch (task.kind) {
    case TaskKind::kStem:
      run_stem();
      break;
    case TaskKind::kNodes:
      run_nodes(task.nodes);
      break;
    case TaskKind::kHead:
      run_head(task.nodes);
      break;
    default:
      run_loss(task.nodes);
  }
  return stage;
}

template <typename T>
void Evaluation<T>::run_stem() {
  const BlockRunner<T> runner = this->runner();
  const Map images{{batch_.height, batch_.width, int_of(source_.stem.in_channels)}, 0, false};
  int64_t end = layout_.workspace;
  Work stem = work_of(packed_.stem, 0, images, layout_.stem_maps[0], end);
  // It outlives the space of the convolution where the first block applies it.
  stem.space.affines[kProjectBn] = layout_.stem_affine;
  const bool passes_on = packed_.stem_passes_on();
  if (known()) launch_groups<NormAffine>({runner.norm_affine_of(stem, kProjectBn, 0)}, norm_affine, stream_);
  StemConv<T> conv{};
  conv.images = batch_.images;
  std::copy_n(batch_.strides, 4, conv.strides);
  conv.weight = packed_.stem.dense;
  conv.out = runner.output_of(stem);
  if (passes_on) conv.out.affine = nullptr;
  conv.images_count = int_of(batch_.count);
  conv.height = int_of(batch_.height);
  conv.width = int_of(batch_.width);
  conv.in_channels = int_of(source_.stem.in_channels);
  conv.kernel = int_of(source_.stem.kernel);
  conv.stride = int_of(source_.stem.stride);
  stem_conv(conv, stream_);
  if (!known() && passes_on) {
    const int units = pointwise_units<T>(runner.pixels(stem.out));
    launch_groups<NormAffine>({runner.norm_affine_of(stem, kProjectBn, units)}, norm_affine, stream_);
  } else if (!known()) {
    runner.sum_up_and_finish({stem});
  }
  for (std::size_t i = 0; i < source_.stem_blocks.size(); ++i) {
    end = layout_.workspace;
    Work block = work_of(packed_.stem_blocks[i], static_cast<int64_t>(1 + i), layout_.stem_maps[i],
                         layout_.stem_maps[i + 1], end);
    if (i == 0 && passes_on) {
      block.first_affine = runner.affine(stem, kProjectBn);
      block.first_activation = int_of(source_.stem.activation);
    }
    runner.run({block});
  }
}

template <typename T>
void Evaluation<T>::run_nodes(const std::vector<int32_t>& nodes) {
  std::vector<Work> group;
  int64_t end = layout_.workspace;
  for (const int32_t node : nodes) {
    group.push_back(work_of(packed_.operations[source_.nodes[node].op], node_site(node),
                            layout_.maps[source_.nodes[node].parent + 1], layout_.maps[node + 1], end));
  }
  runner().run(group);
}

template <typename T>
void Evaluation<T>::run_head(const std::vector<int32_t>& leaves) {
  const BlockRunner<T> runner = this->runner();
  std::vector<NormAffine> known_affines;
  std::vector<PointwiseAffine<T>> affines;
  std::vector<HeadPool<T>> pools;
  std::vector<Linear> classifiers;
  const int channels = int_of(source_.head.out_channels), images = int_of(batch_.count),
            classes = int_of(source_.classes);
  int64_t end = layout_.workspace;
  for (const int32_t node : leaves) {
    const HeadSpace space = head_space(batch_.count, end);
    const int64_t site = node_site(static_cast<int64_t>(source_.nodes.size())) + leaf_of_node_[node];
    Work w = work_of(packed_.head, site);
    w.in = placed(layout_.maps[node + 1]);
    w.space.affines[kProjectBn] = space.affine;
    if (known()) {
      known_affines.push_back(runner.norm_affine_of(w, kProjectBn, 0));
    } else {
      affines.push_back(runner.pointwise_affine_of(w, kProjectBn, packed_.head.dense));
    }
    pools.push_back({w.in.data, packed_.head.dense, runner.affine(w, kProjectBn), at<float>(space.pooled),
                     images, int_of(w.in.shape.pixels()), w.in.shape.channels, channels,
                     int_of(source_.head.activation)});
    classifiers.push_back({at<float>(space.pooled), static_cast<const float*>(source_.classifier_weight),
                           static_cast<const float*>(source_.classifier_bias), at<float>(space.logits),
                           images, channels, row_channels(channels), classes, classes, kNoActivation});
  }
  launch_groups(known_affines, norm_affine, stream_);
  launch_groups(affines, pointwise_affine, stream_);
  if (statistics_ == Statistics::kCapture) return;
  launch_groups(pools, head_pool, stream_);
  launch_groups(classifiers, linear, stream_);
}

template <typename T>
void Evaluation<T>::run_loss(const std::vector<int32_t>& leaves) {
  int64_t end = layout_.workspace;
  for (const int32_t node : leaves) {
    const int64_t leaf = leaf_of_node_[node];
    PathCrossEntropy loss{};
    loss.logits = at<float>(head_space(batch_.count, end).logits);
    loss.targets = batch_.targets;
    loss.image_losses = batch_.image_losses + leaf * batch_.count;
    loss.correct = batch_.correct + leaf;
    loss.status = batch_.status;
    loss.paths = 1;
    loss.images = int_of(batch_.count);
    loss.classes = int_of(source_.classes);
    loss.label_smoothing = static_cast<float>(batch_.label_smoothing);
    path_cross_entropy(loss, stream_);
  }
}

template <typename T>
const char* Evaluation<T>::kernels() const {
  return std::is_same_v<T, BFloat16> ? "CUDA, bf16" : std::is_same_v<T, Half> ? "CUDA, fp16" : "CUDA, fp32";
}

std::unique_ptr<ChainEvaluation> make_chain_evaluation(const ChainSource& source, Precision precision) {
  switch (precision) {
    case Precision::kFloat32:
      return std::make_unique<Evaluation<float>>(source);
    case Precision::kBFloat16:
      return std::make_unique<Evaluation<BFloat16>>(source);
    default:
      return std::make_unique<Evaluation<Half>>(source);
  }
}

}  // namespace greedynas::cuda
