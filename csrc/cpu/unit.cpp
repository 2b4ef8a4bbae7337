#include "unit.h"

#include <algorithm>
#include <span>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "arena.h"
#include "block_runner.h"
#include "capability.h"
#include "channel_copies.h"
#include "memory_cache.h"

namespace greedynas::cpu {
namespace {

bool of_batch(Statistics statistics) {
  return statistics == Statistics::kBatch || statistics == Statistics::kCapture;
}

// They read a tensor of C of any strides, not a map.
bool is_dense(const OperationSource& o) { return o.kind == kConvBn && o.kernel > 1; }

// Of its output.
int64_t activation_of(const OperationSource& o) {
  return o.kind == kInvertedBottleneck ? o.project_activation : o.activation;
}

// body(stage, channels) for each of an operation's BatchNorms.
template <typename Body>
void for_stages(const OperationSource& o, const Body& body) {
  for (const int64_t stage : {kExpandBn, kDepthwiseBn, kProjectBn}) {
    if (o.normalises(stage)) body(stage, stage == kProjectBn ? o.out_channels : o.hidden_channels);
  }
}

// Tiles project from numbers of half precision, which hold what BatchNorm has put in their range.
bool leaves_range_open(const BranchSource& branch) {
  return std::any_of(branch.operations.begin(), branch.operations.end(),
                     [](const OperationSource& o) { return o.is_separable(); });
}

template <typename T>
class Evaluation final : public UnitEvaluation {
  using C = Compute<T>;
  using Runner = BlockRunner<T>;
  static constexpr bool kNarrow = !std::is_same_v<T, C>;
  static constexpr int64_t kNowhere = -1;

 public:
  Evaluation(const UnitSource& source, const Kernels<T>& kernels) : s_(source), k_(kernels) {
    for (const BranchSource& branch : s_.branches)
      sources_.insert(sources_.end(), branch.operations.begin(), branch.operations.end());
    for (const OperationSource& o : sources_)
      for_stages(o, [&](int64_t, int64_t channels) { statistics_size_ += 2 * channels; });
  }

  void pack(const ParallelFor& parallel_for) override {
    operations_ = OperationPacker<T>(k_).pack(sources_, packed_memory_, parallel_for);
  }

  int64_t needed_bytes(int64_t count, int64_t height, int64_t width, bool wide, Statistics statistics,
                       int64_t threads) const override {
    return lay_out(count, height, width, wide, statistics, threads).workspace.end;
  }

  int64_t statistics_size() const override { return statistics_size_; }
  const char* kernels() const override { return k_.name; }

  void run(const UnitBatch& batch, Statistics statistics, const ParallelFor& parallel_for) override {
    batch_ = batch;
    statistics_ = statistics;
    parallel_for_ = &parallel_for;
    layout_ = lay_out(batch.count, batch.height, batch.width, batch.wide, statistics, batch.threads);
    CachedMemory memory;  // given back, for the next unit, when this has run
    memory_ = memory.at_least(std::max<int64_t>(1, layout_.workspace.end));
    if (!kNarrow || batch.wide) {
      run_on(input<C>());
    } else {
      run_on(input<T>());
    }
  }

 private:
  // ---- memory

  struct BranchLayout {
    std::vector<Shape> shapes;  // of what each operation reads, and of the result
    // Offsets likewise, or kNowhere: what a dense convolution reads first lies in the unit's input, and the
    // result of some units in its output.
    std::vector<int64_t> maps;
    std::vector<int64_t> widened;  // what each dense convolution reads, as rows of C; or kNowhere
  };
  struct Layout {
    std::vector<BranchLayout> branches;
    WorkspaceLayout<T> workspace;
  };

  // Whether its first operation reads the unit's input as it is.
  static bool reads_input(const BranchSource& branch) {
    return is_dense(branch.operations[0]) && branch.activation == kLinear;
  }

  // Whether the activation of what a branch reads is applied by its first operation. Tiles take no numbers
  // whose range BatchNorm has not set.
  static bool activates_on_load(const BranchSource& branch) {
    return !kTiled<T> && branch.activation != kLinear && Runner::takes_pending(branch.operations[0]);
  }

  // Whether BatchNorm and activation of an operation's output are left to the next operation.
  bool leaves(const BranchSource& branch, std::size_t operation) const {
    const OperationSource& o = branch.operations[operation];
    return of_batch(statistics_) && operation + 1 < branch.operations.size() && !o.residual &&
           o.kind != kPool && Runner::takes_pending(branch.operations[operation + 1]);
  }

