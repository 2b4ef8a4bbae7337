#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "chain_evaluation.h"
#include "launch_groups.h"

namespace greedynas::cuda {
namespace {

int activation_after(const OperationSource& o, int stage) {
  return stage == kProjectBn && o.kind == kInvertedBottleneck ? int{kLinear} : int_of(o.activation);
}

}  // namespace

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
    const int64_t channels =
        2 * row_channels(int_of(op.hidden_channels)) + row_channels(int_of(op.out_channels));
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
float* Evaluation<T>::mean(const Map& m) const {
  if (!m.moments) return nullptr;
  const int64_t row = row_channels(m.shape.channels);
  return at<float>(m.offset + aligned(pixels(m) * row * int64_t{sizeof(T)}));
}

template <typename T>
float* Evaluation<T>::covariance(const Map& m) const {
  return m.moments ? mean(m) + row_channels(m.shape.channels) : nullptr;
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
  const int64_t hidden = row_channels(int_of(op.hidden_channels));
  return reinterpret_cast<float*>(packed_memory_ + kept_[site]) + stage * 2 * hidden;
}

// ---- statistics

template <typename T>
NormAffine Evaluation<T>::norm_affine_of(const PackedOperation<T>& op, int64_t site, int stage,
                                         float* affine) const {
  NormAffine n{};
  n.stored_factor = op.stored_factor[stage];
  n.affine = affine;
  n.keep = statistics_ == Statistics::kCapture ? kept(site, stage) : nullptr;
  n.norm = op.norms[stage];
  n.channels = op.channels(stage);
  n.activation = activation_after(op.source, stage);
  return n;
}

template <typename T>
NormAffine Evaluation<T>::known_affine(const PackedOperation<T>& op, int64_t site, int stage,
                                       float* affine) const {
  NormAffine n = norm_affine_of(op, site, stage, affine);
  if (statistics_ == Statistics::kRunning) {
    n.mean = op.running_mean[stage];
    n.variance = op.running_variance[stage];
  } else {
    n.mean = kept(site, stage);
    n.variance = n.mean + row_channels(n.channels);
  }
  return n;
}

template <typename T>
NormAffine Evaluation<T>::summed_affine(const PackedOperation<T>& op, int64_t site, int stage, float* affine,
                                        const float* partials, int units) const {
  NormAffine n = norm_affine_of(op, site, stage, affine);
  n.partials = partials;
  n.units = units;
  return n;
}

template <typename T>
PointwiseAffine<T> Evaluation<T>::pointwise_affine_of(const PackedOperation<T>& op, int64_t site, int stage,
                                                      float* affine, const Map& in,
                                                      const WeightOf<T>* weight) const {
  PointwiseAffine<T> p{};
  p.mean = mean(in);
  p.covariance = covariance(in);
  p.weight = weight;
  p.stored_factor = op.stored_factor[stage];
  p.affine = affine;
  p.keep = statistics_ == Statistics::kCapture ? kept(site, stage) : nullptr;
  p.norm = op.norms[stage];
  p.in_channels = in.shape.channels;
  p.channels = op.channels(stage);
  p.activation = activation_after(op.source, stage);
  return p;
}

// Where statistics are of the batch, sums are stored, to be finished when they are known.
template <typename T>
PointwiseOutput<T> Evaluation<T>::output_of(const Work& w) const {
  PointwiseOutput<T> o{};
  o.y = map(w.out);
  o.channels = w.out.shape.channels;
  o.activation = activation_after(w.op->source, kProjectBn);
  if (known()) {
    o.affine = at<float>(w.space.affines[kProjectBn]);
    o.residual = w.op->source.residual ? map(w.in) : nullptr;
  } else {
    o.partials = at<float>(w.space.partials);
  }
  return o;
}

// ---- the chain

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
  const auto work = [&](const PackedOperation<T>& op, int64_t site, const Map& in, const Map& out) {
    int64_t end = layout_.workspace;
    return Work{&op, site, in, out, space(op.source, in, out, batch_.count, false, end)};
  };
  const Map images{{batch_.height, batch_.width, int_of(source_.stem.in_channels)}, 0, false};
  Work stem = work(packed_.stem, 0, images, layout_.stem_maps[0]);
  // It outlives the space of the convolution where the first block applies it.
  stem.space.affines[kProjectBn] = layout_.stem_affine;
  float* affine = at<float>(layout_.stem_affine);
  const bool passes_on = packed_.stem_passes_on();
  if (known())
    launch_groups<NormAffine>({known_affine(*stem.op, 0, kProjectBn, affine)}, norm_affine, stream_);
  StemConv<T> conv{};
  conv.images = batch_.images;
  std::copy_n(batch_.strides, 4, conv.strides);
  conv.weight = packed_.stem.dense;
  conv.out = output_of(stem);
  if (passes_on) conv.out.affine = nullptr;
  conv.images_count = int_of(batch_.count);
  conv.height = int_of(batch_.height);
  conv.width = int_of(batch_.width);
  conv.in_channels = int_of(source_.stem.in_channels);
  conv.kernel = int_of(source_.stem.kernel);
  conv.stride = int_of(source_.stem.stride);
  stem_conv(conv, stream_);
  if (!known() && passes_on) {
    launch_groups<NormAffine>({summed_affine(*stem.op, 0, kProjectBn, affine, conv.out.partials,
                                             pointwise_units<T>(pixels(stem.out)))},
                              norm_affine, stream_);
  } else if (!known()) {
    sum_up_and_finish({stem});
  }
  for (std::size_t i = 0; i < source_.stem_blocks.size(); ++i) {
    run_bottlenecks({work(packed_.stem_blocks[i], static_cast<int64_t>(1 + i), layout_.stem_maps[i],
                          layout_.stem_maps[i + 1])},
                    i == 0 && passes_on ? affine : nullptr);
  }
}

