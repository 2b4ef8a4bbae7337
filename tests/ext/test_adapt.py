"""Supernets of other makings are adapted: losses equal those of their own forwards, and most of the work is fused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foreign_by_path import HandSwish, InvertedResidual, mb
from foreign_supernets import FOREIGN, by_argument, covering, make, own_losses
from supernets import draw_images, relative_error
from test_fused_spaces import covering_paths, small_supernet
from torch import Tensor, nn

from greedynas_ext import AdaptedSupernet, adapt, evaluate_paths

# As in test_fused_spaces: kernels add in another order than torch.
FP64, FP32 = 1e-10, 1e-5


def adapted(name: str, net: nn.Module, **kwargs: Any) -> AdaptedSupernet:
    return adapt(net, **FOREIGN[name].arguments, **kwargs)


def state_of(net: nn.Module) -> list[Any]:
    """All that adapting and evaluating has to leave as it is."""
    values = [[key, value] for module in net.modules() for key, value in vars(module).items() if key[:1] != "_"]
    return copy.deepcopy([net.state_dict(), values, torch.get_rng_state()])


def assert_same(before: Any, after: Any) -> None:
    if isinstance(before, torch.Tensor):
        assert torch.equal(before, after)
    elif isinstance(before, dict):
        assert list(before) == list(after)
        assert_same(list(before.values()), list(after.values()))
    elif isinstance(before, list | tuple):
        assert len(before) == len(after)
        for one, other in zip(before, after, strict=True):
            assert_same(one, other)
    elif not isinstance(before, nn.Module):
        assert before == after


@pytest.mark.parametrize("bn", ["batch", "running"])
@pytest.mark.parametrize("name", FOREIGN)
def test_losses_are_those_of_the_supernets_own_loop(name: str, bn: Any) -> None:
    net, foreign = make(name), FOREIGN[name]
    before = state_of(net)
    view = adapted(name, net)
    assert tuple(map(len, view.options)) == foreign.sizes
    paths, (images, targets) = covering(foreign.sizes), draw_images(3, 20)
    result = evaluate_paths(view, paths, images, targets, bn=bn, per_image=True)
    assert_same(before, state_of(net))
    expected = own_losses(net, foreign.run, paths, images, targets, bn)
    assert relative_error(result.image_losses, expected) < FP64
    plan = result.plan
    assert plan.num_layers == foreign.num_layers
    assert plan.macs_fused >= foreign.share * plan.macs_computed, plan.kernels
    modules = evaluate_paths(view, paths, images, targets, bn=bn, per_image=True, fused=False)
    assert relative_error(modules.image_losses, expected) < FP64
    assert modules.plan.macs_fused == 0
    assert modules.plan.macs_computed == plan.macs_computed
    assert modules.plan.nodes_per_layer == plan.nodes_per_layer


@pytest.mark.parametrize("name", FOREIGN)
def test_recalibrated_statistics(name: str) -> None:
    net, foreign = make(name), FOREIGN[name]
    view, paths = adapted(name, net), covering(foreign.sizes, 0)
    images, targets = draw_images(3, 20)
    calibration, _ = draw_images(4, 20, seed=1)
    how: dict[str, Any] = {"bn": "recalibrated", "calibration": calibration, "per_image": True}
    result = evaluate_paths(view, paths, images, targets, **how)
    modules = evaluate_paths(view, paths, images, targets, **how, fused=False)
    assert relative_error(result.image_losses, modules.image_losses) < FP64
    # On the calibration images themselves, the statistics are those of the batch.
    own = evaluate_paths(view, paths, calibration, targets.new_zeros(4), **how)
    batch = own_losses(net, foreign.run, paths, calibration, targets.new_zeros(4))
    assert relative_error(own.image_losses, batch) < FP64


@pytest.mark.parametrize("name", ["spos", "fairnas, biases", "mutable ops", "elastic"])
def test_float32_and_a_training_step(name: str) -> None:
    """Nothing is copied: after a step of training the next evaluation has the new weights."""
    net, foreign = make(name, torch.float32), FOREIGN[name]
    view, paths = adapted(name, net), covering(foreign.sizes, 0)
    images, targets = draw_images(8, 32, dtype=torch.float32)
    first = evaluate_paths(view, paths, images, targets)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.05)
    output = foreign.run(net, images, paths[0].tolist())
    torch.nn.functional.cross_entropy(output, targets).backward()
    optimiser.step()
    result = evaluate_paths(view, paths, images, targets, per_image=True)
    assert not torch.equal(first.losses, result.losses)
    expected = own_losses(net.double(), foreign.run, paths, images.double(), targets)
    assert relative_error(result.losses, expected.mean(1)) < FP32


@pytest.mark.parametrize("name", ["fairnas", "proxyless", "layer choice", "keyed"])
def test_the_view_is_a_chain(name: str) -> None:
    """`stem`, `choices` and `head` alone, evaluated as any chain is."""

    class Plain:
        def __init__(self, view: AdaptedSupernet) -> None:
            self.stem, self.choices, self.head = view.stem, view.choices, view.head

    net, foreign = make(name), FOREIGN[name]
    view = adapted(name, net)
    assert view.reason is None
    paths, (images, targets) = covering(foreign.sizes), draw_images(3, 20)
    result = evaluate_paths(Plain(view), paths, images, targets, per_image=True)
    expected = own_losses(net, foreign.run, paths, images, targets)
    assert relative_error(result.image_losses, expected) < FP64


class Stage(nn.Module):
    """Two fixed blocks in a module of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = InvertedResidual(6, 6, 3, 1, 2), InvertedResidual(6, 6, 5, 1, 2)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x)) if self.scale == 1.0 else self.one(x)


