// Where everything lies in the memory that an evaluation is given, and which nodes are worked on together.
#include <algorithm>

#include "arena.h"
#include "chain_evaluation.h"

namespace greedynas::cuda {

template <typename T>
bool Evaluation<T>::stem_moments(std::size_t map) const {
  return map == source_.stem_blocks.size() ? needs_moments_[0] != 0
                                           : source_.stem_blocks[map].expand != nullptr;
}

// Runs of steps of one layer, cut into groups of operations that are alike.
template <typename T>
std::vector<std::vector<int32_t>> Evaluation<T>::groups_of(const std::vector<PathStep>& steps, int64_t count,
                                                           const std::vector<Map>& maps) const {
  std::vector<std::vector<int32_t>> result;
  for (std::size_t i = 0; i < steps.size();) {
    const int32_t layer = source_.nodes[steps[i].node].layer;
    AlikeGroups alike;
    for (; i < steps.size() && source_.nodes[steps[i].node].layer == layer; ++i) {
      const int32_t node = steps[i].node;
      const OperationSource& op = operation_of(node);
      alike.add(node, op, depthwise_bytes<T>(op, count, maps[node + 1].shape));
    }
    result.insert(result.end(), alike.groups().begin(), alike.groups().end());
  }
  return result;
}

template <typename T>
ChainPlaces::HeadSpace Evaluation<T>::head_space(int64_t count, int64_t& end) const {
  const int64_t row = row_channels(int_of(source_.head.out_channels));
  const auto take = [&](int64_t floats) {
    const int64_t offset = end;
    end += aligned(floats * int64_t{sizeof(float)});
    return offset;
  };
  HeadSpace s{};
  s.affine = take(3 * row);
  s.pooled = take(count * row);
  s.logits = take(count * source_.classes);
  return s;
}

template <typename T>
ChainPlaces::Layout Evaluation<T>::lay_out(const std::vector<PathStep>& steps, int64_t count, int64_t height,
                                           int64_t width, Statistics statistics) const {
  Layout result;
  Arena arena;
  const bool batch = of_batch(statistics);
  int64_t most_space = 0;
  const auto place = [&](const Shape& shape, bool moments) {
    Map m{shape, 0, moments && batch};
    int64_t bytes = aligned(count * shape.pixels() * row_channels(shape.channels) * int64_t{sizeof(T)});
    if (m.moments) bytes += aligned(moments_floats(shape.channels) * int64_t{sizeof(float)});
    m.offset = arena.allocate(bytes);
    return m;
  };
  const auto consider = [&](const OperationSource& op, const Map& in, const Map& out) {
    int64_t end = 0;
    BlockRunner<T>::workspace(op, count, in.shape, out.shape, out.moments, end);
    most_space = std::max(most_space, end);
  };

  const Map images{{height, width, int_of(source_.stem.in_channels)}, 0, false};
  result.stem_maps.push_back(place(images.shape.after(source_.stem), stem_moments(0)));
  consider(source_.stem, images, result.stem_maps[0]);
  for (std::size_t i = 0; i < source_.stem_blocks.size(); ++i) {
    const Map in = result.stem_maps[i];
    const Map out = place(in.shape.after(source_.stem_blocks[i]), stem_moments(i + 1));
    consider(source_.stem_blocks[i], in, out);
    arena.release(in.offset);
    result.stem_maps.push_back(out);
  }
  result.tasks.push_back({TaskKind::kStem, {}});

  const std::size_t slots = source_.nodes.size() + 1;
  result.maps.resize(slots);
  result.maps[0] = result.stem_maps.back();
  std::vector<int64_t> owner(slots, 0), readers(slots, 0);
  for (const PathStep& step : steps) {
    const int64_t slot = step.node + 1, parent = source_.nodes[step.node].parent + 1;
    const OperationSource& op = operation_of(step.node);
    result.maps[slot].shape = result.maps[parent].shape.after(op);
    owner[slot] = op.kind == kIdentity ? owner[parent] : slot;
    ++readers[owner[parent]];
    if (leaf_of_node_[step.node] >= 0) ++readers[owner[slot]];
  }
  const auto read = [&](int64_t slot) {
    if (--readers[owner[slot]] == 0) arena.release(result.maps[owner[slot]].offset);
  };
  for (std::vector<int32_t>& group : groups_of(steps, count, result.maps)) {
    const bool leaf = leaf_of_node_[group[0]] >= 0;
    int64_t end = 0, heads_end = 0;
    for (const int32_t node : group) {
      const int64_t slot = node + 1, parent = source_.nodes[node].parent + 1;
      const OperationSource& op = operation_of(node);
      const Map& in = result.maps[parent];
      Map& out = result.maps[slot];
      if (op.kind == kIdentity) {
        out = in;
      } else {
        out = place(out.shape, needs_moments_[slot]);
        BlockRunner<T>::workspace(op, count, in.shape, out.shape, out.moments, end);
      }
      if (leaf) head_space(count, heads_end);
    }
    most_space = std::max({most_space, end, heads_end});
    for (const int32_t node : group) {
      read(source_.nodes[node].parent + 1);
      if (leaf) read(node + 1);
    }
    if (operation_of(group[0]).kind != kIdentity) result.tasks.push_back({TaskKind::kNodes, group});
    if (leaf) {
      result.tasks.push_back({TaskKind::kHead, group});
      if (statistics != Statistics::kCapture) result.tasks.push_back({TaskKind::kLoss, group});
    }
  }
  result.stem_affine = aligned(arena.size());
  result.workspace = result.stem_affine +
                     aligned(3 * row_channels(int_of(source_.stem.out_channels)) * int64_t{sizeof(float)});
  result.bytes = result.workspace + most_space;
  return result;
}

template <typename T>
int64_t Evaluation<T>::needed_bytes(const std::vector<PathStep>& steps, int64_t count, int64_t height,
                                    int64_t width, Statistics statistics) const {
  return lay_out(steps, count, height, width, statistics).bytes;
}

// The members above, for each type.
#define INSTANTIATE(T)                                                                                  \
  template ChainPlaces::HeadSpace Evaluation<T>::head_space(int64_t, int64_t&) const;                   \
  template ChainPlaces::Layout Evaluation<T>::lay_out(const std::vector<PathStep>&, int64_t, int64_t,   \
                                                      int64_t, Statistics) const;                       \
  template int64_t Evaluation<T>::needed_bytes(const std::vector<PathStep>&, int64_t, int64_t, int64_t, \
                                               Statistics) const;
INSTANTIATE(float)
INSTANTIATE(BFloat16)
INSTANTIATE(Half)
#undef INSTANTIATE

}  // namespace greedynas::cuda