template <typename T>
void Evaluation<T>::run_nodes(const std::vector<int32_t>& nodes) {
  std::vector<Work> group;
  int64_t end = layout_.workspace;
  for (const int32_t node : nodes) {
    Work w{&packed_.operations[source_.nodes[node].op],
           node_site(node),
           layout_.maps[source_.nodes[node].parent + 1],
           layout_.maps[node + 1],
           {}};
    w.space = space(w.op->source, w.in, w.out, batch_.count, leaf_of_node_[node] >= 0, end);
    group.push_back(w);
  }
  if (group[0].op->source.kind == kConvBn) {
    run_strided(group);
  } else {
    run_bottlenecks(group, nullptr);
  }
}

// `first_affine`: what the input still has to undergo; null: nothing.
template <typename T>
void Evaluation<T>::run_bottlenecks(const std::vector<Work>& group, const float* first_affine) {
  std::vector<PointwiseAffine<T>> expanded;
  std::vector<NormAffine> affines;
  std::vector<ExpandDepthwise<T>> convolutions;
  for (const Work& w : group) {
    const OperationSource& o = w.op->source;
    float* affine = at<float>(w.space.affines[kExpandBn]);
    ExpandDepthwise<T> e{};
    e.x = map(w.in);
    e.expand = w.op->expand;
    e.affine = affine;
    if (first_affine) {
      e.affine = first_affine;
    } else if (!o.expand) {
      e.affine = w.op->unit_affine;
    } else if (known()) {
      affines.push_back(known_affine(*w.op, w.site, kExpandBn, affine));
    } else {
      expanded.push_back(pointwise_affine_of(*w.op, w.site, kExpandBn, affine, w.in, w.op->expand));
    }
    e.depthwise = w.op->depthwise;
    e.d = at<StoredOf<T>>(w.space.depthwise);
    e.partials = known() ? nullptr : at<float>(w.space.partials);
    e.images = int_of(batch_.count);
    e.height = int_of(w.in.shape.height);
    e.width = int_of(w.in.shape.width);
    e.in_channels = w.in.shape.channels;
    e.hidden_channels = int_of(o.hidden_channels);
    e.kernel = int_of(o.kernel);
    e.stride = int_of(o.stride);
    // Without an expansion there is none between it and the depthwise convolution, but what is handed on.
    e.activation = first_affine ? int_of(source_.stem.activation)
                   : o.expand   ? int_of(o.activation)
                                : int{kLinear};
    convolutions.push_back(e);
    if (known()) {
      for (const int stage : {kDepthwiseBn, kProjectBn})
        affines.push_back(known_affine(*w.op, w.site, stage, at<float>(w.space.affines[stage])));
    }
  }
  launch_groups(affines, norm_affine, stream_);
  launch_groups(expanded, pointwise_affine, stream_);
  launch_groups(convolutions, expand_depthwise, stream_);
  if (!known()) {
    affines.clear();
    for (std::size_t i = 0; i < group.size(); ++i) {
      const Work& w = group[i];
      affines.push_back(summed_affine(*w.op, w.site, kDepthwiseBn, at<float>(w.space.affines[kDepthwiseBn]),
                                      convolutions[i].partials, expand_depthwise_units(convolutions[i])));
    }
    launch_groups(affines, norm_affine, stream_);
  }
  if (group[0].op->source.se_channels > 0) run_squeeze_excite(group);
  std::vector<Project<T>> projections;
  for (const Work& w : group) {
    const OperationSource& o = w.op->source;
    Project<T> p{};
    p.d = at<StoredOf<T>>(w.space.depthwise);
    p.affine = at<float>(w.space.affines[kDepthwiseBn]);
    p.gates = o.se_channels > 0 ? at<float>(w.space.gates) : nullptr;
    p.weight = w.op->project;
    p.out = output_of(w);
    p.pixels = pixels(w.out);
    p.image_pixels = int_of(w.out.shape.pixels());
    p.hidden_channels = int_of(o.hidden_channels);
    p.activation = int_of(o.activation);
    projections.push_back(p);
  }
  launch_groups(projections, project, stream_);
  if (!known()) sum_up_and_finish(group);
}

