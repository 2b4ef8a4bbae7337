// From paths to the order in which a supernet computes them.
//
// The activations after layer l (and, with batch statistics, the statistics as well) depend on the first l +
// 1 choices of a path alone. Paths that begin alike therefore share their beginning exactly: the set of paths
// is a prefix trie, each node of it is one operation run on one input, and each is run once.
//
// This file knows nothing of torch and of devices.
#pragma once

#include <cstdint>
#include <vector>

namespace greedynas {

// The input of a node in the first layer: the output of the stem.
inline constexpr int32_t kStem = -1;

// One unique prefix.
struct PathNode {
  int32_t layer;
  int32_t op;      // which operation of that layer
  int32_t parent;  // node whose output is the input, or kStem
};

// One step of a traversal: run the operation of `node` on the output of its parent.
struct PathStep {
  int32_t node;
  // True when no later step reads the parent's output, so that it can be freed once this step has run.
  bool frees_parent;

  bool operator==(const PathStep&) const = default;
};

enum class Traversal {
  kDepthFirst,  // a node's subtree before its next sibling: few outputs alive, at most one for each layer and
                // branch
  kLayerByLayer,  // all nodes of a layer before the next layer: nodes that share an input or an operation run
                  // together
};

class PathPlan {
 public:
  // `paths` is row-major [num_paths, num_layers]; every entry is a non-negative operation index.
  // Throws std::invalid_argument on an empty set of paths, on no layer, and on a negative entry.
  PathPlan(const int64_t* paths, int64_t num_paths, int64_t num_layers);

  int64_t num_paths() const { return static_cast<int64_t>(leaf_of_path_.size()); }
  int64_t num_layers() const { return num_layers_; }

  // Nodes in order of layer; in a layer, children of one parent are neighbours, in order of their operation.
  const std::vector<PathNode>& nodes() const { return nodes_; }

  // The node at which path i ends. Equal paths end at the same node.
  const std::vector<int32_t>& leaf_of_path() const { return leaf_of_path_; }

  // Each node exactly once, parents before children.
  std::vector<PathStep> steps(Traversal traversal) const;

  // Most bytes of stem and node outputs that are alive at once, the input and output of a running step
  // included. `output_bytes` has num_layers + 1 entries: the stem's output, then one node's output of each
  // layer. A leaf's output is freed as soon as the step has run (the head has read it).
  int64_t peak_bytes(Traversal traversal, const std::vector<int64_t>& output_bytes) const;

 private:
  int64_t num_layers_;
  std::vector<PathNode> nodes_;
  std::vector<int32_t> leaf_of_path_;
};

}  // namespace greedynas
