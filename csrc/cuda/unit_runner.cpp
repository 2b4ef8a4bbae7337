#include "unit_runner.h"

#include <type_traits>

#include "launch_groups.h"

namespace greedynas::cuda {
namespace {

bool is_dense(const OperationSource& o) { return o.kind == kConvBn && o.kernel > 1; }

// Whether a dense convolution needs a copy of its input, which it reads as floats.
template <typename T>
constexpr bool kWidens = !std::is_same_v<T, float>;

}  // namespace

template <typename T>
Workspace UnitRunner<T>::workspace(const OperationSource& op, int64_t images, const Shape& in,
                                   const Shape& out, bool moments, int64_t& end) {
  Workspace w = BlockRunner<T>::workspace(op, images, in, out, moments, end);
  if (is_dense(op) && kWidens<T>) {
    w.depthwise = end;
    end += aligned(images * in.pixels() * in.channels * int64_t{sizeof(float)});
  }
  return w;
}

template <typename T>
void UnitRunner<T>::run(const Work& work) const {
  const OperationSource& o = work.op->source;
  if (o.is_separable()) {
    run_separable(work);
  } else if (is_dense(o)) {
    run_dense(work);
  } else if (o.kind == kPool) {
    run_pool(work);
  } else {
    blocks_.run({work});
  }
}

template <typename T>
void UnitRunner<T>::take_moments(const FeatureMap<T>& map, float* partials) const {
  FinishMap<T> f{};
  f.map = map.data;
  f.mean = map.mean;
  f.covariance = map.covariance;
  f.partials = partials;
  f.pixels = blocks_.pixels(map);
  f.channels = map.shape.channels;
  launch_groups<FinishMap<T>>({f}, finish_map, stream_);
}

template <typename T>
void UnitRunner<T>::run_separable(const Work& work) const {
  const OperationSource& o = work.op->source;
  DepthwiseConv<T> d{};
  d.x = work.in.data;
  d.affine = work.first_affine;
  d.weight = work.op->plain_depthwise;
  d.stored_factor = work.op->stored_factor[kDepthwiseBn];
  d.y = at<T>(work.space.depthwise);
  d.images = int_of(images_);
  d.height = int_of(work.in.shape.height);
  d.width = int_of(work.in.shape.width);
  d.channels = work.in.shape.channels;
  d.kernel = int_of(o.kernel);
  d.stride = int_of(o.stride);
  d.activation = work.first_activation;
  depthwise_conv(d, stream_);
  if (work.known())
    launch_groups<NormAffine>({blocks_.norm_affine_of(work, kProjectBn, 0)}, norm_affine, stream_);
  StridedConv<T> c{};
  c.x = d.y;
  c.weight = work.op->dense;
  c.out = blocks_.output_of(work);
  c.images = d.images;
  c.height = int_of(work.out.shape.height);
  c.width = int_of(work.out.shape.width);
  c.in_channels = int_of(o.hidden_channels);
  c.stride = 1;
  launch_groups<StridedConv<T>>({c}, strided_conv, stream_);
  if (!work.known()) blocks_.sum_up_and_finish({work});
}

template <typename T>
void UnitRunner<T>::run_dense(const Work& work) const {
  const OperationSource& o = work.op->source;
  const Shape& shape = work.in.shape;
  int row = row_channels(shape.channels);
  StemConv<T> c{};
  if constexpr (kWidens<T>) {
    ArrangeChannels<T, float> widen{};
    widen.sources[0] = {work.in.data, row, 0, 1, shape.channels, 0, 1};
    widen.count = 1;
    widen.out = at<float>(work.space.depthwise);
    widen.out_row = row = shape.channels;
    widen.activation = kLinear;
    widen.pixels = blocks_.pixels(work.in);
    arrange_channels(widen, stream_);
    c.images = widen.out;
  } else {
    c.images = work.in.data;
  }
  if (work.known())
    launch_groups<NormAffine>({blocks_.norm_affine_of(work, kProjectBn, 0)}, norm_affine, stream_);
  c.strides[0] = shape.pixels() * row;
  c.strides[1] = 1;
  c.strides[2] = shape.width * row;
  c.strides[3] = row;
  c.weight = work.op->dense;
  c.out = blocks_.output_of(work);
  c.images_count = int_of(images_);
  c.height = int_of(shape.height);
  c.width = int_of(shape.width);
  c.in_channels = shape.channels;
  c.kernel = int_of(o.kernel);
  c.stride = int_of(o.stride);
  stem_conv(c, stream_);
  if (!work.known()) blocks_.sum_up_and_finish({work});
}

template <typename T>
void UnitRunner<T>::run_pool(const Work& work) const {
  const OperationSource& o = work.op->source;
  const bool normalises = o.normalises(kProjectBn), sums_up = normalises && !work.known();
  Pool<T> p{};
  p.x = work.in.data;
  p.y = work.out.data;
  p.images = int_of(images_);
  p.height = int_of(work.in.shape.height);
  p.width = int_of(work.in.shape.width);
  p.channels = work.in.shape.channels;
  p.kernel = int_of(o.kernel);
  p.stride = int_of(o.stride);
  p.pooling = int_of(o.pooling);
  p.activation = sums_up ? int{kLinear} : int_of(o.activation);
  if (normalises && work.known()) {
    launch_groups<NormAffine>({blocks_.norm_affine_of(work, kProjectBn, 0)}, norm_affine, stream_);
    p.affine = blocks_.affine(work, kProjectBn);
  }
  if (sums_up) p.partials = at<float>(work.space.partials);
  pool(p, stream_);
  if (sums_up) {
    blocks_.sum_up_and_finish({work});
  } else if (work.out.mean) {
    take_moments(work.out, at<float>(work.space.finish));
  }
}

template class UnitRunner<float>;
template class UnitRunner<BFloat16>;
template class UnitRunner<Half>;

}  // namespace greedynas::cuda
