// Made of the same kernels as the evaluation of a chain: nodes that share an input share its moments.
#include "mixed_op.h"

#include <algorithm>
#include <vector>

#include "block_runner.h"
#include "capability.h"
#include "memory_cache.h"

namespace greedynas::cpu {
namespace {

template <typename T>
class MixedOpRun {
 public:
  MixedOpRun(const MixedOp<T>& arguments, const ParallelFor& parallel_for)
      : a_(arguments), k_(kernels_for<T>(used_capability())), parallel_for_(parallel_for) {}

  void run() {
    std::fill_n(a_.used_statistics, a_.nodes * a_.statistics_width, T(0));
    pack();
    const Shape in_shape{a_.height, a_.width, a_.channels};
    WorkspaceNeeds<T> needs{a_.images, a_.threads, a_.statistics == nullptr};
    if (!a_.statistics) needs.consider_moments(in_shape);
    int64_t out_elements = 1;
    for (const PackedOperation<T>& op : operations_) {
      needs.consider(op.source, in_shape);
      out_elements = std::max(out_elements, map_elements<T>(a_.images, in_shape.after(op.source)));
    }
    WorkspaceLayout<T> layout(needs, 0);
    const int64_t input = layout.add(map_elements<T>(a_.images, in_shape), sizeof(T));
    const int64_t output = layout.add(out_elements, sizeof(T));
    const int64_t moments = layout.add(MapMoments<T>::size(padded(a_.channels), a_.channels), sizeof(T));
    char* base = memory_.at_least(layout.end);
    const auto runner = [&] { return BlockRunner<T>(k_, a_.images, layout.at(base), parallel_for_); };
    Map<T> in{reinterpret_cast<T*>(base + input), in_shape, {}};
    T* out_memory = reinterpret_cast<T*>(base + output);
    T* moments_memory = reinterpret_cast<T*>(base + moments);

    std::vector<int64_t> order(a_.nodes);  // nodes by input
    for (int64_t n = 0; n < a_.nodes; ++n) order[n] = n;
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return a_.input_index[a] < a_.input_index[b]; });
    int64_t loaded = -1;
    for (const int64_t node : order) {
      const PackedOperation<T>& op = operations_[packed_of_[a_.op_index[node]]];
      const int64_t index = a_.input_index[node];
      const T* dense = a_.inputs + index * a_.images * in_shape.pixels() * a_.channels;
      if (op.source.kind == kIdentity) {
        copy_rows(dense, a_.channels, a_.outputs + node * a_.images * in_shape.pixels() * a_.channels,
                  a_.channels, in_shape.pixels(), a_.channels);
        continue;
      }
      if (index != loaded) {
        copy_rows(dense, a_.channels, in.data, padded(a_.channels), in_shape.pixels(), a_.channels);
        clear_slack(in, a_.images);
        in.moments = {};
        loaded = index;
      }
      if (op.expand && !a_.statistics && !in.moments.mean) {
        in.moments = {moments_memory, moments_memory + padded(a_.channels)};
        runner().finish(in, nullptr, kLinear, nullptr);
      }
      run_node(runner(), node, op, in, out_memory);
    }
  }

 private:
  void pack() {
    packed_of_.assign(a_.operations_count, -1);
    std::vector<OperationSource> sources;
    for (int64_t n = 0; n < a_.nodes; ++n) {
      int64_t& place = packed_of_[a_.op_index[n]];
      if (place >= 0) continue;
      place = static_cast<int64_t>(sources.size());
      sources.push_back(source_of(a_.operations[a_.op_index[n]], a_.bn_eps[a_.op_index[n]]));
    }
    operations_ = OperationPacker<T>(k_).pack(sources, packed_memory_, parallel_for_);
  }

