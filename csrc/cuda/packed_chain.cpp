#include "packed_chain.h"

#include "launch_groups.h"

namespace greedynas::cuda {
namespace {

const float* floats(const void* p) { return static_cast<const float*>(p); }

// Gives away pieces of memory, one after the other; with no memory it counts.
class Pieces {
 public:
  explicit Pieces(char* memory) : memory_(memory) {}

  template <typename T>
  T* take(int64_t count) {
    constexpr int64_t kAlignment = 256;
    T* piece = memory_ ? reinterpret_cast<T*>(memory_ + bytes_) : nullptr;
    bytes_ += (count * int64_t{sizeof(T)} + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

bool has_stage(const OperationSource& o, int stage) {
  if (stage == kExpandBn) return o.expand != nullptr;
  if (stage == kDepthwiseBn) return o.depthwise != nullptr;
  return o.project != nullptr;
}

int dense_columns(const OperationSource& o) {
  return round_up(int_of(o.in_channels * o.kernel * o.kernel), o.kernel > 1 ? 16 : 8);
}

}  // namespace

PackedChain::PackedChain(const ChainSource& source) {
  stem.source = source.stem;
  head.source = source.head;
  for (const OperationSource& o : source.stem_blocks) stem_blocks.push_back({o});
  for (const OperationSource& o : source.operations) operations.push_back({o});
  bytes_ = place(nullptr);
}

std::vector<PackedOperation*> PackedChain::all() {
  std::vector<PackedOperation*> result{&stem, &head};
  for (PackedOperation& op : stem_blocks) result.push_back(&op);
  for (PackedOperation& op : operations) result.push_back(&op);
  return result;
}

int64_t PackedChain::place(char* memory) {
  Pieces pieces(memory);
  for (PackedOperation* op : all()) {
    const OperationSource& o = op->source;
    const int hidden = row_channels(int_of(o.hidden_channels)), in = row_channels(int_of(o.in_channels)),
              out = row_channels(int_of(o.out_channels));
    for (int stage = 0; stage < kBatchNormStages; ++stage) {
      if (!has_stage(o, stage)) continue;
      const int channels = row_channels(op->channels(stage));
      BatchNorm& norm = op->norms[stage];
      norm.gamma = pieces.take<float>(channels);
      norm.beta = pieces.take<float>(channels);
      // Values that become half-precision numbers; of the stem, where a depthwise convolution follows.
      const bool halves = stage != kProjectBn || (op == &stem && stem_passes_on());
      norm.factor = halves ? pieces.take<float>(channels) : nullptr;
      norm.eps = static_cast<float>(o.batch_norms[stage].eps);
      if (o.batch_norms[stage].mean) {
        op->running_mean[stage] = pieces.take<float>(channels);
        op->running_variance[stage] = pieces.take<float>(channels);
      }
    }
    if (o.kind == kInvertedBottleneck) {
      op->expand = pieces.take<uint16_t>(int64_t{hidden} * in);
      op->depthwise = pieces.take<uint16_t>(o.kernel * o.kernel * hidden);
      op->project = pieces.take<uint16_t>(int64_t{out} * hidden);
      op->stored_factor = pieces.take<float>(hidden);
      op->project_factor = pieces.take<float>(out);
      // The map, and the ones and zeros that it is made from.
      if (!o.expand) op->unit_affine = pieces.take<float>(5 * hidden);
    } else if (o.kind == kConvBn) {
      op->project = pieces.take<uint16_t>(int64_t{out} * dense_columns(o));
    }
  }
  return pieces.bytes();
}

void PackedChain::pack(char* memory, Stream stream) {
  place(memory);
  std::vector<PackNorm> norms;
  std::vector<PackPointwise> pointwise;
  std::vector<PackDepthwise> depthwise;
  std::vector<PackProject> project;
  std::vector<NormAffine> units;
  for (PackedOperation* op : all()) {
    const OperationSource& o = op->source;
    const int hidden = int_of(o.hidden_channels), in = int_of(o.in_channels), out = int_of(o.out_channels);
    for (int stage = 0; stage < kBatchNormStages; ++stage) {
      if (!has_stage(o, stage)) continue;
      const BatchNormSource& from = o.batch_norms[stage];
      const BatchNorm& to = op->norms[stage];
      norms.push_back({floats(from.gamma), floats(from.beta), const_cast<float*>(to.gamma),
                       const_cast<float*>(to.beta), const_cast<float*>(to.factor), op->channels(stage)});
      if (from.mean) {
        norms.push_back({floats(from.mean), floats(from.variance), op->running_mean[stage],
                         op->running_variance[stage], nullptr, op->channels(stage)});
      }
    }
    if (o.kind == kInvertedBottleneck) {
      const bool after_stem = !stem_blocks.empty() && op == stem_blocks.data() && stem_passes_on();
      const float* before = op->norms[kExpandBn].factor;
      if (after_stem) before = stem.norms[kProjectBn].factor;
      pointwise.push_back({floats(o.expand), op->expand, hidden, in, 1, row_channels(in)});
      depthwise.push_back({floats(o.depthwise), before, op->depthwise, op->stored_factor, hidden,
                           int_of(o.kernel * o.kernel)});
      project.push_back(
          {floats(o.project), op->norms[kDepthwiseBn].factor, op->project, op->project_factor, out, hidden});
      if (op->unit_affine) {
        float* ones = op->unit_affine + 3 * row_channels(hidden);
        float* zeros = ones + row_channels(hidden);
        norms.push_back({nullptr, nullptr, ones, zeros, nullptr, hidden});
        NormAffine unit{};
        unit.mean = zeros;
        unit.variance = ones;
        unit.affine = op->unit_affine;
        unit.norm = {ones, zeros, nullptr, 1e-30f};  // not 0: the padding's variance is
        unit.channels = hidden;
        unit.activation = kLinear;
        units.push_back(unit);
      }
    } else if (o.kind == kConvBn) {
      pointwise.push_back(
          {floats(o.project), op->project, out, in, int_of(o.kernel * o.kernel), dense_columns(o)});
    }
  }
  // Factors before what is divided by them.
  launch_groups(norms, pack_norms, stream);
  launch_groups(pointwise, pack_pointwise, stream);
  launch_groups(depthwise, pack_depthwise, stream);
  launch_groups(project, pack_project, stream);
  launch_groups(units, norm_affine, stream);
}

}  // namespace greedynas::cuda
