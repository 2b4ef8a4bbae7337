#include "block_runner.h"

#include <algorithm>

#include "launch_groups.h"

namespace greedynas::cuda {
namespace {

// Depthwise outputs of nodes that are worked on together.
constexpr int64_t kGroupBytes = int64_t{256} << 20;

int activation_after(const OperationSource& o, int stage) {
  if (o.kind == kConvBn || o.kind == kPool || stage == kExpandBn) return int_of(o.activation);
  return int_of(stage == kDepthwiseBn ? o.depthwise_activation : o.project_activation);
}

// Its sizes, without addresses.
template <typename T>
ExpandDepthwise<T> expand_depthwise_of(const OperationSource& o, int64_t images, const Shape& in) {
  ExpandDepthwise<T> e{};
  e.images = int_of(images);
  e.height = int_of(in.height);
  e.width = int_of(in.width);
  e.in_channels = int_of(o.in_channels);
  e.hidden_channels = int_of(o.hidden_channels);
  e.kernel = int_of(o.kernel);
  e.stride = int_of(o.stride);
  return e;
}

}  // namespace

Shape Shape::after(const OperationSource& op) const {
  return {ceil_div(height, op.stride), ceil_div(width, op.stride), int_of(op.out_channels)};
}

void AlikeGroups::add(int32_t node, const OperationSource& op, int64_t bytes) {
  const auto [place, fresh] =
      open_.try_emplace(Key{op.kind, op.kernel, op.stride, op.activation, op.depthwise_activation,
                            op.project_activation, op.se_channels > 0},
                        Open{groups_.size(), 0});
  Open& open = place->second;
  if (!fresh && (open.bytes + bytes > kGroupBytes || groups_[open.group].size() == std::size_t{kMaxNodes})) {
    open = {groups_.size(), 0};
  }
  if (open.group == groups_.size()) groups_.emplace_back();
  groups_[open.group].push_back(node);
  open.bytes += bytes;
}

template <typename T>
Workspace BlockRunner<T>::workspace(const OperationSource& op, int64_t images, const Shape& in,
                                    const Shape& out, bool moments, int64_t& end) {
  const auto take = [&](int64_t size, int64_t elements) {
    const int64_t offset = end;
    end += aligned(size * elements);
    return offset;
  };
  constexpr int64_t kFloat = sizeof(float);
  const int64_t hidden = row_channels(int_of(op.hidden_channels)), row = row_channels(out.channels),
                squeezed = row_channels(int_of(op.se_channels));
  const int64_t all_pixels = images * out.pixels();
  int64_t partials = 0;
  if (op.kind != kIdentity) partials = 4 * row * pointwise_units<T>(all_pixels);
  if (op.kind == kInvertedBottleneck && !op.is_separable()) {
    const int64_t units = expand_depthwise_units(expand_depthwise_of<T>(op, images, in));
    partials = std::max(partials, 4 * hidden * units);
  }
  Workspace w{};
  w.affines[kExpandBn] = take(kFloat, 3 * hidden);
  w.affines[kDepthwiseBn] = take(kFloat, 3 * hidden);
  w.affines[kProjectBn] = take(kFloat, 3 * row);
  w.depthwise = take(1, depthwise_bytes<T>(op, images, out));
  w.partials = take(kFloat, partials);
  w.finish = take(kFloat, moments ? finish_map_floats<T>(all_pixels, out.channels) : 0);
  w.pooled = take(kFloat, squeezed > 0 ? images * hidden : 0);
  w.squeezed = take(kFloat, images * squeezed);
  w.gates = take(kFloat, squeezed > 0 ? images * hidden : 0);
  return w;
}

template <typename T>
NormAffine BlockRunner<T>::norm_affine_of(const Work& w, int stage, int units) const {
  const StageStatistics& statistics = w.statistics[stage];
  NormAffine n{};
  if (statistics.mean) {
    n.mean = statistics.mean;
    n.variance = statistics.variance;
  } else {
    n.partials = at<float>(w.space.partials);
    n.units = units;
  }
  n.stored_factor = w.op->stored_factor[stage];
  n.affine = affine(w, stage);
  n.keep = statistics.keep;
  n.norm = w.op->norms[stage];
  n.channels = w.op->channels(stage);
  n.activation = activation_after(w.op->source, stage);
  return n;
}

template <typename T>
PointwiseAffine<T> BlockRunner<T>::pointwise_affine_of(const Work& w, int stage,
                                                       const WeightOf<T>* weight) const {
  PointwiseAffine<T> p{};
  p.mean = w.in.mean;
  p.covariance = w.in.covariance;
  p.weight = weight;
  p.stored_factor = w.op->stored_factor[stage];
  p.affine = affine(w, stage);
  p.keep = w.statistics[stage].keep;
  p.norm = w.op->norms[stage];
  p.in_channels = w.in.shape.channels;
  p.channels = w.op->channels(stage);
  p.activation = activation_after(w.op->source, stage);
  return p;
}

template <typename T>
PointwiseOutput<T> BlockRunner<T>::output_of(const Work& w) const {
  PointwiseOutput<T> o{};
  o.y = w.out.data;
  o.channels = w.out.shape.channels;
  o.activation = activation_after(w.op->source, kProjectBn);
  if (w.known()) {
    o.affine = affine(w, kProjectBn);
    o.residual = w.op->source.residual ? w.in.data : nullptr;
  } else {
    o.partials = at<float>(w.space.partials);
  }
  return o;
}

template <typename T>
void BlockRunner<T>::run(const std::vector<Work>& group) const {
  if (group[0].op->source.kind == kConvBn) {
    run_strided(group);
  } else {
    run_bottlenecks(group);
  }
}

template <typename T>
void BlockRunner<T>::run_bottlenecks(const std::vector<Work>& group) const {
  const bool known = group[0].known();
  std::vector<PointwiseAffine<T>> expanded;
  std::vector<NormAffine> affines;
  std::vector<ExpandDepthwise<T>> convolutions;
  for (const Work& w : group) {
    const OperationSource& o = w.op->source;
    ExpandDepthwise<T> e = expand_depthwise_of<T>(o, images_, w.in.shape);
    e.x = w.in.data;
    e.expand = w.op->expand;
    if (o.expand) {
      e.affine = affine(w, kExpandBn);
      e.activation = int_of(o.activation);
      if (known) {
        affines.push_back(norm_affine_of(w, kExpandBn, 0));
      } else {
        expanded.push_back(pointwise_affine_of(w, kExpandBn, w.op->expand));
      }
    } else {
      e.affine = w.first_affine ? w.first_affine : w.op->unit_affine;
      e.activation = w.first_activation;
    }
    e.depthwise = w.op->depthwise;
    e.d = at<StoredOf<T>>(w.space.depthwise);
    e.partials = known ? nullptr : at<float>(w.space.partials);
    convolutions.push_back(e);
    if (known) {
      for (const int stage : {kDepthwiseBn, kProjectBn}) affines.push_back(norm_affine_of(w, stage, 0));
    }
  }
  launch_groups(affines, norm_affine, stream_);
  launch_groups(expanded, pointwise_affine, stream_);
  launch_groups(convolutions, expand_depthwise, stream_);
  if (!known) {
    affines.clear();
    for (std::size_t i = 0; i < group.size(); ++i) {
      affines.push_back(norm_affine_of(group[i], kDepthwiseBn, expand_depthwise_units(convolutions[i])));
    }
    launch_groups(affines, norm_affine, stream_);
  }
  if (group[0].op->source.se_channels > 0) run_squeeze_excite(group);
  std::vector<Project<T>> projections;
  for (const Work& w : group) {
    const OperationSource& o = w.op->source;
    Project<T> p{};
    p.d = at<StoredOf<T>>(w.space.depthwise);
    p.affine = affine(w, kDepthwiseBn);
    p.gates = o.se_channels > 0 ? at<float>(w.space.gates) : nullptr;
    p.weight = w.op->project;
    p.out = output_of(w);
    p.pixels = pixels(w.out);
    p.image_pixels = int_of(w.out.shape.pixels());
    p.hidden_channels = int_of(o.hidden_channels);
    p.activation = int_of(o.depthwise_activation);
    projections.push_back(p);
  }
  launch_groups(projections, project, stream_);
  if (!known) sum_up_and_finish(group);
}

template <typename T>
void BlockRunner<T>::run_squeeze_excite(const std::vector<Work>& group) const {
  std::vector<Squeeze<StoredOf<T>>> squeezes;
  std::vector<Linear> reduce, excite;
  const int images = int_of(images_);
  for (const Work& w : group) {
    const OperationSource& o = w.op->source;
    const int hidden = int_of(o.hidden_channels), row = row_channels(hidden);
    const int squeezed = int_of(o.se_channels), squeezed_row = row_channels(squeezed);
    float *pooled = at<float>(w.space.pooled), *middle = at<float>(w.space.squeezed);
    squeezes.push_back({at<StoredOf<T>>(w.space.depthwise), affine(w, kDepthwiseBn),
                        w.op->norms[kDepthwiseBn].factor, pooled, images, int_of(w.out.shape.pixels()),
                        hidden, int_of(o.depthwise_activation)});
    reduce.push_back({pooled, w.op->se_reduce, static_cast<const float*>(o.se_reduce_bias), middle, images,
                      row, row, squeezed, squeezed_row, kLinearRelu});
    excite.push_back({middle, w.op->se_expand, static_cast<const float*>(o.se_expand_bias),
                      at<float>(w.space.gates), images, squeezed_row, squeezed_row, hidden, row,
                      o.se_gate == kSigmoid ? kLinearSigmoid : kLinearHsigmoid});
  }
  launch_groups(squeezes, squeeze, stream_);
  launch_groups(reduce, linear, stream_);
  launch_groups(excite, linear, stream_);
}

template <typename T>
void BlockRunner<T>::run_strided(const std::vector<Work>& group) const {
  std::vector<NormAffine> affines;
  std::vector<StridedConv<T>> convolutions;
  for (const Work& w : group) {
    if (w.known()) affines.push_back(norm_affine_of(w, kProjectBn, 0));
    StridedConv<T> c{};
    c.x = w.in.data;
    c.weight = w.op->dense;
    c.out = output_of(w);
    c.images = int_of(images_);
    c.height = int_of(w.in.shape.height);
    c.width = int_of(w.in.shape.width);
    c.in_channels = w.in.shape.channels;
    c.stride = int_of(w.op->source.stride);
    convolutions.push_back(c);
  }
  launch_groups(affines, norm_affine, stream_);
  launch_groups(convolutions, strided_conv, stream_);
  if (!group[0].known()) sum_up_and_finish(group);
}

template <typename T>
void BlockRunner<T>::sum_up_and_finish(const std::vector<Work>& group) const {
  std::vector<NormAffine> affines;
  std::vector<FinishMap<T>> maps;
  for (const Work& w : group) {
    affines.push_back(norm_affine_of(w, kProjectBn, pointwise_units<T>(pixels(w.out))));
    if (!w.finishes) continue;
    maps.push_back({w.out.data, affine(w, kProjectBn), w.op->source.residual ? w.in.data : nullptr,
                    w.out.mean, w.out.covariance, at<float>(w.space.finish), pixels(w.out),
                    w.out.shape.channels, activation_after(w.op->source, kProjectBn)});
  }
  launch_groups(affines, norm_affine, stream_);
  // Nodes of a launch all have moments, or none has.
  const auto without =
      std::stable_partition(maps.begin(), maps.end(), [](const FinishMap<T>& m) { return m.mean; });
  launch_groups(std::vector<FinishMap<T>>(maps.begin(), without), finish_map, stream_);
  launch_groups(std::vector<FinishMap<T>>(without, maps.end()), finish_map, stream_);
}

template class BlockRunner<float>;
template class BlockRunner<BFloat16>;
template class BlockRunner<Half>;

}  // namespace greedynas::cuda
