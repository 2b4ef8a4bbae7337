"""Chains of which fused kernels run parts: traversals, memory, parts of batches, precisions, and what is counted.

The oracle is the loop over the supernet's own forward; tolerances as in test_adapt.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cells import Cells
from foreign_by_path import SplitNet
from foreign_supernets import FOREIGN, by_argument, covering, make, own_losses
from supernets import draw_images, randomise, relative_error
from test_adapt import FP64
from torch import Tensor, nn

from greedynas_ext import adapt, evaluate_paths, explain

NAMES = ["spos", "split units"]


def own(name: str, net: nn.Module, images: Tensor, targets: Tensor, bn: str = "batch") -> Tensor:
    return own_losses(net, FOREIGN[name].run, covering(FOREIGN[name].sizes), images, targets, bn)


def evaluated(name: str, net: nn.Module, images: Tensor, targets: Tensor, **options: Any) -> Any:
    return evaluate_paths(adapt(net), covering(FOREIGN[name].sizes), images, targets, per_image=True, **options)


def needed(error: pytest.ExceptionInfo[ValueError]) -> int:
    return int(str(error.value).split("at least ")[1].split(" ")[0])


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_a_batch(name: str) -> None:
    net, (images, targets) = make(name), draw_images(5, 20)
    result = evaluated(name, net, images, targets, micro_batch=3)
    expected = torch.cat([own(name, net, images[part], targets[part]) for part in (slice(3), slice(3, 5))], 1)
    assert relative_error(result.image_losses, expected) < FP64


@pytest.mark.parametrize("bn", ["batch", "running"])
@pytest.mark.parametrize("name", NAMES)
def test_traversals_and_memory(name: str, bn: Any) -> None:
    net, (images, targets) = make(name), draw_images(6, 20)
    expected = own(name, net, images, targets, bn)
    with pytest.raises(ValueError, match="max_memory: expected at least") as refused:
        evaluated(name, net, images, targets, bn=bn, max_memory=1)
    for allowed in (needed(refused), 64 << 20):
        result = evaluated(name, net, images, targets, bn=bn, max_memory=allowed)
        assert relative_error(result.image_losses, expected) < FP64
        assert result.plan.macs_fused > 0.9 * result.plan.macs_computed
        plenty = allowed == 64 << 20
        assert result.plan.traversal == ("layer-by-layer" if plenty else "depth-first")
        assert (result.plan.batch_split > 1) == (bn == "running" and not plenty)


@pytest.mark.parametrize("name", NAMES)
def test_memory_that_kernels_need_is_bounded(name: str) -> None:
    """What is asked for covers their working memory too, not only that of the modules."""
    net, (images, targets) = make(name), draw_images(2, 20)
    with pytest.raises(ValueError, match="max_memory: expected at least") as fused:
        evaluated(name, net, images, targets, max_memory=1)
    with pytest.raises(ValueError, match="max_memory: expected at least") as modules:
        evaluated(name, net, images, targets, max_memory=1, fused=False)
    assert needed(fused) > needed(modules)


@pytest.mark.parametrize("how", ["precision", "autocast", "dtype"])
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16(name: str, how: str) -> None:
    """Losses within 0.1, as the modules' own in bfloat16; of values of 2 to 5 after some twenty roundings of 0.4%."""
    net = make(name, torch.float32)
    if how == "dtype":
        net.bfloat16()
    images, targets = draw_images(8, 20, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        options = {"precision": "bf16"} if how == "precision" else {}
        result = evaluated(name, net, images, targets, **options)
        modules = evaluated(name, net, images, targets, **options, fused=False)
    assert result.plan.macs_fused > 0.9 * result.plan.macs_computed, result.plan.kernels
    assert modules.plan.macs_fused == 0
    expected = own(name, net.double(), images.double(), targets).mean(1)
    for each in (result, modules):
        assert float((each.losses.double() - expected).abs().max()) < 0.1


def test_what_runs_as_modules_is_not_counted_and_named() -> None:
    net, (images, targets) = make("split units"), draw_images(3, 20)
    paths = covering(FOREIGN["split units"].sizes)
    view = adapt(net)
    plan = evaluate_paths(view, paths, images, targets).plan
    assert plan.kernels.startswith("partly fused; modules: supernet.head: view: expected a mean"), plan.kernels
    units = paths[(paths[:, 1] != 3).nonzero().flatten()]
    every = evaluate_paths(adapt(make("spos")), covering((4, 4, 4, 4)), images, targets).plan
    assert every.kernels.startswith("fused part by part: supernet.choices[0][0]: "), every.kernels
    # The classifier is torch's.
    assert every.macs_computed - every.macs_fused == 32 * 5 * len(covering((4, 4, 4, 4)).unique(dim=0))
    # Without stored statistics an operation runs as the module that it is.
    stage = net.stages["stage1"]["unit3"].branch2
    stage[1] = nn.BatchNorm2d(10, track_running_stats=False).double().train()
    running = evaluate_paths(view, units, images, targets, bn="running", per_image=True)
    batch = evaluate_paths(view, units, images, targets)
    assert running.plan.macs_computed == batch.plan.macs_computed
    lacking = running.plan.macs_computed - running.plan.macs_fused
    assert lacking > batch.plan.macs_computed - batch.plan.macs_fused
    expected = own_losses(net, FOREIGN["split units"].run, units, images, targets, "running")
    assert relative_error(running.image_losses, expected) < FP64


def test_weights_are_seen_as_they_are() -> None:
    """Packed anew for each evaluation, whatever wrote to them."""
    net, (images, targets) = make("spos"), draw_images(3, 20)
    view = adapt(net)
    paths = covering(FOREIGN["spos"].sizes, 0)
    evaluate_paths(view, paths, images, targets)
    unit = net.features[1][0]
    unit.branch_main[0].weight.data.mul_(-1.5)
    unit.branch_main[3].weight = nn.Parameter(unit.branch_main[3].weight.detach().flip(2))
    unit.branch_main[4].eps = 0.1
    result = evaluate_paths(view, paths, images, targets, per_image=True)
    expected = own_losses(net, FOREIGN["spos"].run, paths, images, targets)
    assert relative_error(result.image_losses, expected) < FP64


def test_a_strided_candidate_beside_one_that_is_not() -> None:
    """A candidate that computes another shape fails as it does in the supernet's own loop."""
    net = make("split units")
    assert isinstance(net, SplitNet)
    net.stages["stage1"]["unit5"] = nn.Sequential(nn.Conv2d(20, 20, 3, 2, 1), nn.BatchNorm2d(20)).double()
    images, targets = draw_images(3, 20)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
        evaluate_paths(adapt(net), [[0, 1, 0]], images, targets)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
        evaluate_paths(adapt(net, verify=False), [[0, 1, 0]], images, targets)


@pytest.mark.parametrize("bn", ["batch", "running"])
def test_separable_convolutions_and_poolings(bn: Any) -> None:
    """Those that have kernels run fused, others as they are beside them, in the same trie."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        net = Cells().double()
    randomise(net, 4)
    images, targets = draw_images(3, 11)
    paths = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    result = evaluate_paths(adapt(net), paths, images, targets, bn=bn, per_image=True)
    expected = own_losses(net, by_argument, paths, images, targets, bn)
    assert relative_error(result.image_losses, expected) < FP64
    assert result.plan.nodes_per_layer == (6, 36)
    pixels = 11 * 11
    separable = pixels * (2 * 8 * 9 + 2 * 64)
    stem = pixels * 3 * 8 * 9
    assert result.plan.macs_fused == stem + 2 * separable * (1 + 6)
    dilated = "partly fused; modules: supernet.choices[0][2]: 1: expected dilation 1, got (2, 2)"
    assert result.plan.kernels.startswith(dilated), result.plan.kernels
    reasons = explain(adapt(net), paths, images, bn=bn).reasons
    modules = {f"supernet.choices[{layer}][{op}]" for layer in (0, 1) for op in (2, 5)}
    assert set(reasons) == {*modules, "supernet.head"}
