"""`choices=`, `select=` and `output=` say what adapt does not find; what is no chain is called path by path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foreign_by_attribute import ELASTIC, ElasticNet, MixedEdge, set_elastic, set_mixed_edges
from foreign_by_path import FairNet, mb
from foreign_supernets import FOREIGN, after, by_argument, covering, elastic, make, own_losses
from supernets import draw_images, randomise, relative_error
from test_adapt import FP64, assert_same, state_of
from torch import Tensor, nn

from greedynas_ext import AdaptedSupernet, adapt, evaluate_paths


def check(view: AdaptedSupernet, net: nn.Module, sizes: Sequence[int], run: Any, bn: Any = "batch") -> Any:
    """The view's losses are those of the supernet's own loop, and the supernet is left alone."""
    assert tuple(map(len, view.options)) == tuple(sizes)
    before, paths, (images, targets) = state_of(net), covering(sizes), draw_images(3, 20)
    result = evaluate_paths(view, paths, images, targets, bn=bn, per_image=True, k=2)
    assert_same(before, state_of(net))
    expected = own_losses(net, run, paths, images, targets, bn)
    assert relative_error(result.image_losses, expected) < FP64
    assert result.top_k.tolist() == expected.mean(1).argsort(stable=True)[:2].tolist()
    return result.plan


CHOICES: list[Any] = [
    ["choice_blocks.0", "choice_blocks.1", "choice_blocks.2"],
    lambda net: list(net.choice_blocks),
    lambda net: [list(ops) for ops in net.choice_blocks],
    lambda name, module: name.startswith("choice_blocks.") and isinstance(module, nn.ModuleList),
    [6, 6, 6],
    [list(range(6))] * 3,
]


@pytest.mark.parametrize("number", range(len(CHOICES)))
def test_choices_of_a_path(number: int) -> None:
    net = make("fairnas")
    view = adapt(net, choices=CHOICES[number], select="choice")
    assert view.reason is None
    check(view, net, (6, 6, 6), by_argument)


def test_part_of_the_options() -> None:
    net = make("fairnas")
    view = adapt(net, choices=[[0, 5], [4], [1, 3, 2]])
    paths, (images, targets) = torch.tensor([[0, 0, 0], [1, 0, 1], [1, 0, 2]]), draw_images(3, 20)
    result = evaluate_paths(view, paths, images, targets, per_image=True)
    real = torch.tensor([[0, 4, 1], [5, 4, 3], [5, 4, 2]])
    assert torch.equal(view.encode(real.tolist()), paths)
    assert relative_error(result.image_losses, own_losses(net, by_argument, real, images, targets)) < FP64


def test_attributes_in_another_order() -> None:
    net = make("proxyless")
    names = [name for name, module in net.named_modules() if isinstance(module, MixedEdge)]
    sizes = FOREIGN["proxyless"].sizes[::-1]
    view = adapt(net, choices=names[::-1], select="active_index")
    check(view, net, sizes, after(lambda net, path: set_mixed_edges(net, path[::-1])))
    assert adapt(net, choices=lambda name, module: isinstance(module, MixedEdge)).options[0] == tuple(
        [op] for op in range(6)
    )


@pytest.mark.parametrize("reaches", ["what it is given", "the supernet itself"])
def test_a_function_that_selects(reaches: str) -> None:
    net, sizes = make("proxyless"), FOREIGN["proxyless"].sizes
    before = state_of(net)
    view = adapt(
        net,
        choices=list(sizes),
        select=lambda module, path: set_mixed_edges(module if reaches == "what it is given" else net, path),
    )
    assert_same(before, state_of(net))
    assert (view.reason is None) == (reaches == "what it is given")
    plan = check(view, net, sizes, after(set_mixed_edges))
    assert (plan.macs_fused > 0) == (view.reason is None)


@pytest.mark.parametrize("form", [tuple, dict])
def test_a_function_that_returns_arguments(form: type) -> None:
    net = make("fairnas")
    pack = (lambda path: (path,)) if form is tuple else (lambda path: {"choice": path})
    view = adapt(net, choices=[6, 6, 6], select=lambda module, path: pack(path))
    assert view.reason is None
    check(view, net, (6, 6, 6), by_argument)


class Branching(FairNet):
    def forward(self, x: Tensor, choice: Sequence[int]) -> Tensor:
        return super().forward(x if x.sum() > 0 else x * 2, choice)


class BranchingElastic(ElasticNet):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else x * 2)


class TwoAtOnce(nn.Module):
    """Two choices read the same map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.left = nn.ModuleList([mb(6, 6, 3, 1, 2), mb(6, 6, 5, 1, 2), nn.Identity()])
        self.right = nn.ModuleList([mb(6, 6, 3, 1, 2), mb(6, 6, 5, 1, 3)])
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor, path: Sequence[int]) -> Tensor:
        x = self.stem(x)
        return self.fc((self.left[path[0]](x) + self.right[path[1]](x)).mean((2, 3)))