class Tail(nn.Module):
    """A fixed block, and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.block = InvertedResidual(6, 8, 3, 2, 3)
        self.conv, self.bn, self.act = nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12), HandSwish()
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn(self.conv(self.block(x))))
        return self.fc(F.avg_pool2d(x, x.shape[2:]).flatten(1))


class Staged(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), Stage())
        self.layers = nn.ModuleList(nn.ModuleList([mb(6, 6, k, 1, 2) for k in (3, 5)]) for _ in range(2))
        self.stage, self.tail = Stage(), Tail()

    def forward(self, x: Tensor, path: Any) -> Tensor:
        x = self.layers[0][path[0]](self.stem(x))
        return self.tail(self.layers[1][path[1]](self.stage(x)))


def test_fixed_blocks_in_modules_of_their_own_run_fused() -> None:
    net = Staged().double()
    view, paths = adapt(net), covering((2, 2))
    images, targets = draw_images(4, 20)
    result = evaluate_paths(view, paths, images, targets, per_image=True, fused=True)
    assert result.plan.macs_fused == result.plan.macs_computed
    assert result.plan.num_layers == 2
    expected = own_losses(net, by_argument, paths, images, targets)
    assert relative_error(result.image_losses, expected) < FP64
    net.stage.scale = 0.5
    with pytest.raises(RuntimeError, match="stage's forward does something else than when it was adapted"):
        evaluate_paths(view, paths, images, targets)


class ByText(nn.Module):
    """Keys of a dictionary made of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 5)
        self.ops = nn.ModuleList(
            nn.ModuleDict({f"op{n}": mb(6, 6, k, 1, 2) for n, k in enumerate((3, 5))}) for _ in "ab"
        )

    def forward(self, x: Tensor, path: Any) -> Tensor:
        x = self.stem(x)
        for number, op in enumerate(path):
            x = self.ops[number][f"op{op + 0}"](x)
        return self.fc(x.mean((2, 3)))


def test_keys_made_of_positions() -> None:
    net = ByText().double()
    view, paths = adapt(net), covering((2, 2))
    assert view.options == ((0, 1), (0, 1))
    images, targets = draw_images(4, 20)
    result = evaluate_paths(view, paths, images, targets, per_image=True)
    expected = own_losses(net, by_argument, paths, images, targets)
    assert relative_error(result.image_losses, expected) < FP64


class Renamed(nn.Module):
    """A chain whose parts are elsewhere."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.front, self.back = nn.ModuleDict({"stem": net.stem}), nn.Sequential(net.head)
        self.cells = nn.ModuleList(nn.ModuleDict({f"op {n}": op for n, op in enumerate(ops)}) for ops in net.choices)

    def forward(self, x: Tensor, genotype: Any) -> Tensor:
        x = self.front["stem"](x)
        for cell, op in zip(self.cells, genotype, strict=True):
            x = cell[op](x)
        return self.back(x)


@pytest.mark.parametrize("bn", ["batch", "running"])
def test_another_module_tree_gives_the_same_bits(bn: Any) -> None:
    net = small_supernet(torch.float32)
    view, paths, batch = adapt(Renamed(net)), covering_paths(net), draw_images(4, 17, dtype=torch.float32)
    results = [evaluate_paths(each, paths, *batch, bn=bn, per_image=True, fused=True) for each in (view, net)]
    assert torch.equal(results[0].image_losses, results[1].image_losses)
    assert results[0].plan == results[1].plan
