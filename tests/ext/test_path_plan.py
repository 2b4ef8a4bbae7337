"""The path plan against a trie written with Python dictionaries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from greedynas_ext.plan import EvaluationPlan, Trie

_plan = pytest.importorskip("greedynas_ext._plan")
PathPlan, Traversal = _plan.PathPlan, _plan.Traversal
TRAVERSALS = [Traversal.DEPTH_FIRST, Traversal.LAYER_BY_LAYER]


@st.composite
def path_sets(draw: st.DrawFn) -> np.ndarray:
    """Few layers and operations, so that prefixes are shared; sometimes huge indices."""
    layers = draw(st.integers(1, 6))
    largest = draw(st.sampled_from([1, 2, 3, 2**31 - 1]))
    path = st.lists(st.integers(0, largest), min_size=layers, max_size=layers)
    return np.array(draw(st.lists(path, min_size=1, max_size=30)), dtype=np.int64)


def prefixes(paths: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(path[: length + 1]) for path in paths.tolist() for length in range(len(path))}


def prefix_of(nodes: list[list[int]], node: int) -> tuple[int, ...]:
    layer, op, parent = nodes[node]
    head = prefix_of(nodes, parent) if parent >= 0 else ()
    assert len(head) == layer
    return (*head, op)


@given(path_sets())
@settings(max_examples=200)
def test_nodes_are_the_unique_prefixes(paths: np.ndarray) -> None:
    plan = PathPlan(paths)
    nodes = plan.nodes.tolist()
    found = [prefix_of(nodes, node) for node in range(len(nodes))]
    assert len(found) == len(set(found))
    assert set(found) == prefixes(paths)
    assert [found[leaf] for leaf in plan.leaf_of_path.tolist()] == [tuple(path) for path in paths.tolist()]
    assert (plan.num_paths, plan.num_layers) == paths.shape
    # in order of layer; the children of a parent are neighbours, in order of operation
    keys = [(layer, parent, op) for layer, op, parent in nodes]
    assert keys == sorted(keys)


@given(path_sets())
@settings(max_examples=200)
def test_each_node_runs_once_after_its_parent_which_is_freed_at_its_last_use(paths: np.ndarray) -> None:
    plan = PathPlan(paths)
    nodes = plan.nodes.tolist()
    for traversal in TRAVERSALS:
        steps = plan.steps(traversal).tolist()
        order = [node for node, _ in steps]
        assert sorted(order) == list(range(len(nodes)))
        position = {node: index for index, node in enumerate(order)}
        uses: dict[int, list[int]] = {}
        for node, (_, _, parent) in enumerate(nodes):
            uses.setdefault(parent, []).append(position[node])
            assert parent == -1 or position[parent] < position[node]
        for node, frees in steps:
            assert bool(frees) == (position[node] == max(uses[nodes[node][2]]))
        if traversal is Traversal.LAYER_BY_LAYER:
            assert [nodes[node][0] for node in order] == sorted(nodes[node][0] for node in order)
        else:
            # a node's subtree comes before anything else
            words = [prefix_of(nodes, node) for node in order]
            assert words == sorted(words)


@given(path_sets(), st.data())
@settings(max_examples=200)
def test_peak_bytes(paths: np.ndarray, data: st.DataObject) -> None:
    """Simulated with a set of what is alive, which knows nothing of `frees_parent`."""
    plan = PathPlan(paths)
    nodes = plan.nodes.tolist()
    layers = paths.shape[1]
    sizes = data.draw(st.lists(st.integers(0, 2**40), min_size=layers + 1, max_size=layers + 1))
    for traversal in TRAVERSALS:
        order = plan.steps(traversal)[:, 0].tolist()
        peak = sizes[0]
        for index, running in enumerate(order):
            later = {nodes[node][2] for node in order[index + 1 :]}
            done = order[:index]
            alive = {node for node in done if node in later} | {running, nodes[running][2]}
            alive |= {-1} if -1 in later else set()
            peak = max(peak, sum(sizes[0] if node < 0 else sizes[nodes[node][0] + 1] for node in alive))
        assert plan.peak_bytes(traversal, sizes) == peak


def test_depth_first_needs_one_output_a_layer_and_layer_by_layer_the_widest_two() -> None:
    paths = torch.cartesian_prod(*[torch.arange(3)] * 4).numpy()
    plan = PathPlan(paths)
    assert plan.peak_bytes(Traversal.DEPTH_FIRST, [1] * 5) == 5
    assert plan.peak_bytes(Traversal.LAYER_BY_LAYER, [1] * 5) == 27 + 1  # leaves are read as they come


def test_many_paths() -> None:
    rng = np.random.default_rng(0)
    paths = rng.integers(0, 7, (5000, 21))
    plan = PathPlan(paths)
    assert len(plan.nodes) == len(prefixes(paths))
    assert len(plan.steps(Traversal.DEPTH_FIRST)) == len(plan.nodes)


def test_equal_paths_in_any_order_give_the_same_nodes() -> None:
    paths = np.array([[2, 1], [0, 1], [2, 1], [2, 0]])
    plan = PathPlan(paths)
    assert plan.nodes.tolist() == [[0, 0, -1], [0, 2, -1], [1, 1, 0], [1, 0, 1], [1, 1, 1]]
    assert plan.leaf_of_path.tolist() == [4, 2, 4, 3]
    assert np.array_equal(PathPlan(paths[::-1].copy()).nodes, plan.nodes)


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (np.zeros((0, 3), np.int64), r"at least one path of at least one layer, got \[0, 3\]"),
        (np.zeros((3, 0), np.int64), r"at least one path of at least one layer, got \[3, 0\]"),
        (np.array([[0, 1], [0, -1]]), r"indices in \[0, 2\^31\), got -1 in path 1, layer 1"),
        (np.array([[2**31, 1]]), r"indices in \[0, 2\^31\), got 2147483648 in path 0, layer 0"),
        (np.zeros(3, np.int64), r"expected \[m, layers\], got 1 dimensions"),
    ],
)
def test_bad_paths(paths: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match="paths: .*" + message):
        PathPlan(paths)


@pytest.mark.parametrize("paths", [np.zeros((1, 2)), np.zeros((1, 2), np.int32), np.zeros((2, 4), np.int64)[:, ::2]])
def test_other_dtypes_and_strides_are_refused(paths: np.ndarray) -> None:
    with pytest.raises(TypeError):
        PathPlan(paths)


def test_peak_bytes_wants_a_size_for_the_stem_and_each_layer() -> None:
    plan = PathPlan(np.array([[0, 1]]))
    with pytest.raises(ValueError, match=r"output_bytes: expected 3 entries \(the stem and each layer\), got 2"):
        plan.peak_bytes(Traversal.DEPTH_FIRST, [1, 2])


@given(path_sets(), st.data())
@settings(max_examples=50)
def test_macs_computed_and_saved(paths: np.ndarray, data: st.DataObject) -> None:
    trie = Trie(torch.from_numpy(paths))
    costs = data.draw(st.lists(st.integers(0, 9), min_size=len(trie.nodes), max_size=len(trie.nodes)))
    stem, head = 5, 3
    computed, saved = trie.macs(stem, costs, dict.fromkeys(trie.leaf_of_path, head))
    by_prefix = {prefix_of(trie._plan.nodes.tolist(), node): cost for node, cost in enumerate(costs)}
    alone = sum(
        stem + head + sum(by_prefix[tuple(path[: length + 1])] for length in range(len(path)))
        for path in paths.tolist()
    )
    assert computed == stem + sum(costs) + head * len({tuple(path) for path in paths.tolist()})
    assert computed + saved == alone
    assert sum(trie.nodes_per_layer()) == len(trie.nodes)


def test_shared_fraction() -> None:
    assert EvaluationPlan(1, 1, 1, (1,), "depth-first", 30, 10, 1, "").shared_fraction == 0.25
    assert EvaluationPlan(1, 1, 1, (1,), "depth-first", 0, 0, 1, "").shared_fraction == 0.0