class Entangled(TwoAtOnce):
    """What the second layer does depends on the first."""

    def forward(self, x: Tensor, path: Sequence[int]) -> Tensor:
        x = self.left[path[0]](self.stem(x))
        x = self.right[path[1]](x)
        return self.fc((x * 2 if path[0] == 1 and path[1] == 1 else x).mean((2, 3)))


class SharedEdge(nn.Module):
    """One choice that two places follow."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3)
        self.edges = nn.ModuleList([MixedEdge([mb(6, 6, 3, 1, 2), mb(6, 6, 5, 1, 2)]) for _ in range(2)])
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for edge in (self.edges[0], self.edges[1], self.edges[0]):
            x = edge(x)
        return self.fc(x.mean((2, 3)))


def prepared(net: nn.Module) -> nn.Module:
    randomise(net)
    return net.double()


NO_CHAINS: list[tuple[str, Any, tuple[int, ...], Any, dict[str, Any]]] = [
    ("forward depends on data", Branching, (6, 6, 6), by_argument, {"choices": CHOICES[0]}),
    ("layers 0 and 1 are not one after the other", TwoAtOnce, (3, 2), by_argument, {}),
    ("forward does something else", Entangled, (3, 2), by_argument, {}),
    ("layers 0 and 1 are not one after the other", SharedEdge, (2, 2), after(set_mixed_edges), {}),
    (
        "forward depends on data",
        BranchingElastic,
        tuple(map(len, ELASTIC)),
        elastic,
        {"choices": ELASTIC, "select": set_elastic},
    ),
]


@pytest.mark.parametrize("number", range(len(NO_CHAINS)))
def test_what_is_no_chain_is_called_path_by_path(number: int) -> None:
    reason, build, sizes, run, arguments = NO_CHAINS[number]
    net = prepared(build())
    view = adapt(net, **arguments)
    assert view.reason is not None
    assert reason in view.reason
    assert reason in repr(view)
    plan = check(view, net, sizes, run)
    assert plan.kernels == f"modules: called path by path: {view.reason}"
    assert plan.nodes_per_layer == (len(covering(sizes).unique(dim=0)),) * len(sizes)
    with pytest.raises(AttributeError, match="is no chain"):
        view.choices  # noqa: B018
    with pytest.raises(ValueError, match="called path by path"):
        evaluate_paths(view, covering(sizes), *draw_images(3, 20), fused=True)


def test_the_same_path_is_called_once() -> None:
    net = prepared(TwoAtOnce())
    calls = []
    net.stem.register_forward_hook(lambda *args: calls.append(1))
    paths = torch.tensor([[1, 0], [2, 1], [1, 0]])
    images, targets = draw_images(3, 20)
    result = evaluate_paths(adapt(net), paths, images, targets)
    assert len(calls) == 2
    assert result.losses[0] == result.losses[2]
    assert result.plan.nodes_per_layer == (2, 2)


def test_memory_and_stages_of_a_view() -> None:
    net = make("keyed")
    view = adapt(net, output=0)
    paths, (images, targets) = covering((3, 2, 2)), draw_images(6, 20)
    how: dict[str, Any] = {"bn": "running", "per_image": True}
    whole = evaluate_paths(view, paths, images, targets, profile=True, **how)
    assert whole.profile is not None
    names = ["stem", "layer 0", "fixed 0", "layer 1", "fixed 1", "layer 2", "head", "loss"]
    assert sorted(stage.stage for stage in whole.profile) == sorted(names)
    few = evaluate_paths(view, paths, images, targets, max_memory=450_000, **how)
    assert few.plan.batch_split > 1
    assert relative_error(few.image_losses, whole.image_losses) < FP64


def test_the_part_of_the_output_that_is_the_logits() -> None:
    net = make("keyed")
    paths, (images, targets) = covering((3, 2, 2)), draw_images(3, 20)
    first = evaluate_paths(adapt(net, output=0), paths, images, targets)
    again = evaluate_paths(adapt(net, output=lambda outputs: outputs[0]), paths, images, targets)
    assert torch.equal(first.losses, again.losses)
    auxiliary = evaluate_paths(adapt(net, output=1), paths, images, targets % 3)
    assert not torch.equal(first.losses, auxiliary.losses)
    with pytest.raises(ValueError, match="expected one tensor computed from the images, got tuple"):
        adapt(net)


def test_paths_by_keys() -> None:
    view = adapt(make("keyed"), output=0)
    assert view.options == (("three", "pool", "skip"), ("avg", "dilated"), ("a", "b"))
    assert view.encode([("skip", "avg", "b"), ["three", "dilated", "a"]]).tolist() == [[2, 0, 1], [0, 1, 0]]
    with pytest.raises(ValueError, match=r"expected one of \['avg', 'dilated'\] in layer 1, got 'three' in path 0"):
        view.encode([("skip", "three", "b")])
    with pytest.raises(ValueError, match="expected 3 options in path 1, got 2"):
        view.encode([("skip", "avg", "b"), ("skip", "avg")])


class RootAttribute(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2)
        self.layers = nn.ModuleList(nn.ModuleList([mb(6, 6, k, 1, 2) for k in (3, 5)]) for _ in range(3))
        self.current: list[int] | None = None
        self.widths = [6, 6, 6]
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor, drop: float = 0.0) -> Tensor:
        assert self.current is not None
        x = F.dropout(self.stem(x), drop, self.training)
        for index in range(len(self.current)):
            x = self.layers[index][int(self.current[index])](x)
        return self.fc(x.mean((2, 3)))


def test_a_path_kept_by_the_supernet() -> None:
    net = prepared(RootAttribute())
    view = adapt(net)
    assert view.reason is None
    check(view, net, (2, 2, 2), after(lambda net, path: setattr(net, "current", list(path))))


class Spread(RootAttribute):
    def forward(self, x: Tensor, *ops: int) -> Tensor:  # type: ignore[override]
        self.current = list(ops)
        return super().forward(x)


def test_an_argument_for_each_layer() -> None:
    net = prepared(Spread())
    view = adapt(net)
    assert view.reason is None
    check(view, net, (2, 2, 2), lambda net, images, path: net(images, *path))


class Configured(nn.Module):
    """A list and an argument that are no path, beside edges that choose."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, 2)
        self.edges = nn.ModuleList([MixedEdge([mb(6, 6, k, 1, 2) for k in (3, 5)]) for _ in range(3)])
        self.depths = [2, 1]
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor, scales: Sequence[int] = (1, 1)) -> Tensor:
        x, first = self.stem(x), 0
        for depth, scale in zip(self.depths, scales, strict=True):
            for edge in self.edges[first : first + depth]:
                x = edge(x) * scale
            first += depth
        return self.fc(x.mean((2, 3)))


