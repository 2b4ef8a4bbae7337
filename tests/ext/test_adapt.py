"""Supernets of other makings are adapted: losses equal those of their own forwards, and most of the work is fused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from foreign_supernets import FOREIGN, covering, make, own_losses
from supernets import draw_images, relative_error
from torch import nn

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
    assert plan.num_layers == len(foreign.sizes)
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


@pytest.mark.parametrize("name", FOREIGN)
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


@pytest.mark.parametrize("name", [name for name in FOREIGN if name != "elastic"])
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
