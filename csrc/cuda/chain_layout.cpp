// Where everything lies in the memory that an evaluation is given, and which nodes are worked on together.
#include <algorithm>
#include <map>
#include <tuple>

#include "arena.h"
#include "chain_evaluation.h"

namespace greedynas::cuda {
namespace {

// Depthwise outputs of nodes that are worked on together.
constexpr int64_t kGroupBytes = int64_t{256} << 20;

}  // namespace

ChainPlaces::Shape ChainPlaces::Shape::after(const OperationSource& op) const {
  return {ceil_div(height, op.stride), ceil_div(width, op.stride), int_of(op.out_channels)};
}

template <typename T>
bool Evaluation<T>::stem_moments(std::size_t map) const {
  return map == source_.stem_blocks.size() ? needs_moments_[0] != 0
                                           : source_.stem_blocks[map].expand != nullptr;
}

template <typename T>
int64_t Evaluation<T>::map_bytes(int64_t count, const Map& m) const {
  const int64_t row = row_channels(m.shape.channels);
  const int64_t values = aligned(count * m.shape.pixels() * row * int64_t{sizeof(T)});
  return values + (m.moments ? aligned(row * (row + 1) * int64_t{sizeof(float)}) : 0);
}

// Runs of steps of one layer, cut into groups of operations that are alike.
template <typename T>
std::vector<std::vector<int32_t>> Evaluation<T>::groups_of(const std::vector<PathStep>& steps, int64_t count,
                                                           const std::vector<Map>& maps) const {
  std::vector<std::vector<int32_t>> groups;
  for (std::size_t first = 0; first < steps.size();) {
    const int32_t layer = source_.nodes[steps[first].node].layer;
    std::size_t last = first;
    using Key = std::tuple<int64_t, int64_t, int64_t, int64_t, bool>;
    struct Open {
      std::size_t group;
      int64_t bytes;
    };
    std::map<Key, Open> open;
    for (; last < steps.size() && source_.nodes[steps[last].node].layer == layer; ++last) {
      const int32_t node = steps[last].node;
      const OperationSource& op = operation_of(node);
      const int64_t bytes = count * maps[node + 1].shape.pixels() * row_channels(int_of(op.hidden_channels)) *
                            int64_t{sizeof(StoredOf<T>)};
      const auto [place, fresh] = open.try_emplace(
          Key{op.kind, op.kernel, op.stride, op.activation, op.se_channels > 0}, Open{groups.size(), 0});
      Open& group = place->second;
      if (!fresh &&
          (group.bytes + bytes > kGroupBytes || groups[group.group].size() == std::size_t{kMaxNodes})) {
        group = {groups.size(), 0};
      }
      if (group.group == groups.size()) groups.emplace_back();
      groups[group.group].push_back(node);
      group.bytes += bytes;
    }
    first = last;
  }
  return groups;
}

template <typename T>
ChainPlaces::Space Evaluation<T>::space(const OperationSource& op, const Map& in, const Map& out,
                                        int64_t count, bool leaf, int64_t& end) const {
  const auto take = [&](int64_t size, int64_t elements) {
    const int64_t offset = end;
    end += aligned(size * elements);
    return offset;
  };
  constexpr int64_t kFloat = sizeof(float);
  const int64_t hidden = row_channels(int_of(op.hidden_channels)), row = row_channels(out.shape.channels),
                head = leaf ? row_channels(int_of(source_.head.out_channels)) : 0;
  const int64_t all_pixels = count * out.shape.pixels();
  int64_t partials = 0;
  if (op.kind != kIdentity) partials = 4 * row * pointwise_units<T>(all_pixels);
  if (op.kind == kInvertedBottleneck) {
    ExpandDepthwise<T> e{};
    e.images = int_of(count);
    e.height = int_of(in.shape.height);
    e.width = int_of(in.shape.width);
    e.in_channels = int_of(op.in_channels);
    e.hidden_channels = int_of(op.hidden_channels);
    e.kernel = int_of(op.kernel);
    e.stride = int_of(op.stride);
    partials = std::max(partials, 4 * hidden * expand_depthwise_units(e));
  }
  const bool squeezes = op.se_channels > 0;
  Space s{};
  s.affines[kExpandBn] = take(kFloat, 3 * std::max(hidden, head));
  s.affines[kDepthwiseBn] = take(kFloat, 3 * hidden);
  s.affines[kProjectBn] = take(kFloat, 3 * row);
  s.depthwise = take(sizeof(StoredOf<T>), all_pixels * hidden);
  s.partials = take(kFloat, partials);
  s.finish = take(kFloat, out.moments ? finish_map_floats<T>(all_pixels, out.shape.channels) : 0);
  s.pooled = take(kFloat, count * std::max(squeezes ? hidden : 0, head));
  s.squeezed = take(kFloat, count * op.se_channels);
  s.gates = take(kFloat, squeezes ? count * hidden : 0);
  s.logits = take(kFloat, leaf ? count * source_.classes : 0);
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
    m.offset = arena.allocate(map_bytes(count, m));
    return m;
  };
  const auto consider = [&](const OperationSource& op, const Map& in, const Map& out) {
    int64_t end = 0;
    space(op, in, out, count, false, end);
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
    int64_t end = 0;
    for (const int32_t node : group) {
      const int64_t slot = node + 1, parent = source_.nodes[node].parent + 1;
      const OperationSource& op = operation_of(node);
      result.maps[slot] =
          op.kind == kIdentity ? result.maps[parent] : place(result.maps[slot].shape, needs_moments_[slot]);
      space(op, result.maps[parent], result.maps[slot], count, leaf, end);
    }
    most_space = std::max(most_space, end);
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
#define INSTANTIATE(T)                                                                                      \
  template ChainPlaces::Space Evaluation<T>::space(const OperationSource&, const Map&, const Map&, int64_t, \
                                                   bool, int64_t&) const;                                   \
  template ChainPlaces::Layout Evaluation<T>::lay_out(const std::vector<PathStep>&, int64_t, int64_t,       \
                                                      int64_t, Statistics) const;                           \
  template int64_t Evaluation<T>::needed_bytes(const std::vector<PathStep>&, int64_t, int64_t, int64_t,     \
                                               Statistics) const;
INSTANTIATE(float)
INSTANTIATE(BFloat16)
INSTANTIATE(Half)
#undef INSTANTIATE

}  // namespace greedynas::cuda
