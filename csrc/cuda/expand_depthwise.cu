#include <array>
#include <map>
#include <string>

#include "expand_depthwise.cuh"

namespace greedynas::cuda {
namespace {

using expand::Device;
using expand::Layout;
using expand::Plan;

Device device() { return {multiprocessors(), shared_bytes_per_block()}; }

// The search takes some microseconds, and a chain asks for the same shapes again and again.
template <typename T>
const Plan& known_plan(const ExpandDepthwise<T>& n, const Device& device) {
  thread_local std::map<std::array<int, 9>, Plan> known;
  const std::array<int, 9> key{n.images,           n.height, n.width,  n.in_channels,
                               n.hidden_channels,  n.kernel, n.stride, device.multiprocessors,
                               device.shared_bytes};
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  return known[key] = expand::plan_of(n, device);
}

template <int K, int S, int kGroup, typename T>
void launch(const Group<ExpandDepthwise<T>>& group, const Plan& plan, const Device& device, Stream stream) {
  const Layout layout = layout_of(plan.shape, plan.tiling);
  int groups = 0;
  for (int i = 0; i < group.count; ++i) {
    groups = std::max(groups, ceil_div(row_channels(group.nodes[i].hidden_channels), kGroup));
  }
  // A block that keeps x goes through many channel groups, as long as there are blocks enough; others have
  // one.
  const int64_t enough = int64_t{4} * device.multiprocessors * resident_blocks(plan.shape, layout, device);
  int group_blocks = groups;
  if (plan.tiling.whole()) {
    const int64_t wanted = ceil_div(enough, int64_t{plan.units()} * group.count);
    group_blocks = static_cast<int>(std::min<int64_t>(groups, wanted));
  }
  const int groups_per_block = ceil_div(groups, group_blocks);
  group_blocks = ceil_div(groups, groups_per_block);
  GREEDYNAS_LAUNCH((expand::expand_depthwise_kernel<T, K, S, kGroup>),
                   dim3(static_cast<unsigned>(plan.units() * group_blocks), group.count),
                   dim3(expand::threads_of(kGroup)), layout.bytes, stream, group, plan.shape, plan.tiling,
                   layout, groups_per_block, group_blocks);
}

template <int kGroup, typename T>
void launch(const Group<ExpandDepthwise<T>>& group, const Plan& plan, const Device& device, Stream stream) {
  switch (plan.shape.kernel * 10 + plan.shape.stride) {
    case 31:
      return launch<3, 1, kGroup>(group, plan, device, stream);
    case 32:
      return launch<3, 2, kGroup>(group, plan, device, stream);
    case 51:
      return launch<5, 1, kGroup>(group, plan, device, stream);
    case 52:
      return launch<5, 2, kGroup>(group, plan, device, stream);
    case 71:
      return launch<7, 1, kGroup>(group, plan, device, stream);
    case 72:
      return launch<7, 2, kGroup>(group, plan, device, stream);
  }
  throw std::invalid_argument("expand_depthwise: kernel " + std::to_string(plan.shape.kernel) + ", stride " +
                              std::to_string(plan.shape.stride));
}

}  // namespace

template <typename T>
int expand_depthwise_units(const ExpandDepthwise<T>& node) {
  return known_plan(node, device()).units();
}

// Nodes whose channels are divided alike are one launch.
template <typename T>
void expand_depthwise(const Group<ExpandDepthwise<T>>& group, Stream stream) {
  const Device here = device();
  for (const int size : {48, 64}) {
    Group<ExpandDepthwise<T>> alike{};
    for (int i = 0; i < group.count; ++i) {
      if (known_plan(group.nodes[i], here).shape.group == size) alike.nodes[alike.count++] = group.nodes[i];
    }
    if (alike.count == 0) continue;
    const Plan& plan = known_plan(alike.nodes[0], here);
    size == 48 ? launch<48>(alike, plan, here, stream) : launch<64>(alike, plan, here, stream);
  }
}

template int expand_depthwise_units(const ExpandDepthwise<BFloat16>&);
template int expand_depthwise_units(const ExpandDepthwise<Half>&);
template void expand_depthwise(const Group<ExpandDepthwise<BFloat16>>&, Stream);
template void expand_depthwise(const Group<ExpandDepthwise<Half>>&, Stream);

}  // namespace greedynas::cuda
