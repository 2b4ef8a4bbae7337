#include "packed_chain.h"

#include "launch_groups.h"

namespace greedynas::cuda {
namespace {

const float* floats(const void* p) { return static_cast<const float*>(p); }

// Gives away pieces of memory, one after the other; with no memory it counts.
class Pieces {
 public:
  explicit Pieces(char* memory) : memory_(memory) {}

  template <typename V>
  V* take(int64_t count) {
    constexpr int64_t kAlignment = 256;
    V* piece = memory_ ? reinterpret_cast<V*>(memory_ + bytes_) : nullptr;
    bytes_ += (count * int64_t{sizeof(V)} + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

int dense_columns(const OperationSource& o) {
  if (o.is_separable()) return row_channels(int_of(o.hidden_channels));
  return round_up(int_of(o.in_channels * o.kernel * o.kernel), o.kernel > 1 ? 16 : 8);
}

}  // namespace

template <typename T>
PackedChain<T>::PackedChain(const ChainSource& source) {
  stem.source = source.stem;
  head.source = source.head;
  for (const OperationSource& o : source.stem_blocks) stem_blocks.push_back({o});
  for (const OperationSource& o : source.operations) operations.push_back({o});
  bytes_ = place(nullptr);
}

template <typename T>
std::vector<PackedOperation<T>*> PackedChain<T>::all() {
  std::vector<PackedOperation<T>*> result{&stem, &head};
  for (PackedOperation<T>& op : stem_blocks) result.push_back(&op);
  for (PackedOperation<T>& op : operations) result.push_back(&op);
  return result;
}

template <typename T>
int64_t PackedChain<T>::place(char* memory) {
  Pieces pieces(memory);
  for (PackedOperation<T>* op : all()) {
    const OperationSource& o = op->source;
    const int hidden = row_channels(int_of(o.hidden_channels)), in = row_channels(int_of(o.in_channels)),
              out = row_channels(int_of(o.out_channels));
    for (int stage = 0; stage < kBatchNormStages; ++stage) {
      if (!o.normalises(stage)) continue;
      const int channels = row_channels(op->channels(stage));
      BatchNorm& norm = op->norms[stage];
      norm.gamma = pieces.take<float>(channels);
      norm.beta = pieces.take<float>(channels);
      // Values that become half-precision numbers; of the stem, where a depthwise convolution follows.
      const bool halves = stage != kProjectBn || (op == &stem && stem_passes_on());
      norm.factor = halves ? pieces.take<float>(channels) : nullptr;
      norm.eps = static_cast<float>(o.batch_norms[stage].eps);
      if (o.kind != kPool) op->stored_factor[stage] = pieces.take<float>(channels);
      if (o.batch_norms[stage].mean) {
        op->running_mean[stage] = pieces.take<float>(channels);
        op->running_variance[stage] = pieces.take<float>(channels);
      }
    }
    if (o.is_separable()) {
      op->plain_depthwise = pieces.take<float>(o.kernel * o.kernel * hidden);
      op->stored_factor[kDepthwiseBn] = pieces.take<float>(hidden);
      op->dense = pieces.take<WeightOf<T>>(int64_t{out} * dense_columns(o));
    } else if (o.kind == kInvertedBottleneck) {
      op->expand = pieces.take<WeightOf<T>>(int64_t{hidden} * in);
      op->depthwise = pieces.take<StoredOf<T>>(o.kernel * o.kernel * hidden);
      op->project = pieces.take<StoredOf<T>>(int64_t{out} * hidden);
      if (o.se_channels > 0) {
        const int squeezed = row_channels(int_of(o.se_channels));
        op->se_reduce = pieces.take<float>(int64_t{squeezed} * hidden);
        op->se_expand = pieces.take<float>(int64_t{hidden} * squeezed);
      }
      // The map, and the ones and zeros that it is made from.
      if (!o.expand) op->unit_affine = pieces.take<float>(5 * hidden);
    } else if (o.kind == kConvBn) {
      op->dense = pieces.take<WeightOf<T>>(int64_t{out} * dense_columns(o));
    }
  }
  return pieces.bytes();
}

template <typename T>
void PackedChain<T>::pack(char* memory, Stream stream) {
  place(memory);
  std::vector<PackNorm> norms;
  std::vector<PackPointwise<T>> pointwise;
  std::vector<PackPointwise<float>> excitations;
  std::vector<PackDepthwise<StoredOf<T>>> depthwise;
  std::vector<PackDepthwise<float>> plain_depthwise;
  std::vector<PackProject<StoredOf<T>>> project;
  std::vector<NormAffine> units;
  for (PackedOperation<T>* op : all()) {
    const OperationSource& o = op->source;
    const int hidden = int_of(o.hidden_channels), in = int_of(o.in_channels), out = int_of(o.out_channels);
    const auto pitch = [&](int channels) { return o.channels_fastest ? int_of(padded(channels)) : 0; };
    for (int stage = 0; stage < kBatchNormStages; ++stage) {
      if (!o.normalises(stage)) continue;
      const BatchNormSource& from = o.batch_norms[stage];
      const BatchNorm& to = op->norms[stage];
      norms.push_back({floats(from.gamma), floats(from.beta), const_cast<float*>(to.gamma),
                       const_cast<float*>(to.beta), const_cast<float*>(to.factor), op->channels(stage)});
      if (from.mean) {
        norms.push_back({floats(from.mean), floats(from.variance), op->running_mean[stage],
                         op->running_variance[stage], nullptr, op->channels(stage)});
      }
    }
    if (o.is_separable()) {
      plain_depthwise.push_back({floats(o.depthwise), nullptr, op->plain_depthwise,
                                 op->stored_factor[kDepthwiseBn], hidden, int_of(o.kernel * o.kernel),
                                 pitch(hidden)});
      pointwise.push_back({floats(o.project), op->dense, op->stored_factor[kProjectBn], out, hidden, 1,
                           dense_columns(o), pitch(out)});
    } else if (o.kind == kInvertedBottleneck) {
      const bool after_stem = !stem_blocks.empty() && op == stem_blocks.data() && stem_passes_on();
      const float* before = op->norms[kExpandBn].factor;
      if (after_stem) before = stem.norms[kProjectBn].factor;
      pointwise.push_back({floats(o.expand), op->expand, op->stored_factor[kExpandBn], hidden, in, 1,
                           row_channels(in), pitch(hidden)});
      depthwise.push_back({floats(o.depthwise), before, op->depthwise, op->stored_factor[kDepthwiseBn],
                           hidden, int_of(o.kernel * o.kernel), pitch(hidden)});
      project.push_back({floats(o.project), op->norms[kDepthwiseBn].factor, op->project,
                         op->stored_factor[kProjectBn], out, hidden, pitch(out)});
      if (o.se_channels > 0) {
        const int squeezed = int_of(o.se_channels);
        excitations.push_back({floats(o.se_reduce_weight), op->se_reduce, nullptr, squeezed, hidden, 1,
                               row_channels(hidden), pitch(squeezed)});
        excitations.push_back({floats(o.se_expand_weight), op->se_expand, nullptr, hidden, squeezed, 1,
                               row_channels(squeezed), pitch(hidden)});
      }
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
      pointwise.push_back({floats(o.project), op->dense, op->stored_factor[kProjectBn], out, in,
                           int_of(o.kernel * o.kernel), dense_columns(o), pitch(out)});
    }
  }
  // Factors before what is divided by them.
  launch_groups(norms, pack_norms, stream);
  launch_groups(pointwise, pack_pointwise, stream);
  launch_groups(excitations, pack_pointwise, stream);
  launch_groups(depthwise, pack_depthwise, stream);
  launch_groups(plain_depthwise, pack_depthwise, stream);
  launch_groups(project, pack_project, stream);
  launch_groups(units, norm_affine, stream);
}

template class PackedChain<float>;
template class PackedChain<BFloat16>;
template class PackedChain<Half>;

}  // namespace greedynas::cuda
