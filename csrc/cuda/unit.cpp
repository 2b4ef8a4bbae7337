#include "unit.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "arena.h"
#include "unit_runner.h"

namespace greedynas::cuda {
namespace {

bool of_batch(Statistics statistics) {
  return statistics == Statistics::kBatch || statistics == Statistics::kCapture;
}

// Of its output.
int activation_of(const OperationSource& o) {
  return int_of(o.kind == kInvertedBottleneck ? o.project_activation : o.activation);
}

ChainSource operations_of(const UnitSource& unit) {
  ChainSource source;
  for (const BranchSource& branch : unit.branches)
    source.operations.insert(source.operations.end(), branch.operations.begin(), branch.operations.end());
  return source;
}

template <typename T>
class Evaluation final : public UnitEvaluation {
  using Runner = UnitRunner<T>;
  static constexpr int64_t kElsewhere = -1;

 public:
  explicit Evaluation(const UnitSource& source) : s_(source), packed_(operations_of(source)) {
    for (const PackedOperation<T>& op : packed_.operations)
      for (int stage = 0; stage < kBatchNormStages; ++stage)
        if (op.source.normalises(stage)) statistics_size_ += 2 * padded(op.channels(stage));
  }

  int64_t packed_bytes() const override { return packed_.bytes(); }
  void pack(void* memory, Stream stream) override { packed_.pack(static_cast<char*>(memory), stream); }
  int64_t needed_bytes(int64_t count, int64_t height, int64_t width, Statistics statistics) const override {
    return lay_out(count, height, width, statistics).bytes;
  }
  int64_t statistics_size() const override { return statistics_size_; }

  void run(const UnitBatch& batch, Statistics statistics, void* memory, Stream stream) override {
    batch_ = batch;
    statistics_ = statistics;
    memory_ = static_cast<char*>(memory);
    stream_ = stream;
    layout_ = lay_out(batch.count, batch.height, batch.width, statistics);
    std::size_t number = 0;
    int64_t column = 0;  // of the statistics
    std::vector<FeatureMap<T>> results;
    for (std::size_t b = 0; b < s_.branches.size(); ++b) results.push_back(run_branch(b, number, column));
    if (!ends_in_output()) assemble(results);
  }

 private:
  // ---- memory

  struct Place {
    Shape shape;
    int64_t offset;   // or kElsewhere: in the unit's input, or its output
    int64_t moments;  // their offset, or kElsewhere: there are none
  };
  struct Layout {
    std::vector<std::vector<Place>> branches;  // what each operation reads, and the result; or none
    int64_t left_affine, workspace;            // what an operation leaves to do; of the operation that runs
    int64_t bytes;
  };

  // Whether a branch's first operation reads the unit's input where it lies.
  bool reads_input(const BranchSource& branch) const {
    const Channels& r = branch.reads;
    const bool activated = branch.activation != kLinear && !activates_on_load(branch);
    return !activated && r.step == 1 && r.count == s_.in_channels && row_channels(int_of(r.count)) == r.count;
  }

  // Blocks without expansion know the bound of an activation after a BatchNorm only.
  static bool activates_on_load(const BranchSource& branch) { return branch.operations[0].is_separable(); }

  // Whether BatchNorm and activation of an operation's output are left to the next operation.
  bool leaves(const BranchSource& branch, std::size_t operation) const {
    const OperationSource& o = branch.operations[operation];
    return of_batch(statistics_) && operation + 1 < branch.operations.size() && !o.residual &&
           o.normalises(kProjectBn) && Runner::takes_pending(branch.operations[operation + 1]);
  }

  // Whether rows of the output are those of a map that the last operation can write.
  bool ends_in_output() const {
    const BranchSource& branch = s_.branches[0];
    return s_.branches.size() == 1 && !branch.operations.empty() && branch.writes.step == 1 &&
           row_channels(int_of(s_.out_channels)) == s_.out_channels;
  }

