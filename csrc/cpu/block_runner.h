// One operation on a feature map of a whole batch of images, made of the kernels. The chain and mixed_op are
// made of these.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "block_kernels.h"
#include "channel_memory.h"
#include "operation_source.h"
#include "parallel.h"
#include "pilot.h"
#include "stage_parts.h"
#include "statistics.h"
#include "weights.h"
#include "workspace.h"

namespace greedynas::cpu {

// Depthwise outputs of this size leave the cache before they are read again. Processors with matrix tiles
// have more of it.
template <typename T>
inline constexpr int64_t kStreamedBytes = kTiled<T> ? 64 << 20 : 16 << 20;

// body(slab, first block, last block) on all blocks of the pixels of all slabs.
template <typename Body>
void for_blocks(const SlabCut& cut, int64_t images, int64_t image_pixels, int64_t work,
                const ParallelFor& parallel_for, const Body& body) {
  const int64_t blocks = ceil_div(cut.images * image_pixels, kBlockPixels);
  parallel_for(cut.slabs * blocks, work, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t slab = begin / blocks, last = std::min(end, (slab + 1) * blocks);
      const int64_t pixels = std::min(cut.images, images - slab * cut.images) * image_pixels;
      const int64_t real = std::min(last - slab * blocks, ceil_div(pixels, kBlockPixels));
      body(slab, begin - slab * blocks, real);
      begin = last;
    }
  });
}

// Kernels::finish of all pixels, with a pilot the sums of each of segments_of(f.pixels) segments (join_gram).
template <typename T>
void finish_everywhere(const Kernels<T>& k, const FinishMap<T>& f, double* segments,
                       const ParallelFor& parallel_for) {
  const int64_t stride = row_channels<T>(f.channels), size = stride * (stride + 1);
  const int64_t units = ceil_div(f.pixels, kGramPixels), parts = f.pilot ? segments_of(f.pixels) : units;
  const int64_t work = kGramPixels * stride * (f.pilot ? stride / 2 : 2) * units / parts;
  parallel_for(parts, work, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      double* sums = segments + part * size;
      if (f.pilot) std::fill_n(sums, size, 0.0);
      k.finish(f, part * units / parts, (part + 1) * units / parts, sums + stride, sums);
    }
  });
}

// Of one operation at a time: what it keeps of its channels lies in the workspace until the next one begins.
// Where there is a place for it, says what its time was spent on.
template <typename T>
class BlockRunner {
  using C = Compute<T>;

 public:
  BlockRunner(const Kernels<T>& kernels, int64_t images, const Workspace<T>& workspace,
              const ParallelFor& parallel_for, PartSeconds* seconds = nullptr)
      : k_(kernels),
        images_(images),
        workspace_(workspace),
        memory_(workspace.channels, workspace.channel_bytes),
        parallel_for_(parallel_for),
        watch_(seconds) {}

  // What a map still has to undergo; affine: null, nothing.
  struct Pending {
    const Affine<C>* affine = nullptr;
    int64_t activation = kLinear;
  };

  // Whether `run` takes a map on which something is pending: it is applied as the map is read, once.
  static bool takes_pending(const OperationSource& o) { return o.depthwise && !o.expand && !o.residual; }

  // An operation that is neither an identity nor a dense convolution, nor pooling. Without `known` statistics
  // those of the batch, kept in `used` unless that is null, and then, with `left`, the output is not
  // finished: what it still has to undergo is put there. An operation with a residual takes no `left`.
  void run(const PackedOperation<T>& op, const OperationStatistics<C>* known, OperationStatistics<C>* used,
           const Map<T>& in, const Map<T>& out, const Pending& pending = {}, Affine<C>* left = nullptr) {
    if (op.source.kind == kConvBn) {
      const StridedInput<T> strided{in.data,        images_,           in.shape.height,
                                    in.shape.width, in.shape.channels, op.source.stride};
      const Affine<C> after =
          convolution(op, known, used, out, [&](const PointwiseOutput<T>& to, int64_t begin, int64_t end) {
            k_.strided(strided, to, begin, end);
          });
      if (!known) finish_or_leave(out, after, op.source.activation, nullptr, left);
    } else if (known) {
      bottleneck_with_constants(op, *known, in, pending, out);
    } else {
      bottleneck_of_batch(op, used, in, pending.affine, pending.activation, out, left);
    }
  }