  OperationSource source_of(const ChoiceOperation& o, const std::array<double, kBatchNormStages>& eps) const {
    const auto at = [&](int64_t offset) -> const void* {
      return offset == kNone ? nullptr : a_.weights + offset;
    };
    OperationSource s;
    s.channels_fastest = true;
    s.kind = o.kind;
    s.in_channels = o.in_channels;
    s.hidden_channels = o.hidden_channels;
    s.out_channels = o.out_channels;
    s.kernel = o.kernel;
    s.stride = o.stride;
    s.activation = o.activation;
    s.depthwise_activation = o.depthwise_activation;
    s.project_activation = o.project_activation;
    s.se_channels = o.se_channels;
    s.se_gate = o.se_gate;
    s.residual = o.residual;
    s.expand = at(o.expand_weight);
    s.depthwise = at(o.depthwise_weight);
    s.project = at(o.project_weight);
    s.se_reduce_weight = at(o.se_reduce_weight);
    s.se_reduce_bias = at(o.se_reduce_bias);
    s.se_expand_weight = at(o.se_expand_weight);
    s.se_expand_bias = at(o.se_expand_bias);
    const int64_t norms[] = {o.expand_bn, o.depthwise_bn, o.project_bn};
    for (int stage = 0; stage < kBatchNormStages; ++stage) {
      if (norms[stage] == kNone) continue;
      const int64_t channels = stage == kProjectBn ? o.out_channels : o.hidden_channels;
      s.batch_norms[stage] = {at(norms[stage]), at(norms[stage] + padded(channels)), nullptr, nullptr,
                              eps[stage]};
    }
    return s;
  }

  void run_node(BlockRunner<T> runner, int64_t node, const PackedOperation<T>& op, const Map<T>& in,
                T* out_memory) {
    const ChoiceOperation& o = a_.operations[a_.op_index[node]];
    const int64_t columns[] = {o.expand_statistics, o.depthwise_statistics, o.project_statistics};
    const Shape shape = in.shape.after(op.source);
    const Map<T> out{out_memory, shape, {}};
    OperationStatistics<T> statistics;
    if (a_.statistics) {
      const T* row = a_.statistics + node * a_.statistics_width;
      for_stages(op, [&](int64_t stage, int64_t channels) {
        const T* mean = row + columns[stage];
        statistics.stages[stage] = {std::vector<T>(mean, mean + padded(channels)),
                                    std::vector<T>(mean + padded(channels), mean + 2 * padded(channels))};
      });
      runner.run(op, &statistics, nullptr, in, out);
    } else {
      runner.run(op, nullptr, &statistics, in, out);
    }
    T* row = a_.used_statistics + node * a_.statistics_width;
    for_stages(op, [&](int64_t stage, int64_t channels) {
      std::copy_n(statistics.stages[stage].mean.data(), channels, row + columns[stage]);
      std::copy_n(statistics.stages[stage].variance.data(), channels,
                  row + columns[stage] + padded(channels));
    });
    copy_rows(out.data, padded(shape.channels),
              a_.outputs + node * a_.images * shape.pixels() * shape.channels, shape.channels, shape.pixels(),
              shape.channels);
  }

  template <typename Body>
  static void for_stages(const PackedOperation<T>& op, const Body& body) {
    if (op.expand) body(kExpandBn, op.source.hidden_channels);
    if (op.source.depthwise) body(kDepthwiseBn, op.source.hidden_channels);
    if (op.project) body(kProjectBn, op.source.out_channels);
  }

  // Rows of channels of all images' pixels; channels that only the target has become 0.
  void copy_rows(const T* source, int64_t source_stride, T* target, int64_t target_stride,
                 int64_t image_pixels, int64_t channels) const {
    constexpr int64_t kRows = 256;
    const int64_t rows = a_.images * image_pixels;
    parallel_for_(ceil_div(rows, kRows), kRows * channels, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin * kRows; r < std::min(end * kRows, rows); ++r) {
        std::copy_n(source + r * source_stride, channels, target + r * target_stride);
        std::fill_n(target + r * target_stride + channels, target_stride - channels, T(0));
      }
    });
  }

  const MixedOp<T>& a_;
  const Kernels<T>& k_;
  const ParallelFor& parallel_for_;
  CachedMemory packed_memory_, memory_;
  std::vector<PackedOperation<T>> operations_;  // those that nodes use
  std::vector<int64_t> packed_of_;              // where in `operations_`, or -1
};

}  // namespace

template <typename T>
void mixed_op(const MixedOp<T>& arguments, const ParallelFor& parallel_for) {
  MixedOpRun<T>(arguments, parallel_for).run();
}

template void mixed_op<float>(const MixedOp<float>&, const ParallelFor&);
template void mixed_op<double>(const MixedOp<double>&, const ParallelFor&);

}  // namespace greedynas::cpu
