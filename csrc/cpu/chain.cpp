#include "chain.h"

#include <chrono>
#include <stdexcept>

#include "arena.h"
#include "block_kernels.h"
#include "capability.h"
#include "memory_cache.h"
#include "path_cross_entropy.h"
#include "statistics.h"
#include "weights.h"

namespace greedynas::cpu {
namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

template <typename C>
C value_of(C x) {
  return x;
}
[[maybe_unused]] float value_of(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct Shape {
  int64_t height, width, channels;

  int64_t pixels() const { return height * width; }
  Shape after(const OperationSource& op) const {
    return {ceil_div(height, op.stride), ceil_div(width, op.stride), op.out_channels};
  }
};

template <typename T>
struct Map {
  T* data = nullptr;
  Shape shape{};
  MapMoments<Compute<T>> moments{};  // null where nobody asks for them
};

constexpr int64_t kStreamedBytes = 16 << 20;  // maps of this size leave the cache before they are read again
constexpr int64_t kMostSegments = 8;  // of a map, whose products `finish` sums up separately

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
      if (op.expand || (op.kind == kIdentity && needs_moments_[n + 1])) needs_moments_[s_.nodes[n].parent + 1] = 1;
    }
    captured_.resize(1 + s_.stem_blocks.size() + num_nodes + leaves);
    times_.resize(num_layers_ + 3);
  }

  void pack(const ParallelFor& parallel_for) override {
    std::vector<const OperationSource*> sources{&s_.stem, &s_.head};
    for (const auto& block : s_.stem_blocks) sources.push_back(&block);
    for (const auto& op : s_.operations) sources.push_back(&op);
    std::vector<PackedOperation<T>> packed(sources.size());
    Arena arena;
    struct Piece {
      int64_t operation;
      int64_t bytes[7];
      int64_t offset[7];
    };
    std::vector<Piece> pieces;
    for (std::size_t i = 0; i < sources.size(); ++i) {
      const OperationSource& o = *sources[i];
      const int64_t hidden = o.hidden_channels, se = o.se_channels;
      const auto pointwise = [&](const void* weight, int64_t out, int64_t in) -> int64_t {
        return weight ? packed_pointwise_size<T>(out, in, k_.depth_multiple) * int64_t{sizeof(T)} : 0;
      };
      const int64_t c = sizeof(C);
      Piece piece{static_cast<int64_t>(i),
                  {pointwise(o.expand, hidden, o.in_channels), pointwise(o.project, o.out_channels, depth(o)),
                   o.depthwise ? padded(hidden) * o.kernel * o.kernel * c : 0, se ? padded(se) * hidden * c : 0,
                   se ? padded(se) * c : 0, se ? padded(hidden) * se * c : 0, se ? padded(hidden) * c : 0},
                  {}};
      for (int part = 0; part < 7; ++part) piece.offset[part] = arena.allocate(piece.bytes[part] + 1);
      pieces.push_back(piece);
    }
    const int64_t classifier = arena.allocate(padded(s_.classes) * s_.head.out_channels * int64_t{sizeof(C)});
    const int64_t classifier_bias = arena.allocate(padded(s_.classes) * int64_t{sizeof(C)});
    packed_bytes_ = arena.size();
    char* memory = packed_memory_.at_least(packed_bytes_);
    parallel_for(static_cast<int64_t>(sources.size()) + 1, 1 << 20, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (i == static_cast<int64_t>(sources.size())) {
          classifier_ = reinterpret_cast<C*>(memory + classifier);
          classifier_bias_ = reinterpret_cast<C*>(memory + classifier_bias);
          pack_pointwise<C>(static_cast<const C*>(s_.classifier_weight), s_.classes, s_.head.out_channels,
                            linear_width(), 1, classifier_);
          pack_bias<C>(static_cast<const C*>(s_.classifier_bias), s_.classes, classifier_bias_);
          continue;
        }
        char* parts[7];
        for (int part = 0; part < 7; ++part) parts[part] = memory + pieces[i].offset[part];
        packed[i] = pack_operation(*sources[i], parts);
      }
    });
    stem_ = packed[0];
    head_ = packed[1];
    stem_blocks_.assign(packed.begin() + 2, packed.begin() + 2 + static_cast<int64_t>(s_.stem_blocks.size()));
    operations_.assign(packed.begin() + 2 + static_cast<int64_t>(s_.stem_blocks.size()), packed.end());
  }

  int64_t needed_bytes(const std::vector<PathStep>& steps, int64_t count, int64_t height, int64_t width,
                       Statistics statistics) const override {
    return lay_out(steps, count, height, width, statistics).bytes;
  }

  void start(const std::vector<PathStep>& steps, const Batch& batch, Statistics statistics) override {
    steps_ = steps;
    batch_ = batch;
    statistics_ = statistics;
    layout_ = lay_out(steps, batch.count, batch.height, batch.width, statistics);
    memory_.at_least(layout_.bytes);
    next_step_ = -1;
  }

  bool advance(double seconds, const ParallelFor& parallel_for) override {
    parallel_for_ = &parallel_for;
    const double since = now();
    do {
      if (next_step_ < 0) {
        run_stem();
      } else {
        run_node(steps_[next_step_].node);
      }
      ++next_step_;
    } while (next_step_ < static_cast<int64_t>(steps_.size()) && now() - since < seconds);
    return next_step_ == static_cast<int64_t>(steps_.size());
  }

  const std::vector<StageTime>& times() const override { return times_; }
  const char* kernels() const override { return k_.name; }
  int64_t packed_bytes() const override { return packed_bytes_; }

 private:
  // ---- weights

  const OperationSource& operation_of(int64_t node) const { return s_.operations[s_.nodes[node].op]; }

  static int64_t depth(const OperationSource& o) {
    return o.kind == kConvBn ? o.in_channels * o.kernel * o.kernel : o.hidden_channels;
  }

  // The classifier and squeeze-excitation are computed in C, whose groups are as wide as T's.
  int64_t linear_width() const { return k_.group_width; }

  PackedOperation<T> pack_operation(const OperationSource& o, char* const (&parts)[7]) const {
    PackedOperation<T> p;
    p.source = o;
    const int64_t width = k_.group_width, hidden = o.hidden_channels, se = o.se_channels;
    const auto pointwise = [&](const void* weight, int64_t out, int64_t in, char* target) -> T* {
      if (!weight) return nullptr;
      pack_pointwise<T>(static_cast<const C*>(weight), out, in, width, k_.depth_multiple,
                        reinterpret_cast<T*>(target));
      return reinterpret_cast<T*>(target);
    };
    p.expand = pointwise(o.expand, hidden, o.in_channels, parts[0]);
    p.project = pointwise(o.project, o.out_channels, depth(o), parts[1]);
    if (o.depthwise) {
      p.depthwise = reinterpret_cast<C*>(parts[2]);
      pack_depthwise<C>(static_cast<const C*>(o.depthwise), hidden, o.kernel * o.kernel, width, p.depthwise);
    }
    if (se > 0) {
      p.se_reduce = reinterpret_cast<C*>(parts[3]);
      p.se_reduce_bias = reinterpret_cast<C*>(parts[4]);
      p.se_expand = reinterpret_cast<C*>(parts[5]);
      p.se_expand_bias = reinterpret_cast<C*>(parts[6]);
      pack_pointwise<C>(static_cast<const C*>(o.se_reduce_weight), se, hidden, linear_width(), 1, p.se_reduce);
      pack_pointwise<C>(static_cast<const C*>(o.se_expand_weight), hidden, se, linear_width(), 1, p.se_expand);
      pack_bias<C>(static_cast<const C*>(o.se_reduce_bias), se, p.se_reduce_bias);
      pack_bias<C>(static_cast<const C*>(o.se_expand_bias), hidden, p.se_expand_bias);
    }
    if (o.expand) p.batch_norms[kExpandBn] = pack_batch_norm<C>(o.batch_norms[kExpandBn], hidden);
    if (o.depthwise) p.batch_norms[kDepthwiseBn] = pack_batch_norm<C>(o.batch_norms[kDepthwiseBn], hidden);
    if (o.project) p.batch_norms[kProjectBn] = pack_batch_norm<C>(o.batch_norms[kProjectBn], o.out_channels);
    return p;
  }

  // ---- memory

  struct Layout {
    int64_t bytes = 0;
    std::vector<int64_t> map;       // offset of the stem's output and of each node's; identities share their parent's
    std::vector<Shape> shape;       // likewise
    std::vector<int64_t> stem_map;  // of the stem's convolution and blocks; the last is map[0]
    int64_t depthwise, partials, segments, gates, squeezed, pooled, logits;
  };

  int64_t map_bytes(int64_t count, const Shape& shape, bool moments) const {
    const int64_t values = (count * shape.pixels() + kSlackRows) * padded(shape.channels);
    const int64_t lines = (values * int64_t{sizeof(T)} + 63) / 64 * 64;
    return lines + (moments ? MapMoments<C>::size(shape.channels) * int64_t{sizeof(C)} : 0);
  }

  static bool of_batch(Statistics statistics) {
    return statistics == Statistics::kBatch || statistics == Statistics::kCapture;
  }

  Layout lay_out(const std::vector<PathStep>& steps, int64_t count, int64_t height, int64_t width,
                 Statistics statistics) const {
    Layout result;
    Arena arena;
    const bool batch = of_batch(statistics);
    int64_t depthwise = 0, partials = 0, segments = 0, hidden = 0, squeezed = 0;
    const auto consider = [&](const OperationSource& o, const Shape& in) {
      const Shape out = in.after(o);
      hidden = std::max(hidden, o.se_channels ? padded(o.hidden_channels) : 0);
      squeezed = std::max(squeezed, padded(o.se_channels));
      if (!batch || o.kind == kIdentity) return;
      const SlabCut cut(count, out.pixels());
      const int64_t blocks = cut.slabs * ceil_div(cut.images * out.pixels(), kBlockPixels);
      partials = std::max({partials, cut.slabs * 3 * padded(o.hidden_channels),
                           std::max(blocks, ceil_div(count * out.pixels(), kBlockPixels)) * 3 * padded(o.out_channels)});
      depthwise = std::max(depthwise, count * out.pixels() * padded(o.hidden_channels));
    };
    const auto map = [&](const Shape& shape, bool moments) {
      if (moments && batch) {
        const int64_t stride = padded(shape.channels);
        segments = std::max(segments, segments_of(count * shape.pixels()) * stride * (stride + 1));
      }
      return arena.allocate(map_bytes(count, shape, moments && batch));
    };

    Shape shape{height, width, s_.stem.in_channels};
    consider(s_.stem, shape);
    shape = shape.after(s_.stem);
    result.stem_map.push_back(map(shape, s_.stem_blocks.empty() ? needs_moments_[0] : expands(0)));
    for (std::size_t i = 0; i < s_.stem_blocks.size(); ++i) {
      consider(s_.stem_blocks[i], shape);
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
      consider(o, in);
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

    int64_t bytes = arena.size();
    const auto add = [&](int64_t count_of, int64_t size) {
      const int64_t offset = bytes;
      bytes += (count_of * size + 63) / 64 * 64;
      return offset;
    };
    result.depthwise = add(depthwise, sizeof(T));
    result.partials = add(partials, sizeof(double));
    result.segments = add(segments, sizeof(double));
    result.gates = add(2 * count * hidden, sizeof(C));
    result.squeezed = add(count * squeezed, sizeof(C));
    result.pooled = add(count * padded(s_.head.out_channels), sizeof(C));
    result.logits = add(count * s_.classes, sizeof(C));
    result.bytes = bytes;
    return result;
  }

  bool expands(std::size_t stem_block) const { return s_.stem_blocks[stem_block].expand != nullptr; }

  static int64_t segments_of(int64_t pixels) { return std::min(kMostSegments, ceil_div(pixels, kGramPixels)); }

  template <typename V>
  V* at(int64_t offset) const {
    return reinterpret_cast<V*>(memory_.get() + offset);
  }

  Map<T> map_at(int64_t offset, const Shape& shape, bool moments) const {
    Map<T> map{at<T>(offset), shape, {}};
    if (moments && of_batch(statistics_)) {
      C* values = at<C>(offset + map_bytes(batch_.count, shape, false));
      map.moments = {values, values + padded(shape.channels)};
    }
    return map;
  }

  // What lies behind a map is read in whole tiles; it only has to be there and be no trap.
  void clear_slack(const Map<T>& map) const {
    const int64_t stride = padded(map.shape.channels);
    std::fill_n(map.data + batch_.count * map.shape.pixels() * stride, kSlackRows * stride, T{});
  }

  // ---- statistics

  struct Site {
    Moments<C> stages[kBatchNormStages];
  };

  // The statistics that are known before anything is computed; null with those of the batch.
  const Moments<C>* known(const PackedOperation<T>& op, int64_t stage, int64_t site) const {
    if (statistics_ == Statistics::kRunning) return &op.batch_norms[stage].running;
    if (statistics_ == Statistics::kConstants) return &captured_[site].stages[stage];
    return nullptr;
  }

  Affine<C> affine(const PackedOperation<T>& op, int64_t stage, int64_t site, const Moments<C>& moments) {
    if (statistics_ == Statistics::kCapture) captured_[site].stages[stage] = moments;
    return op.batch_norms[stage].affine(moments.mean.data(), moments.variance.data());
  }

  Affine<C> known_affine(const PackedOperation<T>& op, int64_t stage, int64_t site) {
    return affine(op, stage, site, *known(op, stage, site));
  }

  // Those of a pointwise convolution of a map.
  Moments<C> pointwise_moments(const Map<T>& in, const T* weight, int64_t channels) const {
    const int64_t stride = padded(channels), depth = in.shape.channels;
    Moments<C> result{std::vector<C>(stride), std::vector<C>(stride)};
    (*parallel_for_)(ceil_div(stride, k_.group_width), depth * depth * k_.group_width / 2,
                     [&](int64_t begin, int64_t end) {
                       for (int64_t group = begin; group < end; ++group) {
                         k_.pointwise_moments(in.moments.mean, in.moments.covariance, depth, weight, channels, group,
                                              result.mean.data(), result.variance.data());
                       }
                     });
    return result;
  }

  // ---- kernels over a whole batch

  // map = activation(map * scale + shift) + residual, and its moments where it has place for them.
  void finish(const Map<T>& map, const Affine<C>* affine, int64_t activation, const T* residual) {
    const int64_t pixels = batch_.count * map.shape.pixels(), stride = padded(map.shape.channels);
    FinishMap<T> f{map.data, map.data, pixels, map.shape.channels, nullptr, nullptr, activation, residual, nullptr};
    if (affine) {
      f.scale = affine->scale.data();
      f.shift = affine->shift.data();
    }
    std::vector<C> pilot;
    if (map.moments.mean) {
      pilot = pilot_of(f);
      f.pilot = pilot.data();
    }
    const int64_t units = ceil_div(pixels, kGramPixels), segments = segments_of(pixels), size = stride * (stride + 1);
    auto* sums = at<double>(layout_.segments);
    const int64_t parts = f.pilot ? segments : units;
    const int64_t work = kGramPixels * stride * (f.pilot ? stride / 2 : 2) * units / parts;
    (*parallel_for_)(parts, work, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        double* segment = sums + part * size;
        if (f.pilot) std::fill_n(segment, size, 0.0);
        k_.finish(f, part * units / parts, (part + 1) * units / parts, segment + stride, segment);
      }
    });
    if (f.pilot) {
      join_gram<C>(sums, segments, pixels, f.pilot, map.shape.channels, map.moments, *parallel_for_);
    }
  }

  // The mean of some pixels all over the batch.
  std::vector<C> pilot_of(const FinishMap<T>& f) const {
    const int64_t stride = padded(f.channels), samples = std::min<int64_t>(f.pixels, 64);
    FinishMap<T> sample = f;
    std::vector<T> raw(samples * stride), out(samples * stride), residual(samples * stride);
    for (int64_t i = 0; i < samples; ++i) {
      const int64_t row = i * f.pixels / samples * stride;
      std::copy_n(f.raw + row, stride, raw.data() + i * stride);
      if (f.residual) std::copy_n(f.residual + row, stride, residual.data() + i * stride);
    }
    sample.raw = raw.data();
    sample.output = out.data();
    sample.pixels = samples;
    sample.residual = f.residual ? residual.data() : nullptr;
    sample.pilot = nullptr;
    k_.finish(sample, 0, 1, nullptr, nullptr);
    const std::vector<T>& values = f.scale ? out : raw;
    std::vector<C> pilot(stride, C(0));
    for (int64_t i = 0; i < samples; ++i) {
      for (int64_t c = 0; c < stride; ++c) pilot[c] += value_of(values[i * stride + c]);
    }
    for (C& mean : pilot) {
      mean /= static_cast<C>(samples);
      if (!(mean - mean == C(0))) mean = C(0);  // what is not finite shows in the products
    }
    return pilot;
  }

  ExpandDepthwise<T> expand_depthwise(const PackedOperation<T>& op, const Map<T>& in, const Affine<C>* before,
                                      int64_t activation, const SlabCut& cut) const {
    const OperationSource& o = op.source;
    return {in.data,
            batch_.count,
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
            at<T>(layout_.depthwise),
            0,
            nullptr,
            false};
  }

  Linear<C> linear(const C* in, int64_t rows, int64_t in_stride, int64_t depth_of, const C* weight, const C* bias,
                   int64_t channels, int64_t activation, C* out) const {
    return {in, rows, in_stride, depth_of, weight, bias, channels, activation, out, padded(channels), true};
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
                      o.hidden_channels, gate, gates));
  }

  void linear_everywhere(const Linear<C>& l) const {
    (*parallel_for_)(ceil_div(padded(l.channels), linear_width()), l.rows * l.depth * linear_width(),
                     [&](int64_t begin, int64_t end) { k_.linear(l, begin, end); });
  }

  template <typename Body>
  void for_blocks(const SlabCut& cut, int64_t image_pixels, int64_t work, const Body& body) const {
    const int64_t blocks = ceil_div(cut.images * image_pixels, kBlockPixels);
    (*parallel_for_)(cut.slabs * blocks, work, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t slab = begin / blocks, last = std::min(end, (slab + 1) * blocks);
        const int64_t pixels = std::min(cut.images, batch_.count - slab * cut.images) * image_pixels;
        const int64_t real = std::min(last - slab * blocks, ceil_div(pixels, kBlockPixels));
        body(slab, begin - slab * blocks, real);
        begin = last;
      }
    });
  }

  // An operation with the statistics of the batch. `pending`: what the input still has to undergo.
  void bottleneck_of_batch(const PackedOperation<T>& op, int64_t site, const Map<T>& in, const Affine<C>* pending,
                           int64_t pending_activation, const Map<T>& out) {
    const OperationSource& o = op.source;
    const int64_t hidden = op.hidden_stride(), image_pixels = out.shape.pixels();
    const SlabCut cut(batch_.count, image_pixels);
    Affine<C> before;
    if (op.expand) {
      before = affine(op, kExpandBn, site, pointwise_moments(in, op.expand, o.hidden_channels));
      pending = &before;
      pending_activation = o.activation;
    }
    ExpandDepthwise<T> e = expand_depthwise(op, in, pending, pending_activation, cut);
    e.partials = at<double>(layout_.partials);
    e.streams = batch_.count * image_pixels * hidden * int64_t{sizeof(T)} >= kStreamedBytes;
    const int64_t groups = ceil_div(hidden, k_.group_width);
    const int64_t expand_work = cut.images * in.shape.pixels() * (op.expand ? o.in_channels : 1);
    const int64_t depthwise_work = cut.images * image_pixels * o.kernel * o.kernel;
    (*parallel_for_)(cut.slabs * groups, (expand_work + depthwise_work) * k_.group_width,
                     [&](int64_t begin, int64_t end) { k_.expand_depthwise(e, begin, end); });
    const auto slab_pixels = [&](int64_t slab) {
      return std::min(cut.images, batch_.count - slab * cut.images) * image_pixels;
    };
    const Affine<C> middle = affine(
        op, kDepthwiseBn, site,
        join_partials<C>(e.partials, cut.slabs, slab_pixels, o.hidden_channels, *parallel_for_));

    ProjectInput<T> p{e.output, 0, cut.images, batch_.count, image_pixels, middle.scale.data(), middle.shift.data(),
                      o.activation, nullptr};
    if (o.se_channels > 0) {
      C* pooled = at<C>(layout_.gates);
      C* gates = pooled + batch_.count * hidden;
      const Squeeze<T> s{p, o.hidden_channels, pooled};
      (*parallel_for_)(cut.slabs, cut.images * image_pixels * hidden * 2,
                       [&](int64_t begin, int64_t end) { k_.squeeze(s, begin, end); });
      excite(op, pooled, batch_.count, at<C>(layout_.squeezed), gates,
             [&](const Linear<C>& l) { linear_everywhere(l); });
      p.gates = gates;
    }
    const PointwiseOutput<T> to{op.project, o.hidden_channels, o.out_channels, out.data, nullptr, nullptr,
                                kLinear,    nullptr,           e.partials};
    for_blocks(cut, image_pixels, kBlockPixels * hidden * o.out_channels,
               [&](int64_t slab, int64_t first, int64_t last) { k_.project(p, to, slab, first, last); });
    const int64_t blocks = ceil_div(cut.images * image_pixels, kBlockPixels);
    const auto block_pixels = [&](int64_t unit) {
      return std::clamp<int64_t>(slab_pixels(unit / blocks) - unit % blocks * kBlockPixels, 0, kBlockPixels);
    };
    const Affine<C> after =
        affine(op, kProjectBn, site,
               join_partials<C>(e.partials, cut.slabs * blocks, block_pixels, o.out_channels, *parallel_for_));
    finish(out, &after, kLinear, o.residual ? in.data : nullptr);
  }

  // An operation whose statistics are known: slab by slab, and nothing but the output is stored.
  void bottleneck_with_constants(const PackedOperation<T>& op, int64_t site, const Map<T>& in, const Map<T>& out) {
    const OperationSource& o = op.source;
    const int64_t hidden = op.hidden_stride(), image_pixels = out.shape.pixels();
    const SlabCut cut(batch_.count, image_pixels);
    Affine<C> before;
    if (op.expand) before = known_affine(op, kExpandBn, site);
    const Affine<C> middle = known_affine(op, kDepthwiseBn, site), after = known_affine(op, kProjectBn, site);
    const int64_t groups = ceil_div(hidden, k_.group_width);
    const int64_t work = cut.images * hidden * (in.shape.pixels() * o.in_channels + image_pixels * o.out_channels);
    (*parallel_for_)(cut.slabs, work, [&](int64_t begin, int64_t end) {
      thread_local std::vector<T> depthwise;
      thread_local std::vector<C> pooled, squeezed;
      depthwise.resize(std::max<std::size_t>(depthwise.size(), cut.images * image_pixels * hidden));
      ExpandDepthwise<T> e = expand_depthwise(op, in, op.expand ? &before : nullptr, o.activation, cut);
      e.output = depthwise.data();
      ProjectInput<T> p{e.output, 0, cut.images, batch_.count, image_pixels, middle.scale.data(),
                        middle.shift.data(), o.activation, nullptr};
      const PointwiseOutput<T> to{op.project,        o.hidden_channels, o.out_channels,
                                  out.data,          after.scale.data(), after.shift.data(),
                                  kLinear,           o.residual ? in.data : nullptr, nullptr};
      for (int64_t slab = begin; slab < end; ++slab) {
        e.first_slab = p.first_slab = slab;
        k_.expand_depthwise(e, slab * groups, (slab + 1) * groups);
        const int64_t images = std::min(cut.images, batch_.count - slab * cut.images);
        if (o.se_channels > 0) {
          pooled.resize(2 * cut.images * hidden);
          squeezed.resize(cut.images * padded(o.se_channels));
          C* gates = pooled.data() + cut.images * hidden;
          const int64_t earlier = slab * cut.images * hidden;
          k_.squeeze({p, o.hidden_channels, pooled.data() - earlier}, slab, slab + 1);
          excite(op, pooled.data(), images, squeezed.data(), gates, [&](const Linear<C>& l) {
            k_.linear(l, 0, ceil_div(padded(l.channels), linear_width()));
          });
          p.gates = gates - earlier;
        }
        k_.project(p, to, slab, 0, ceil_div(images * image_pixels, kBlockPixels));
      }
    });
  }

  // A dense or strided convolution: `run(output, first block, last block)` is the kernel. Returns what the
  // output still has to undergo with the statistics of the batch.
  template <typename Run>
  Affine<C> convolution(const PackedOperation<T>& op, int64_t site, const Map<T>& out, const Run& run) {
    const OperationSource& o = op.source;
    const int64_t pixels = batch_.count * out.shape.pixels(), blocks = ceil_div(pixels, kBlockPixels);
    PointwiseOutput<T> to{op.project, depth(o), o.out_channels, out.data, nullptr,
                          nullptr,    o.activation, nullptr, nullptr};
    Affine<C> after;
    if (known(op, kProjectBn, site)) {
      after = known_affine(op, kProjectBn, site);
      to.scale = after.scale.data();
      to.shift = after.shift.data();
    } else {
      to.partials = at<double>(layout_.partials);
    }
    (*parallel_for_)(blocks, kBlockPixels * depth(o) * o.out_channels,
                     [&](int64_t begin, int64_t end) { run(to, begin, end); });
    if (!to.partials) return after;
    const auto count = [&](int64_t unit) { return std::min(kBlockPixels, pixels - unit * kBlockPixels); };
    return affine(op, kProjectBn, site,
                  join_partials<C>(to.partials, blocks, count, o.out_channels, *parallel_for_));
  }

  // ---- the chain

  void run_stem() {
    const double since = now();
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
    clear_slack(map);
    const Affine<C> pending =
        convolution(stem_, 0, map, [&](const PointwiseOutput<T>& to, int64_t begin, int64_t end) {
          k_.patches(images, to, begin, end);
        });
    // The first block reads the convolution as it is where it begins with the depthwise convolution.
    const bool passes_on = blocks > 0 && !stem_blocks_[0].expand && !stem_blocks_[0].source.residual;
    if (batch && !passes_on) finish(map, &pending, s_.stem.activation, nullptr);
    for (int64_t i = 0; i < blocks; ++i) {
      const PackedOperation<T>& op = stem_blocks_[i];
      shape = shape.after(op.source);
      const Map<T> out = map_at(layout_.stem_map[i + 1], shape, i + 1 < blocks ? expands(i + 1) : needs_moments_[0]);
      clear_slack(out);
      if (batch) {
        const bool raw = i == 0 && passes_on;
        bottleneck_of_batch(op, 1 + i, map, raw ? &pending : nullptr, raw ? s_.stem.activation : kLinear, out);
      } else {
        bottleneck_with_constants(op, 1 + i, map, out);
      }
      map = out;
    }
    record(0, since, map);
  }

  void run_node(int64_t node) {
    const double since = now();
    const int64_t slot = node + 1, parent = s_.nodes[node].parent + 1;
    const int64_t site = 1 + static_cast<int64_t>(stem_blocks_.size()) + node;
    const PackedOperation<T>& op = operations_[s_.nodes[node].op];
    const Map<T> in = map_at(layout_.map[parent], layout_.shape[parent], needs_moments_[parent]);
    Map<T> out = in;
    if (op.source.kind != kIdentity) {
      out = map_at(layout_.map[slot], layout_.shape[slot], needs_moments_[slot]);
      clear_slack(out);
    }
    if (op.source.kind == kConvBn) {
      const StridedInput<T> strided{in.data,          batch_.count,      in.shape.height,
                                    in.shape.width, in.shape.channels, op.source.stride};
      const Affine<C> pending =
          convolution(op, site, out, [&](const PointwiseOutput<T>& to, int64_t begin, int64_t end) {
            k_.strided(strided, to, begin, end);
          });
      if (of_batch(statistics_)) finish(out, &pending, op.source.activation, nullptr);
    } else if (op.source.kind == kInvertedBottleneck) {
      if (of_batch(statistics_)) {
        bottleneck_of_batch(op, site, in, nullptr, kLinear, out);
      } else {
        bottleneck_with_constants(op, site, in, out);
      }
    }
    record(1 + s_.nodes[node].layer, since, out);
    if (leaf_of_node_[node] >= 0) run_head(node, out);
  }

  void run_head(int64_t node, const Map<T>& in) {
    double since = now();
    const int64_t leaf = leaf_of_node_[node];
    const int64_t site = 1 + static_cast<int64_t>(stem_blocks_.size() + s_.nodes.size()) + leaf;
    const Affine<C> after =
        of_batch(statistics_)
            ? affine(head_, kProjectBn, site, pointwise_moments(in, head_.project, s_.head.out_channels))
            : known_affine(head_, kProjectBn, site);
    if (statistics_ == Statistics::kCapture) return;
    const int64_t channels = s_.head.out_channels;
    const SlabCut cut(batch_.count, in.shape.pixels());
    C* pooled = at<C>(layout_.pooled);
    const HeadPool<T> h{in.data,           batch_.count,       in.shape.pixels(),  in.shape.channels, cut.images,
                        head_.project,     channels,           after.scale.data(), after.shift.data(),
                        s_.head.activation, pooled};
    (*parallel_for_)(cut.slabs * ceil_div(padded(channels), k_.group_width),
                     cut.images * in.shape.pixels() * in.shape.channels * k_.group_width,
                     [&](int64_t begin, int64_t end) { k_.head_pool(h, begin, end); });
    C* logits = at<C>(layout_.logits);
    Linear<C> l = linear(pooled, batch_.count, padded(channels), channels, classifier_, classifier_bias_, s_.classes,
                         kNoActivation, logits);
    l.out_stride = s_.classes;
    l.padded_output = false;
    linear_everywhere(l);
    times_[num_layers_ + 1].seconds += now() - since;
    ++times_[num_layers_ + 1].calls;
    times_[num_layers_ + 1].bytes += batch_.count * s_.classes * int64_t{sizeof(C)};

    since = now();
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
    path_cross_entropy(arguments, &loss, static_cast<C*>(batch_.image_losses) + leaf * batch_.count, *parallel_for_);
    times_[num_layers_ + 2].seconds += now() - since;
    ++times_[num_layers_ + 2].calls;
    times_[num_layers_ + 2].bytes += batch_.count * int64_t{sizeof(C)};
  }

  void record(int64_t stage, double since, const Map<T>& out) {
    times_[stage].seconds += now() - since;
    ++times_[stage].calls;
    times_[stage].bytes += batch_.count * out.shape.pixels() * out.shape.channels * int64_t{sizeof(T)};
  }

  ChainSource s_;
  const Kernels<T>& k_;
  int64_t num_layers_;
  std::vector<int64_t> leaf_of_node_;  // or -1
  std::vector<char> needs_moments_;    // [node + 1], 0: the stem's output
  CachedMemory packed_memory_;
  int64_t packed_bytes_ = 0;
  PackedOperation<T> stem_, head_;
  std::vector<PackedOperation<T>> stem_blocks_, operations_;
  C *classifier_ = nullptr, *classifier_bias_ = nullptr;
  std::vector<Site> captured_;  // stem, its blocks, nodes, heads of leaves
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
  if (precision == Precision::kBFloat16 && bf16_available()) {
    return std::make_unique<Evaluation<BFloat16>>(source, bf16_kernels());
  }
  return std::make_unique<Evaluation<float>>(source, kernels_for<float>(capability));
}

}  // namespace greedynas::cpu