  static bool needs_moments(const BranchSource& branch, std::size_t reader) {
    return reader < branch.operations.size() && branch.operations[reader].expand;
  }

  // Whether rows of the output are those of a map that the last operation can write.
  bool ends_in_output() const {
    const Channels& w = s_.branches[0].writes;
    return s_.branches.size() == 1 && !sources_.empty() && w.step == 1 && w.count == s_.out_channels &&
           row_channels<T>(s_.out_channels) == s_.out_channels;
  }

  static int64_t map_bytes(int64_t count, const Shape& shape, bool moments) {
    const int64_t lines = whole_lines(map_elements<T>(count, shape) * int64_t{sizeof(T)});
    return lines + (moments ? MapMoments<C>::size(row_channels<T>(shape.channels), shape.channels) *
                                  int64_t{sizeof(C)}
                            : 0);
  }

  Layout lay_out(int64_t count, int64_t height, int64_t width, bool wide, Statistics statistics,
                 int64_t threads) const {
    Layout result;
    Arena arena;
    WorkspaceNeeds<T> needs{count, threads, of_batch(statistics)};
    for (const BranchSource& branch : s_.branches) {
      BranchLayout& at = result.branches.emplace_back();
      const std::size_t operations = branch.operations.size();
      if (operations == 0) continue;
      const auto allocate = [&](std::size_t reader, bool elsewhere) {
        const bool moments = of_batch(statistics) && needs_moments(branch, reader);
        if (moments) needs.consider_moments(at.shapes[reader]);
        at.maps.push_back(elsewhere ? kNowhere
                                    : arena.allocate(map_bytes(count, at.shapes[reader], moments)));
      };
      at.shapes.push_back({height, width, branch.reads.count});
      allocate(0, reads_input(branch));
      if (branch.activation != kLinear) needs.consider_affine(branch.reads.count);
      for (std::size_t i = 0; i < operations; ++i) {
        const OperationSource& o = branch.operations[i];
        const Shape& in = at.shapes[i];
        needs.consider(o, in);
        const bool widens = is_dense(o) && kNarrow && (i > 0 || !wide || !reads_input(branch));
        at.widened.push_back(widens ? arena.allocate(count * in.pixels() * in.channels * int64_t{sizeof(C)})
                                    : kNowhere);
        at.shapes.push_back(in.after(o));
        allocate(i + 1, i + 1 == operations && ends_in_output());
        for (const int64_t done : {at.maps[i], at.widened[i]})
          if (done != kNowhere) arena.release(done);
      }
    }
    result.workspace = WorkspaceLayout<T>(needs, arena.size());
    return result;
  }

  template <typename V>
  V* at(int64_t offset) const {
    return reinterpret_cast<V*>(memory_ + offset);
  }

  // Whether a branch's last map, finished, is written where it belongs: its rows have no padding there.
  bool finishes_in_output(const BranchSource& branch) const {
    const Channels& w = branch.writes;
    return of_batch(statistics_) && w.step == 1 && row_channels<T>(w.count) == w.count;
  }

  // What operation `reader` of a branch reads.
  Map<T> map_of(const BranchSource& branch, const BranchLayout& layout, std::size_t reader) const {
    const int64_t offset = layout.maps[reader];
    if (offset == kNowhere) return {static_cast<T*>(batch_.output), layout.shapes[reader], {}};
    Map<T> map{at<T>(offset), layout.shapes[reader], {}};
    clear_slack(map, batch_.count);
    if (of_batch(statistics_) && needs_moments(branch, reader)) {
      C* values = at<C>(offset + map_bytes(batch_.count, map.shape, false));
      map.moments = {values, values + row_channels<T>(map.shape.channels)};
    }
    if (reader == branch.operations.size() && finishes_in_output(branch)) {
      map.finished = static_cast<T*>(batch_.output) + branch.writes.first;
      map.finished_stride = s_.out_channels;
    }
    return map;
  }

  Runner runner() const { return {k_, batch_.count, layout_.workspace.at(memory_), *parallel_for_}; }

  // ---- the unit

  template <typename S>
  TensorInput<S> input() const {
    const int64_t* s = batch_.strides;
    return {static_cast<const S*>(batch_.input),
            batch_.count,
            batch_.height,
            batch_.width,
            {s[0], s[1], s[2], s[3]}};
  }