def test_what_only_looks_like_a_path_is_none() -> None:
    net = prepared(Configured())
    view = adapt(net)
    assert view.options == (([0], [1]),) * 3
    check(view, net, (2, 2, 2), after(set_mixed_edges))


class SubStage(nn.Module):
    """Is given its part of the path."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([mb(6, 6, k, 1, 2) for k in (3, 5, 7)]) for _ in range(layers))

    def forward(self, x: Tensor, path: Any) -> Tensor:
        for ops, op in zip(self.layers, path.tolist(), strict=True):
            x = ops[op](x)
        return x


class Staged(nn.Module):
    """As if the path were a tensor; the last layer is told its option alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 6, 3, 2), nn.Linear(6, 5)
        self.stages = nn.ModuleList([SubStage(2), SubStage(1)])
        self.last = Told([mb(6, 6, k, 1, 2) for k in (3, 5)])

    def forward(self, x: Tensor, path: Any) -> Tensor:
        x, first = self.stem(x), 0
        for stage in self.stages:
            x = stage(x, path[first : first + len(stage.layers)])
            first += len(stage.layers)
        return self.fc(self.last(x, which=path[3]).mean((2, 3)))


class Told(nn.Module):
    def __init__(self, ops: Sequence[nn.Module]) -> None:
        super().__init__()
        self.ops = nn.ModuleList(ops)

    def forward(self, x: Tensor, which: Any) -> Tensor:
        return self.ops[which.item()](x)


def test_modules_are_told_their_part_of_the_path() -> None:
    net = prepared(Staged())
    view = adapt(net)
    assert view.reason is None
    check(view, net, (3, 3, 3, 2), lambda net, images, path: net(images, torch.tensor(path)))