  // A dense convolution of `images`, which need not lie as maps do; see `run`.
  void patches(const PackedOperation<T>& op, const OperationStatistics<C>* known,
               OperationStatistics<C>* used, const PatchInput<T>& images, const Map<T>& out,
               Affine<C>* left = nullptr) {
    const Affine<C> after =
        convolution(op, known, used, out, [&](const PointwiseOutput<T>& to, int64_t begin, int64_t end) {
          k_.patches(images, to, begin, end);
        });
    if (!known) finish_or_leave(out, after, op.source.activation, nullptr, left);
  }

  void pool(const PackedOperation<T>& op, const OperationStatistics<C>* known, OperationStatistics<C>* used,
            const Map<T>& in, const Map<T>& out) {
    const OperationSource& o = op.source;
    const bool normalises = o.normalises(kProjectBn);
    const int64_t pixels = images_ * out.shape.pixels();
    const Pool<T> p{in.data,        out.data,
                    images_,        in.shape.height,
                    in.shape.width, in.shape.channels,
                    o.kernel,       o.stride,
                    o.pooling,      normalises && !known ? workspace_.partials : nullptr};
    parallel_for_(ceil_div(pixels, kBlockPixels), kBlockPixels * o.kernel * o.kernel * o.out_channels,
                  [&](int64_t begin, int64_t end) { k_.pool(p, begin, end); });
    if (normalises) {
      const Affine<C> after = known ? affine(op, kProjectBn, *known)
                                    : affine(op, kProjectBn, used, block_moments(pixels, o.out_channels));
      finish(out, &after, o.activation, nullptr);
    } else if (o.activation != kLinear || out.finished) {
      activate(out, o.activation);
    } else if (out.moments.mean) {
      finish(out, nullptr, kLinear, nullptr);
    }
  }

  // Activates a map, maybe elsewhere; its moments where it has place for them.
  void activate(const Map<T>& map, int64_t activation) {
    const Affine<C> same = unchanged(map.shape.channels);
    finish(map, &same, activation, nullptr);
  }

  // Those of a pointwise convolution of a map.
  Moments<C> pointwise_moments(const Map<T>& in, const T* weight, int64_t channels) {
    const int64_t stride = row_channels<T>(channels), depth = in.shape.channels;
    const auto result = Moments<C>::take(stride, memory_);
    parallel_for_(ceil_div(stride, k_.group_width), depth * depth * k_.group_width / 2,
                  [&](int64_t begin, int64_t end) {
                    for (int64_t group = begin; group < end; ++group) {
                      k_.pointwise_moments(in.moments.mean, in.moments.covariance, depth, weight, channels,
                                           group, result.mean.data(), result.variance.data());
                    }
                  });
    return result;
  }

  // map = activation(map * scale + shift) + residual, maybe elsewhere, and its moments where it has place for
  // them.
  void finish(const Map<T>& map, const Affine<C>* affine, int64_t activation, const T* residual) {
    watch_.lap(kStatisticsPart);
    const int64_t pixels = images_ * map.shape.pixels();
    FinishMap<T> f{map.data,   map.data, pixels, map.shape.channels, nullptr, nullptr,
                   activation, residual, nullptr};
    if (map.finished) {
      f.output = map.finished;
      f.output_stride = map.finished_stride;
    }
    if (affine) {
      f.scale = affine->scale.data();
      f.shift = affine->shift.data();
    }
    if (map.moments.mean) f.pilot = pilot_of(k_, f, memory_).data();
    finish_everywhere(k_, f, workspace_.segments, parallel_for_);
    if (f.pilot) {
      join_gram<C>(workspace_.segments, segments_of(pixels), pixels, f.pilot, map.shape.channels,
                   row_channels<T>(map.shape.channels), map.moments, memory_, parallel_for_);
    }
    watch_.lap(kFinishPart);
  }

  // What BatchNorm does with those statistics of the batch, which are kept in `used` unless that is null.
  Affine<C> affine(const PackedOperation<T>& op, int64_t stage, OperationStatistics<C>* used,
                   const Moments<C>& moments) {
    if (used) used->stages[stage].keep(moments);
    return op.batch_norms[stage].affine(moments.mean, moments.variance, memory_);
  }

  Affine<C> affine(const PackedOperation<T>& op, int64_t stage, const OperationStatistics<C>& known) {
    return op.batch_norms[stage].affine(known.stages[stage].mean, known.stages[stage].variance, memory_);
  }