  Layout lay_out(int64_t count, int64_t height, int64_t width, Statistics statistics) const {
    Layout result;
    Arena arena;
    int64_t most_space = 0, most_channels = 0;
    for (const BranchSource& branch : s_.branches) {
      std::vector<Place>& places = result.branches.emplace_back();
      const std::size_t operations = branch.operations.size();
      if (operations == 0) continue;
      const auto place = [&](const Shape& shape, std::size_t reader, bool elsewhere) {
        const bool measured = of_batch(statistics) && reader < operations && branch.operations[reader].expand;
        const int64_t numbers = count * shape.pixels() * row_channels(shape.channels);
        Place p{shape, kElsewhere, kElsewhere};
        if (!elsewhere) p.offset = arena.allocate(aligned(numbers * int64_t{sizeof(T)}));
        if (measured)
          p.moments = arena.allocate(aligned(moments_floats(shape.channels) * int64_t{sizeof(float)}));
        places.push_back(p);
      };
      place({height, width, int_of(branch.reads.count)}, 0, reads_input(branch));
      if (places[0].moments != kElsewhere) {
        const int64_t floats = finish_map_floats<T>(count * height * width, places[0].shape.channels);
        most_space = std::max(most_space, aligned(floats * int64_t{sizeof(float)}));
      }
      for (std::size_t i = 0; i < operations; ++i) {
        const OperationSource& o = branch.operations[i];
        const bool last = i + 1 == operations;
        place(places[i].shape.after(o), i + 1, last && ends_in_output());
        int64_t space = 0;
        Runner::workspace(o, count, places[i].shape, places[i + 1].shape, places[i + 1].moments != kElsewhere,
                          space);
        most_space = std::max(most_space, space);
        most_channels = std::max(most_channels, o.out_channels);
        for (const int64_t done : {places[i].offset, places[i].moments})
          if (done != kElsewhere) arena.release(done);
      }
    }
    result.left_affine = aligned(arena.size());
    const int64_t affine = 3 * row_channels(int_of(most_channels)) * int64_t{sizeof(float)};
    result.workspace = result.left_affine + aligned(affine);
    result.bytes = result.workspace + most_space;
    return result;
  }

  template <typename V>
  V* at(int64_t offset) const {
    return reinterpret_cast<V*>(memory_ + offset);
  }

  FeatureMap<T> map_of(const Place& place, T* elsewhere) const {
    FeatureMap<T> map{place.offset == kElsewhere ? elsewhere : at<T>(place.offset), place.shape};
    if (place.moments != kElsewhere) {
      map.mean = at<float>(place.moments);
      map.covariance = map.mean + row_channels(place.shape.channels);
    }
    return map;
  }

  // ---- the unit

  const T* input() const { return static_cast<const T*>(batch_.input); }
  Runner runner() const { return {batch_.count, memory_, stream_}; }

  // Channels of the unit's input.
  ChannelSource<T> source_of(const Channels& reads) const {
    return {input(), int_of(s_.in_channels), int_of(reads.first), int_of(reads.step), int_of(reads.count), 0,
            1};
  }

  FeatureMap<T> run_branch(std::size_t b, std::size_t& number, int64_t& column) const {
    const BranchSource& branch = s_.branches[b];
    const std::vector<Place>& places = layout_.branches[b];
    if (branch.operations.empty()) return {};
    FeatureMap<T> in = map_of(places[0], const_cast<T*>(input()));  // nobody writes to it
    if (!reads_input(branch)) gather(branch, in);
    if (in.mean) runner().take_moments(in, at<float>(layout_.workspace));
    const float* left = nullptr;
    int activation = activates_on_load(branch) ? int_of(branch.activation) : int{kLinear};
    for (std::size_t i = 0; i < branch.operations.size(); ++i, ++number) {
      BlockWork<T> w;
      w.op = &packed_.operations[number];
      set_statistics(w, column);
      w.in = in;
      w.out = map_of(places[i + 1], static_cast<T*>(batch_.output));
      int64_t end = layout_.workspace;
      w.space = Runner::workspace(w.op->source, batch_.count, w.in.shape, w.out.shape, w.out.mean, end);
      w.first_affine = left;
      w.first_activation = activation;
      w.finishes = !leaves(branch, i);
      // It outlives the operation's space. Who reads what was left there before has then done so.
      if (!w.finishes) w.space.affines[kProjectBn] = layout_.left_affine;
      runner().run(w);
      left = w.finishes ? nullptr : runner().left_affine(w);
      activation = w.finishes ? int{kLinear} : activation_of(w.op->source);
      in = w.out;
    }
    return in;
  }

