#include "path_plan.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace greedynas {

PathPlan::PathPlan(const int64_t* paths, int64_t num_paths, int64_t num_layers) : num_layers_(num_layers) {
  if (num_paths < 1 || num_layers < 1) {
    throw std::invalid_argument("paths: expected at least one path of at least one layer, got [" +
                                std::to_string(num_paths) + ", " + std::to_string(num_layers) + "]");
  }
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  if (num_paths > kMax / num_layers) {
    throw std::invalid_argument("paths: expected fewer than 2^31 entries, got [" + std::to_string(num_paths) +
                                ", " + std::to_string(num_layers) + "]");
  }
  for (int64_t i = 0; i < num_paths * num_layers; ++i) {
    if (paths[i] < 0 || paths[i] > kMax) {
      throw std::invalid_argument("paths: expected operation indices in [0, 2^31), got " +
                                  std::to_string(paths[i]) + " in path " + std::to_string(i / num_layers) +
                                  ", layer " + std::to_string(i % num_layers));
    }
  }

  // `order` keeps the paths sorted by their prefix: a stable sort by (node so far, next operation), layer by
  // layer, makes equal prefixes neighbours and numbers the nodes of each layer in order of parent, then
  // operation.
  std::vector<int32_t> order(num_paths);
  std::iota(order.begin(), order.end(), 0);
  leaf_of_path_.assign(num_paths, kStem);
  for (int64_t layer = 0; layer < num_layers; ++layer) {
    const auto op = [&](int32_t path) { return paths[path * num_layers + layer]; };
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
      if (leaf_of_path_[a] != leaf_of_path_[b]) return leaf_of_path_[a] < leaf_of_path_[b];
      return op(a) < op(b);
    });
    int32_t parent = kStem;
    int64_t last_op = -1;  // no operation has this index, so the first path always opens a node
    for (const int32_t path : order) {
      if (last_op != op(path) || parent != leaf_of_path_[path]) {
        parent = leaf_of_path_[path];
        last_op = op(path);
        nodes_.push_back({static_cast<int32_t>(layer), static_cast<int32_t>(last_op), parent});
      }
      leaf_of_path_[path] = static_cast<int32_t>(nodes_.size()) - 1;
    }
  }
}

std::vector<PathStep> PathPlan::steps(Traversal traversal) const {
  const auto num_nodes = static_cast<int32_t>(nodes_.size());
  // Node ids ascend by layer and children of a parent are neighbours, so the last child is the one with the
  // highest id in either traversal: it is the step that frees the parent.
  std::vector<int32_t> first_child(num_nodes + 1, -1), last_child(num_nodes + 1, -1);  // [parent + 1]
  for (int32_t node = 0; node < num_nodes; ++node) {
    const int32_t slot = nodes_[node].parent + 1;
    if (first_child[slot] < 0) first_child[slot] = node;
    last_child[slot] = node;
  }
  const auto step_of = [&](int32_t node) {
    return PathStep{node, last_child[nodes_[node].parent + 1] == node};
  };

  std::vector<PathStep> steps;
  steps.reserve(num_nodes);
  if (traversal == Traversal::kLayerByLayer) {
    for (int32_t node = 0; node < num_nodes; ++node) steps.push_back(step_of(node));
    return steps;
  }
  std::vector<int32_t> stack;
  const auto push_children = [&](int32_t parent) {
    if (first_child[parent + 1] < 0) return;
    for (int32_t child = last_child[parent + 1]; child >= first_child[parent + 1]; --child)
      stack.push_back(child);
  };
  push_children(kStem);
  while (!stack.empty()) {
    const int32_t node = stack.back();
    stack.pop_back();
    steps.push_back(step_of(node));
    push_children(node);
  }
  return steps;
}

int64_t PathPlan::peak_bytes(Traversal traversal, const std::vector<int64_t>& output_bytes) const {
  if (static_cast<int64_t>(output_bytes.size()) != num_layers_ + 1) {
    throw std::invalid_argument("output_bytes: expected " + std::to_string(num_layers_ + 1) +
                                " entries (the stem and each layer), got " +
                                std::to_string(output_bytes.size()));
  }
  const auto bytes_of = [&](int32_t node) {
    return output_bytes[node == kStem ? 0 : nodes_[node].layer + 1];
  };
  int64_t alive = bytes_of(kStem), peak = alive;
  for (const PathStep& step : steps(traversal)) {
    const PathNode& node = nodes_[step.node];
    alive += bytes_of(step.node);
    peak = std::max(peak, alive);
    if (step.frees_parent) alive -= bytes_of(node.parent);
    if (node.layer == num_layers_ - 1) alive -= bytes_of(step.node);
  }
  return peak;
}

}  // namespace greedynas