  Linear<C> linear(const C* in, int64_t rows, int64_t in_stride, int64_t depth_of, const C* weight,
                   const C* bias, int64_t channels, int64_t activation, C* out) const {
    return {in, rows, in_stride, depth_of, weight, bias, channels, activation, out, padded(channels), true};
  }

  void linear_everywhere(const Linear<C>& l) const {
    parallel_for_(ceil_div(padded(l.channels), k_.group_width), l.rows * l.depth * k_.group_width,
                  [&](int64_t begin, int64_t end) { k_.linear(l, begin, end); });
  }

  // An inverted bottleneck with the statistics of the batch, which are kept in `used` unless that is null.
  // `pending`: what the input still has to undergo; `left`: see `run`.
  void bottleneck_of_batch(const PackedOperation<T>& op, OperationStatistics<C>* used, const Map<T>& in,
                           const Affine<C>* pending, int64_t pending_activation, const Map<T>& out,
                           Affine<C>* left = nullptr) {
    const OperationSource& o = op.source;
    const int64_t hidden = op.hidden_stride(), image_pixels = out.shape.pixels();
    const SlabCut cut(images_, image_pixels);
    Affine<C> before;
    if (op.expand) {
      before = affine(op, kExpandBn, used, pointwise_moments(in, op.expand, o.hidden_channels));
      pending = &before;
      pending_activation = o.activation;
    }
    ExpandDepthwise<T> e = expand_depthwise(op, in, pending, pending_activation, cut);
    std::span<const C> factor;
    if (op.half_depthwise && pending) {
      e.half_depthwise = op.half_depthwise;
      e.factor = pending->factor.data();
      factor = depthwise_factor(op, *pending);
    }
    const bool normalises = o.normalises(kDepthwiseBn);
    e.partials = normalises ? workspace_.partials : nullptr;
    e.streams = images_ * image_pixels * hidden * int64_t{sizeof(T)} >= kStreamedBytes<T>;
    const int64_t groups = ceil_div(hidden, k_.group_width);
    const int64_t expand_work = cut.images * in.shape.pixels() * (op.expand ? o.in_channels : 1);
    const int64_t depthwise_work = cut.images * image_pixels * o.kernel * o.kernel;
    watch_.lap(kStatisticsPart);
    parallel_for_(cut.slabs * groups, (expand_work + depthwise_work) * k_.group_width,
                  [&](int64_t begin, int64_t end) { k_.expand_depthwise(e, begin, end); });
    watch_.lap(kExpandDepthwisePart);
    const auto slab_pixels = [&](int64_t slab) {
      return std::min(cut.images, images_ - slab * cut.images) * image_pixels;
    };
    Affine<C> middle;
    if (normalises) {
      const Moments<C> moments =
          join_partials<C>(e.partials, cut.slabs, slab_pixels, hidden, memory_, parallel_for_);
      for (std::size_t c = 0; c < factor.size(); ++c) {
        moments.mean[c] /= factor[c];
        moments.variance[c] /= factor[c] * factor[c];
      }
      middle = affine(op, kDepthwiseBn, used, moments);
      for (std::size_t c = 0; c < factor.size(); ++c) middle.scale[c] /= factor[c];
    } else {
      middle = unchanged(o.hidden_channels);
    }

    ProjectInput<T> p = project_input(op, e, middle, cut, image_pixels);
    watch_.lap(kStatisticsPart);
    if (o.se_channels > 0) {
      C* pooled = workspace_.gates;
      C* gates = pooled + images_ * hidden;
      const Squeeze<T> s{p, o.hidden_channels, pooled};
      parallel_for_(cut.slabs, cut.images * image_pixels * hidden * 2,
                    [&](int64_t begin, int64_t end) { k_.squeeze(s, begin, end); });
      excite(op, pooled, images_, workspace_.squeezed, gates,
             [&](const Linear<C>& l) { linear_everywhere(l); });
      p.gates = gates;
      watch_.lap(kSqueezeExcitePart);
    }
    const PointwiseOutput<T> to{
        op.project, o.hidden_channels, o.out_channels,      out.data,          nullptr, nullptr,
        kLinear,    nullptr,           workspace_.partials, project_factor(op)};
    for_blocks(cut, images_, image_pixels, kBlockPixels * hidden * o.out_channels, parallel_for_,
               [&](int64_t slab, int64_t first, int64_t last) { k_.project(p, to, slab, first, last); });
    watch_.lap(kProjectPart);
    const int64_t blocks = ceil_div(cut.images * image_pixels, kBlockPixels);
    const auto block_pixels = [&](int64_t unit) {
      return std::clamp<int64_t>(slab_pixels(unit / blocks) - unit % blocks * kBlockPixels, 0, kBlockPixels);
    };
    const Affine<C> after = affine(op, kProjectBn, used,
                                   join_partials<C>(to.partials, cut.slabs * blocks, block_pixels,
                                                    row_channels<T>(o.out_channels), memory_, parallel_for_));
    finish_or_leave(out, after, o.project_activation, o.residual ? in.data : nullptr, left);
  }