  template <typename S>
  void run_on(const TensorInput<S>& input) {
    std::vector<Map<T>> results;
    std::size_t number = 0;  // of the operation
    int64_t column = 0;      // of its statistics
    for (std::size_t b = 0; b < s_.branches.size(); ++b) {
      const BranchSource& branch = s_.branches[b];
      const BranchLayout& layout = layout_.branches[b];
      Map<T> in{};
      if (!layout.maps.empty() && layout.maps[0] != kNowhere) {
        in = map_of(branch, layout, 0);
        gather(input, branch.reads, in, *parallel_for_);
        if (branch.activation != kLinear && !activates_on_load(branch)) {
          runner().activate(in, branch.activation);
        } else if (in.moments.mean) {
          runner().finish(in, nullptr, kLinear, nullptr);
        }
      }
      for (std::size_t i = 0; i < branch.operations.size(); ++i, ++number) {
        const OperationSource& o = branch.operations[i];
        const PackedOperation<T>& op = operations_[number];
        const Map<T> out = map_of(branch, layout, i + 1);
        const bool leaving = leaves(branch, i);
        const auto run = [&](const OperationStatistics<C>* known, OperationStatistics<C>* used) {
          Runner runs = runner();
          Affine<C> after, before = pending_.affine();
          Affine<C>* const left = leaving ? &after : nullptr;
          if (is_dense(o)) {
            const PatchInput<T> patches = i == 0 && reads_input(branch)
                                              ? patches_of(input, branch, layout)
                                              : patches_of(in, layout.widened[i], o);
            runs.patches(op, known, used, patches, out, left);
          } else if (o.kind == kPool) {
            runs.pool(op, known, used, in, out);
          } else {
            typename Runner::Pending pending;
            if (i == 0 && activates_on_load(branch)) {
              before = runs.unchanged(branch.reads.count);
              pending = {&before, branch.activation};
            } else if (i > 0 && leaves(branch, i - 1)) {
              pending = {&before, activation_of(branch.operations[i - 1])};
            }
            runs.run(op, known, used, in, out, pending, left);
          }
          if (leaving) pending_.keep(after);
        };
        run_with_statistics(op, column, run);
        in = out;
      }
      results.push_back(in);
    }
    const auto is_finished = [](const Map<T>& map) { return map.finished != nullptr; };
    if (ends_in_output() || std::all_of(results.begin(), results.end(), is_finished)) return;
    assemble(input, results);
  }

  template <typename Run>
  void run_with_statistics(const PackedOperation<T>& op, int64_t& column, const Run& run) const {
    OperationStatistics<C> statistics;
    C* values = static_cast<C*>(batch_.statistics);
    if (statistics_ == Statistics::kBatch) return run(nullptr, nullptr);
    if (statistics_ == Statistics::kRunning) return run(&op.running, nullptr);
    if (statistics_ == Statistics::kConstants) {
      for_stages(op.source, [&](int64_t stage, int64_t channels) {
        const C* mean = values + column;
        const C* variance = mean + channels;
        KeptMoments<C>& kept = statistics.stages[stage];
        kept = {std::vector<C>(mean, variance), std::vector<C>(variance, variance + channels)};
        for (std::vector<C>* each : {&kept.mean, &kept.variance}) each->resize(row_channels<T>(channels));
        column += 2 * channels;
      });
      return run(&statistics, nullptr);
    }
    run(nullptr, &statistics);
    for_stages(op.source, [&](int64_t stage, int64_t channels) {
      std::copy_n(statistics.stages[stage].mean.data(), channels, values + column);
      std::copy_n(statistics.stages[stage].variance.data(), channels, values + column + channels);
      column += 2 * channels;
    });
  }

  // What a dense convolution reads at the beginning of a branch.
  template <typename S>
  PatchInput<T> patches_of(const TensorInput<S>& input, const BranchSource& branch,
                           const BranchLayout& layout) const {
    const OperationSource& o = branch.operations[0];
    const Channels& reads = branch.reads;
    if constexpr (std::is_same_v<S, C>) {
      return {input.values + reads.first * input.strides[1],
              input.images,
              input.height,
              input.width,
              reads.count,
              {input.strides[0], reads.step * input.strides[1], input.strides[2], input.strides[3]},
              o.kernel,
              o.stride};
    } else {
      C* rows = at<C>(layout.widened[0]);
      for_rows(input.images, input.height, input.width * reads.count, *parallel_for_,
               [&](int64_t image, int64_t y) {
                 copy_row(input, reads, image, y,
                          rows + (image * input.height + y) * input.width * reads.count, reads.count, 1);
               });
      return patches_of_rows(rows, reads.count, layout.shapes[0], o);
    }
  }