  void set_statistics(BlockWork<T>& w, int64_t& column) const {
    for (int stage = 0; stage < kBatchNormStages; ++stage) {
      if (!w.op->source.normalises(stage)) continue;
      StageStatistics& s = w.statistics[stage];
      const int64_t channels = padded(w.op->channels(stage));
      float* const kept = batch_.statistics + column;
      if (statistics_ == Statistics::kCapture) {
        s.keep = kept;
      } else if (statistics_ == Statistics::kConstants) {
        s.mean = kept;
        s.variance = kept + channels;
      } else if (statistics_ == Statistics::kRunning) {
        s.mean = w.op->running_mean[stage];
        s.variance = w.op->running_variance[stage];
      }
      column += 2 * channels;
    }
  }

  // What a branch reads, activated where its first operation does not do that.
  void gather(const BranchSource& branch, const FeatureMap<T>& to) const {
    ArrangeChannels<T, T> a{};
    a.sources[0] = source_of(branch.reads);
    a.count = 1;
    a.out = to.data;
    a.out_row = row_channels(to.shape.channels);
    a.activation = activates_on_load(branch) ? int{kLinear} : int_of(branch.activation);
    a.pixels = batch_.count * to.shape.pixels();
    arrange_channels(a, stream_);
  }

  // The output from the branches' results, and from the input where a branch hands it on.
  void assemble(const std::vector<FeatureMap<T>>& results) const {
    ArrangeChannels<T, T> a{};
    a.count = int_of(static_cast<int64_t>(results.size()));
    for (std::size_t b = 0; b < results.size(); ++b) {
      const Channels& writes = s_.branches[b].writes;
      ChannelSource<T>& source = a.sources[b];
      source = source_of(s_.branches[b].reads);
      if (results[b].data) {
        const int channels = results[b].shape.channels;
        source = {results[b].data, row_channels(channels), 0, 1, channels, 0, 1};
      }
      source.to_first = int_of(writes.first);
      source.to_step = int_of(writes.step);
    }
    const int64_t height = ceil_div(batch_.height, s_.stride()), width = ceil_div(batch_.width, s_.stride());
    a.out = static_cast<T*>(batch_.output);
    a.out_row = int_of(s_.out_channels);
    a.activation = kLinear;
    a.pixels = batch_.count * height * width;
    arrange_channels(a, stream_);
  }

  UnitSource s_;
  PackedChain<T> packed_;
  int64_t statistics_size_ = 0;

  UnitBatch batch_{};
  Statistics statistics_ = Statistics::kBatch;
  Layout layout_{};
  char* memory_ = nullptr;
  Stream stream_ = nullptr;
};

}  // namespace

std::unique_ptr<UnitEvaluation> make_unit_evaluation(const UnitSource& source, Precision precision) {
  if (source.branches.size() > std::size_t{kMaxSources})
    throw std::invalid_argument("branches: expected at most " + std::to_string(kMaxSources));
  switch (precision) {
    case Precision::kBFloat16:
      return std::make_unique<Evaluation<BFloat16>>(source);
    case Precision::kHalf:
      return std::make_unique<Evaluation<Half>>(source);
    default:
      return std::make_unique<Evaluation<float>>(source);
  }
}

}  // namespace greedynas::cuda