  // An inverted bottleneck whose statistics are known: slab by slab, and nothing but the output is stored.
  void bottleneck_with_constants(const PackedOperation<T>& op, const OperationStatistics<C>& known,
                                 const Map<T>& in, const Pending& pending, const Map<T>& out) {
    const OperationSource& o = op.source;
    const int64_t hidden = op.hidden_stride(), image_pixels = out.shape.pixels();
    const SlabCut cut(images_, image_pixels);
    Affine<C> before;
    if (op.expand) before = affine(op, kExpandBn, known);
    const Affine<C> middle =
        o.normalises(kDepthwiseBn) ? affine(op, kDepthwiseBn, known) : unchanged(o.hidden_channels);
    const bool halves = op.half_depthwise && op.expand;
    if (halves) {
      const std::span<const C> factor = depthwise_factor(op, before);
      for (std::size_t c = 0; c < factor.size(); ++c) middle.scale[c] /= factor[c];
    }
    const Affine<C> after = affine(op, kProjectBn, known);
    const int64_t groups = ceil_div(hidden, k_.group_width);
    const int64_t work =
        cut.images * hidden * (in.shape.pixels() * o.in_channels + image_pixels * o.out_channels);
    const int64_t parts = std::min(workspace_.parts, cut.slabs);
    parallel_for_(parts, work * ceil_div(cut.slabs, parts), [&](int64_t first_part, int64_t last_part) {
      for (int64_t part = first_part; part < last_part; ++part) {
        ExpandDepthwise<T> e = op.expand ? expand_depthwise(op, in, &before, o.activation, cut)
                                         : expand_depthwise(op, in, pending.affine, pending.activation, cut);
        e.output = workspace_.depthwise + part * workspace_.depthwise_part;
        if (halves) {
          e.half_depthwise = op.half_depthwise;
          e.factor = before.factor.data();
        }
        C* pooled = workspace_.gates + part * workspace_.gates_part;
        C* gates = pooled + cut.images * hidden;
        C* squeezed = workspace_.squeezed + part * workspace_.squeezed_part;
        ProjectInput<T> p = project_input(op, e, middle, cut, image_pixels);
        const PointwiseOutput<T> to{op.project,
                                    o.hidden_channels,
                                    o.out_channels,
                                    out.data,
                                    after.scale.data(),
                                    after.shift.data(),
                                    o.project_activation,
                                    o.residual ? in.data : nullptr,
                                    nullptr,
                                    project_factor(op)};
        for (int64_t slab = part * cut.slabs / parts; slab < (part + 1) * cut.slabs / parts; ++slab) {
          e.first_slab = p.first_slab = slab;
          k_.expand_depthwise(e, slab * groups, (slab + 1) * groups);
          const int64_t images = std::min(cut.images, images_ - slab * cut.images);
          if (o.se_channels > 0) {
            const int64_t earlier = slab * cut.images * hidden;
            k_.squeeze({p, o.hidden_channels, pooled - earlier}, slab, slab + 1);
            excite(op, pooled, images, squeezed, gates, [&](const Linear<C>& l) {
              k_.linear(l, 0, ceil_div(padded(l.channels), k_.group_width));
            });
            p.gates = gates - earlier;
          }
          k_.project(p, to, slab, 0, ceil_div(images * image_pixels, kBlockPixels));
        }
      }
    });
    watch_.lap(kBlockPart);
  }