template <typename T>
void Evaluation<T>::run_squeeze_excite(const std::vector<Work>& group) const {
  std::vector<Squeeze<StoredOf<T>>> squeezes;
  std::vector<Linear> reduce, excite;
  const int images = int_of(batch_.count);
  for (const Work& w : group) {
    const OperationSource& o = w.op->source;
    const int hidden = int_of(o.hidden_channels), squeezed = int_of(o.se_channels),
              row = row_channels(hidden);
    float *pooled = at<float>(w.space.pooled), *middle = at<float>(w.space.squeezed);
    squeezes.push_back({at<StoredOf<T>>(w.space.depthwise), at<float>(w.space.affines[kDepthwiseBn]),
                        w.op->norms[kDepthwiseBn].factor, pooled, images, int_of(w.out.shape.pixels()),
                        hidden, int_of(o.activation)});
    reduce.push_back({pooled, static_cast<const float*>(o.se_reduce_weight),
                      static_cast<const float*>(o.se_reduce_bias), middle, images, hidden, row, squeezed,
                      squeezed, kLinearRelu});
    excite.push_back({middle, static_cast<const float*>(o.se_expand_weight),
                      static_cast<const float*>(o.se_expand_bias), at<float>(w.space.gates), images, squeezed,
                      squeezed, hidden, row, o.se_gate == kSigmoid ? kLinearSigmoid : kLinearHsigmoid});
  }
  launch_groups(squeezes, squeeze, stream_);
  launch_groups(reduce, linear, stream_);
  launch_groups(excite, linear, stream_);
}

