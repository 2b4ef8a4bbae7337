// Launches for any number of nodes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace greedynas::cuda {

template <typename Node>
void launch_groups(const std::vector<Node>& nodes, void (*function)(const Group<Node>&, Stream),
                   Stream stream) {
  for (std::size_t first = 0; first < nodes.size(); first += kMaxNodes) {
    Group<Node> group{};
    group.count = static_cast<int>(std::min<std::size_t>(kMaxNodes, nodes.size() - first));
    std::copy_n(nodes.begin() + static_cast<int64_t>(first), group.count, group.nodes);
    function(group, stream);
  }
}

}  // namespace greedynas::cuda
