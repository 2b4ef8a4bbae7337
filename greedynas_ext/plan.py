"""What a set of paths costs when each unique prefix is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from greedynas_ext import _library

if TYPE_CHECKING:
    from greedynas_ext._plan import PathPlan

STEM = -1  # the parent of the nodes of the first layer


@dataclass(frozen=True)
class Node:
    """One unique prefix: operation `op` of `layer`, run on the output of node `parent` (STEM: of the stem)."""

    layer: int
    op: int
    parent: int


@dataclass(frozen=True)
class EvaluationPlan:
    """What was computed, and what sharing prefixes saved. MACs (multiply-accumulates) are of one image.

    Attributes:
        num_paths: m.
        num_layers: choice layers of the supernet; of an elastic one the places where paths differ.
        unique_nodes: operations that were run: unique prefixes of the paths.
        nodes_per_layer: the same for each layer.
        traversal: "depth-first" or "layer-by-layer".
        macs_computed: convolutions, linear layers and matrix products that were run, stem and heads included.
        macs_saved: what running each path on its own would have added.
        batch_split: images of a batch were evaluated in this many parts for `max_memory` (never where statistics
            of the batch are used).
        kernels: what computed: "fused, " and the instruction set, or "modules: " and why they ran; "partly fused; "
            where both did, and "fused part by part: " where kernels ran all parts, but not as a whole, and why.
        macs_fused: those of `macs_computed` that fused kernels ran.
    """

    num_paths: int
    num_layers: int
    unique_nodes: int
    nodes_per_layer: tuple[int, ...]
    traversal: str
    macs_computed: int
    macs_saved: int
    batch_split: int
    kernels: str
    macs_fused: int = 0

    @property
    def shared_fraction(self) -> float:
        """Fraction of the MACs of running each path on its own that sharing saved."""
        return self.macs_saved / max(1, self.macs_computed + self.macs_saved)


class Trie:
    """The plan of `paths` (int64 [m, layers], CPU) as evaluation walks it."""

    def __init__(self, paths: Tensor) -> None:
        module = _library.require_plan()
        self._traversals = {
            "depth-first": module.Traversal.DEPTH_FIRST,
            "layer-by-layer": module.Traversal.LAYER_BY_LAYER,
        }
        self._plan: PathPlan = module.PathPlan(paths.numpy())
        self.num_layers = self._plan.num_layers
        self.nodes = [Node(*row) for row in self._plan.nodes.tolist()]
        self.leaf_of_path: list[int] = self._plan.leaf_of_path.tolist()

    def steps(self, traversal: str) -> list[tuple[int, bool]]:
        """(node, whether its parent's output is read for the last time) in order of work."""
        return [(node, bool(frees)) for node, frees in self._plan.steps(self._traversals[traversal]).tolist()]

    def step_array(self, traversal: str) -> np.ndarray[Any, Any]:
        """The same as int32 [nodes, 2]."""
        return self._plan.steps(self._traversals[traversal])

    def peak_bytes(self, traversal: str, output_bytes: Sequence[int]) -> int:
        """Most bytes of outputs alive at once, given those of the stem and of a node of each layer."""
        return self._plan.peak_bytes(self._traversals[traversal], output_bytes)

    def nodes_per_layer(self) -> tuple[int, ...]:
        """Unique prefixes in each layer."""
        counts = [0] * self.num_layers
        for node in self.nodes:
            counts[node.layer] += 1
        return tuple(counts)

    def macs(self, stem: int, nodes: Sequence[int], heads: dict[int, int]) -> tuple[int, int]:
        """(computed, saved) from the MACs of the stem, of each node, and of the head at each leaf."""
        along = [0] * len(nodes)
        for number, node in enumerate(self.nodes):
            along[number] = nodes[number] + (stem if node.parent == STEM else along[node.parent])
        computed = stem + sum(nodes) + sum(heads.values())
        alone = sum(along[leaf] + heads[leaf] for leaf in self.leaf_of_path)
        return computed, alone - computed