template <typename T>
void Evaluation<T>::run_strided(const std::vector<Work>& group) {
  std::vector<NormAffine> affines;
  std::vector<StridedConv<T>> convolutions;
  for (const Work& w : group) {
    if (known())
      affines.push_back(known_affine(*w.op, w.site, kProjectBn, at<float>(w.space.affines[kProjectBn])));
    StridedConv<T> c{};
    c.x = map(w.in);
    c.weight = w.op->dense;
    c.out = output_of(w);
    c.images = int_of(batch_.count);
    c.height = int_of(w.in.shape.height);
    c.width = int_of(w.in.shape.width);
    c.in_channels = w.in.shape.channels;
    c.stride = int_of(w.op->source.stride);
    convolutions.push_back(c);
  }
  launch_groups(affines, norm_affine, stream_);
  launch_groups(convolutions, strided_conv, stream_);
  if (!known()) sum_up_and_finish(group);
}

// BatchNorm, activation and residual of outputs whose sums are stored, and their moments.
template <typename T>
void Evaluation<T>::sum_up_and_finish(const std::vector<Work>& group) {
  std::vector<NormAffine> affines;
  std::vector<FinishMap<T>> maps;
  for (const Work& w : group) {
    float* affine = at<float>(w.space.affines[kProjectBn]);
    affines.push_back(summed_affine(*w.op, w.site, kProjectBn, affine, at<float>(w.space.partials),
                                    pointwise_units<T>(pixels(w.out))));
    maps.push_back({map(w.out), affine, w.op->source.residual ? map(w.in) : nullptr, mean(w.out),
                    covariance(w.out), at<float>(w.space.finish), pixels(w.out), w.out.shape.channels,
                    activation_after(w.op->source, kProjectBn)});
  }
  launch_groups(affines, norm_affine, stream_);
  // Nodes of a launch all have moments, or none has.
  const auto without =
      std::stable_partition(maps.begin(), maps.end(), [](const FinishMap<T>& m) { return m.mean; });
  launch_groups(std::vector<FinishMap<T>>(maps.begin(), without), finish_map, stream_);
  launch_groups(std::vector<FinishMap<T>>(without, maps.end()), finish_map, stream_);
}

template <typename T>
void Evaluation<T>::run_head(const std::vector<int32_t>& leaves) {
  std::vector<NormAffine> known_affines;
  std::vector<PointwiseAffine<T>> affines;
  std::vector<HeadPool<T>> pools;
  std::vector<Linear> classifiers;
  const int channels = int_of(source_.head.out_channels), images = int_of(batch_.count),
            classes = int_of(source_.classes);
  int64_t end = layout_.workspace;
  for (const int32_t node : leaves) {
    const Map& in = layout_.maps[node + 1];
    const Space s =
        space(operation_of(node), layout_.maps[source_.nodes[node].parent + 1], in, batch_.count, true, end);
    const int64_t site = node_site(static_cast<int64_t>(source_.nodes.size())) + leaf_of_node_[node];
    float* affine = at<float>(s.affines[kExpandBn]);
    if (known()) {
      known_affines.push_back(known_affine(packed_.head, site, kProjectBn, affine));
    } else {
      affines.push_back(pointwise_affine_of(packed_.head, site, kProjectBn, affine, in, packed_.head.dense));
    }
    pools.push_back({map(in), packed_.head.dense, affine, at<float>(s.pooled), images,
                     int_of(in.shape.pixels()), in.shape.channels, channels,
                     int_of(source_.head.activation)});
    classifiers.push_back({at<float>(s.pooled), static_cast<const float*>(source_.classifier_weight),
                           static_cast<const float*>(source_.classifier_bias), at<float>(s.logits), images,
                           channels, row_channels(channels), classes, classes, kNoActivation});
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
    const Space s = space(operation_of(node), layout_.maps[source_.nodes[node].parent + 1],
                          layout_.maps[node + 1], batch_.count, true, end);
    const int64_t leaf = leaf_of_node_[node];
    PathCrossEntropy loss{};
    loss.logits = at<float>(s.logits);
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