  // A dense or strided convolution: `run(output, first block, last block)` is the kernel. Returns what the
  // output still has to undergo with the statistics of the batch.
  template <typename Run>
  Affine<C> convolution(const PackedOperation<T>& op, const OperationStatistics<C>* known,
                        OperationStatistics<C>* used, const Map<T>& out, const Run& run) {
    const OperationSource& o = op.source;
    const int64_t pixels = images_ * out.shape.pixels(), blocks = ceil_div(pixels, kBlockPixels);
    PointwiseOutput<T> to{op.project, o.depth(),    o.out_channels, out.data, nullptr,
                          nullptr,    o.activation, nullptr,        nullptr};
    Affine<C> after;
    if (known) {
      after = affine(op, kProjectBn, *known);
      to.scale = after.scale.data();
      to.shift = after.shift.data();
    } else {
      to.partials = workspace_.partials;
    }
    parallel_for_(blocks, kBlockPixels * o.depth() * o.out_channels,
                  [&](int64_t begin, int64_t end) { run(to, begin, end); });
    watch_.lap(kConvolutionPart);
    if (!to.partials) return after;
    return affine(op, kProjectBn, used, block_moments(pixels, o.out_channels));
  }

  // What leaves values as they are.
  Affine<C> unchanged(int64_t channels) {
    const int64_t stride = row_channels<T>(channels);
    const Affine<C> result{memory_.take<C>(stride), memory_.take<C>(stride), {}};
    std::fill_n(result.scale.begin(), channels, C(1));
    return result;
  }

 private:
  void finish_or_leave(const Map<T>& out, const Affine<C>& after, int64_t activation, const T* residual,
                       Affine<C>* left) {
    if (left) {
      *left = after;
    } else {
      finish(out, &after, activation, residual);
    }
  }

  // Of a map, from partial sums of its blocks.
  Moments<C> block_moments(int64_t pixels, int64_t channels) {
    const auto count = [&](int64_t unit) { return std::min(kBlockPixels, pixels - unit * kBlockPixels); };
    return join_partials<C>(workspace_.partials, ceil_div(pixels, kBlockPixels), count,
                            row_channels<T>(channels), memory_, parallel_for_);
  }

  // What the depthwise outputs of halves are multiplied by: the factors of what goes in, and those of the
  // weights.
  std::span<const C> depthwise_factor(const PackedOperation<T>& op, const Affine<C>& before) {
    const std::span<C> result = memory_.take<C>(op.hidden_stride());
    for (std::size_t c = 0; c < result.size(); ++c) {
      result[c] = op.half_depthwise_factor[c] * before.factor[c];
    }
    return result;
  }

  static const C* project_factor(const PackedOperation<T>& op) {
    return op.project_factor.empty() ? nullptr : op.project_factor.data();
  }

  ProjectInput<T> project_input(const PackedOperation<T>& op, const ExpandDepthwise<T>& from,
                                const Affine<C>& middle, const SlabCut& cut, int64_t image_pixels) const {
    return {from.output,
            0,
            cut.images,
            images_,
            image_pixels,
            middle.scale.data(),
            middle.shift.data(),
            op.source.depthwise_activation,
            nullptr,
            from.half_depthwise != nullptr,
            middle.factor.empty() ? nullptr : middle.factor.data()};
  }

  ExpandDepthwise<T> expand_depthwise(const PackedOperation<T>& op, const Map<T>& in, const Affine<C>* before,
                                      int64_t activation, const SlabCut& cut) const {
    const OperationSource& o = op.source;
    return {in.data,
            images_,
            in.shape.height,
            in.shape.width,
            o.in_channels,
            op.expand,
            before ? before->scale.data() : nullptr,
            before ? before->shift.data() : nullptr,
            activation,
            op.depthwise,
            o.hidden_channels,
            o.kernel,
            o.stride,
            cut.images,
            nullptr,
            nullptr,
            workspace_.depthwise,
            0,
            nullptr,
            false};
  }

  // The gates of `images` images from their means.
  template <typename For>
  void excite(const PackedOperation<T>& op, const C* pooled, int64_t images, C* squeezed, C* gates,
              const For& for_groups) const {
    const OperationSource& o = op.source;
    const int64_t gate = o.se_gate == kSigmoid ? kLinearSigmoid : kLinearHsigmoid;
    for_groups(linear(pooled, images, op.hidden_stride(), o.hidden_channels, op.se_reduce, op.se_reduce_bias,
                      o.se_channels, kLinearRelu, squeezed));
    for_groups(linear(squeezed, images, padded(o.se_channels), o.se_channels, op.se_expand, op.se_expand_bias,
                      op.hidden_stride(), gate, gates));
  }

  const Kernels<T>& k_;
  int64_t images_;
  Workspace<T> workspace_;
  ChannelMemory memory_;
  const ParallelFor& parallel_for_;
  PartWatch watch_;
};

}  // namespace greedynas::cpu