  // What one reads of a map.
  PatchInput<T> patches_of(const Map<T>& in, int64_t widened, const OperationSource& o) const {
    const Shape& shape = in.shape;
    const int64_t stride = row_channels<T>(shape.channels), width = shape.width;
    if constexpr (!kNarrow) {
      return patches_of_rows(in.data, stride, shape, o);
    } else {
      C* rows = at<C>(widened);
      for_rows(batch_.count, shape.height, width * shape.channels, *parallel_for_,
               [&](int64_t image, int64_t y) {
                 const int64_t first = (image * shape.height + y) * width;
                 for (int64_t x = first; x < first + width; ++x)
                   copy_channels(in.data + x * stride, 1, rows + x * shape.channels, 1, shape.channels);
               });
      return patches_of_rows(rows, shape.channels, shape, o);
    }
  }

  PatchInput<T> patches_of_rows(const C* rows, int64_t stride, const Shape& shape,
                                const OperationSource& o) const {
    return {rows,        batch_.count,   shape.height,
            shape.width, shape.channels, {shape.pixels() * stride, 1, shape.width * stride, stride},
            o.kernel,    o.stride};
  }

  // The output from the branches' results, and from the input where a branch hands it on. All of a row of
  // pixels at once: the channels of branches may take turns.
  template <typename S>
  void assemble(const TensorInput<S>& input, const std::vector<Map<T>>& results) const {
    const int64_t height = ceil_div(batch_.height, s_.stride()), width = ceil_div(batch_.width, s_.stride());
    T* output = static_cast<T*>(batch_.output);
    for_rows(batch_.count, height, width * s_.out_channels, *parallel_for_, [&](int64_t image, int64_t y) {
      const int64_t first = (image * height + y) * width;
      for (std::size_t b = 0; b < results.size(); ++b) {
        const Channels& writes = s_.branches[b].writes;
        T* to = output + first * s_.out_channels + writes.first;
        if (results[b].finished) continue;
        if (!results[b].data) {
          copy_row(input, s_.branches[b].reads, image, y, to, s_.out_channels, writes.step);
          continue;
        }
        const int64_t stride = row_channels<T>(writes.count);
        const T* from = results[b].data + first * stride;
        for (int64_t x = 0; x < width; ++x)
          copy_channels(from + x * stride, 1, to + x * s_.out_channels, writes.step, writes.count);
      }
    });
  }

  // What one operation leaves to the next, of the former's memory.
  struct KeptAffine {
    std::vector<C> scale, shift;
    std::span<const C> factor;

    void keep(const Affine<C>& affine) {
      scale.assign(affine.scale.begin(), affine.scale.end());
      shift.assign(affine.shift.begin(), affine.shift.end());
      factor = affine.factor;
    }
    Affine<C> affine() { return {scale, shift, factor}; }
  };

  UnitSource s_;
  const Kernels<T>& k_;
  std::vector<OperationSource> sources_;  // of all branches
  int64_t statistics_size_ = 0;
  CachedMemory packed_memory_;
  std::vector<PackedOperation<T>> operations_;

  UnitBatch batch_{};
  Statistics statistics_ = Statistics::kBatch;
  Layout layout_;
  KeptAffine pending_;
  char* memory_ = nullptr;
  const ParallelFor* parallel_for_ = nullptr;
};

}  // namespace

std::unique_ptr<UnitEvaluation> make_unit_evaluation(const UnitSource& source, Precision precision) {
  const Capability capability = used_capability();
  if (precision == Precision::kFloat64)
    return std::make_unique<Evaluation<double>>(source, kernels_for<double>(capability));
  if (precision == Precision::kFloat32)
    return std::make_unique<Evaluation<float>>(source, kernels_for<float>(capability));
  const bool ranges = std::any_of(source.branches.begin(), source.branches.end(), leaves_range_open);
  if (capability == kAmx && !ranges)
    return std::make_unique<Evaluation<TiledBFloat16>>(source, tiled_kernels());
  if (*bf16_kernels_name() == '\0') throw std::invalid_argument("bf16: expected a processor that has it");
  return std::make_unique<Evaluation<BFloat16>>(source, bf16_kernels());
}

}  // namespace greedynas::cpu
