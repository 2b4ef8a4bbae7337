"""`prepare_paths`: the same losses as `evaluate_paths`, launch after launch, of the weights and images of the time."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from foreign_supernets import FOREIGN, covering, make
from supernets import draw_images, odd_supernet
from test_fused_spaces import covering_paths, make_supernet, small_space, small_supernet
from test_fused_staleness import CHANGES
from torch import nn

from greedynas_ext import adapt, evaluate_paths, prepare_paths

# Of test_fused_staleness: what leaves the parameters' memory, and the operations, where they are.
IN_PLACE = [
    "sgd",
    "adamw_foreach",
    "adamw_fused",
    "data_in_place",
    "no_grad_copy",
    "inference_mode_write",
    "numpy_view",
    "numpy_view_of_squeeze_excitation",
    "load_state_dict",
    "ema_copied_back",
]


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("losses", "accuracy", "top_k"))


@pytest.mark.parametrize("bn", ["batch", "running", "recalibrated"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_is_the_evaluation(dtype: torch.dtype, bn: Any) -> None:
    net = small_supernet(dtype)
    images, targets = draw_images(6, 17, dtype=dtype)
    options: dict[str, Any] = {"k": 2, "bn": bn, "label_smoothing": 0.1, "per_image": True}
    if bn == "recalibrated":
        options["calibration"] = draw_images(7, 17, seed=4, dtype=dtype)[0]
    paths = covering_paths(net)
    found = prepare_paths(net, paths, images, targets, **options).result()
    expected = evaluate_paths(net, paths, images, targets, fused=True, **options)
    assert same(found, expected)
    assert torch.equal(found.image_losses, expected.image_losses)
    assert found.plan == expected.plan
    assert found.statistics == expected.statistics


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_changes_in_place_are_seen(name: str, dtype: torch.dtype) -> None:
    net = small_supernet(torch.float64)
    images, targets = draw_images(6, 17, dtype=torch.float64)
    if dtype == torch.bfloat16:  # weights that have to be converted at each launch
        net, images = net.to(dtype), images.to(dtype)
    paths = covering_paths(net)
    prepared = prepare_paths(net, paths, images, targets, k=1)
    before = prepared.result()
    if dtype == torch.bfloat16:
        changed = small_supernet(torch.float64)
        CHANGES[name](changed)
        net.load_state_dict(changed.state_dict())
    else:
        CHANGES[name](net)
    prepared.launch()
    after = prepared.result()
    assert not torch.equal(after.losses, before.losses)
    assert same(after, evaluate_paths(net, paths, images, targets, k=1, fused=True))


@pytest.mark.parametrize("name", sorted(set(CHANGES) - set(IN_PLACE)))
def test_other_memory_and_other_operations_are_never_passed_over(name: str) -> None:
    """Nobody gets the losses of weights that the supernet no longer has."""
    net = small_supernet(torch.float64)
    images, targets = draw_images(6, 17, dtype=torch.float64)
    paths = covering_paths(net)
    prepared = prepare_paths(net, paths, images, targets, k=1)
    prepared.result()
    CHANGES[name](net)
    prepared.launch()
    found = None
    with contextlib.suppress(RuntimeError):
        found = prepared.result()
    if found is not None:  # the change has left all of it where it was
        assert same(found, evaluate_paths(net, paths, images, targets, k=1))


@pytest.mark.parametrize("name", ["data_replaced", "load_state_dict_assign", "ema_swapped_storages", "eps_attribute"])
def test_other_memory_and_other_operations_are_an_error(name: str) -> None:
    net = small_supernet(torch.float64)
    images, targets = draw_images(6, 17, dtype=torch.float64)
    prepared = prepare_paths(net, covering_paths(net), images, targets)
    CHANGES[name](net)
    prepared.launch()
    with pytest.raises(RuntimeError, match="prepare again"):
        prepared.result()


def test_images_and_targets_are_read_in_place() -> None:
    net = small_supernet(torch.float32)
    images, targets = draw_images(6, 17, dtype=torch.float32)
    paths = covering_paths(net)
    prepared = prepare_paths(net, paths, images, targets, k=1)
    next_images, next_targets = draw_images(6, 17, seed=9, dtype=torch.float32)
    images.copy_(next_images)
    targets.copy_(next_targets)
    prepared.launch()
    assert same(prepared.result(), evaluate_paths(net, paths, next_images, next_targets, k=1))


def test_memory_that_a_parameter_left_is_kept() -> None:
    net = small_supernet(torch.float64)
    images, targets = draw_images(6, 17, dtype=torch.float64)
    prepared = prepare_paths(net, covering_paths(net), images, targets)
    expected = prepared.result().losses
    originals = [parameter.data for parameter in net.parameters()]
    for parameter in net.parameters():
        parameter.data = torch.full_like(parameter, float("nan"))
    prepared.launch()
    for parameter, original in zip(net.parameters(), originals, strict=True):
        parameter.data = original
    assert torch.equal(prepared.result().losses, expected)


def test_what_it_refuses() -> None:
    net = small_supernet(torch.float32)
    images, targets = draw_images(6, 17, dtype=torch.float32)
    paths = covering_paths(net)
    with pytest.raises(ValueError, match="supernet: expected one that the fused kernels can evaluate"):
        prepare_paths(odd_supernet(), torch.zeros(1, 4, dtype=torch.int64), images.double(), targets)
    with pytest.raises(ValueError, match="calibration"):
        prepare_paths(net, paths, images, targets, bn="recalibrated")
    with pytest.raises(ValueError, match="k: expected"):
        prepare_paths(net, paths, images, targets, k=100)
    with pytest.raises(TypeError, match="images"):
        prepare_paths(net, paths, [(images, targets)], targets)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="targets"):
        prepare_paths(net, paths, images, targets[:-1])
    with pytest.raises(ValueError, match="images: expected finite"):
        prepare_paths(net, paths, images / 0, targets)


def test_a_copy_is_another_supernet() -> None:
    """What is prepared goes on reading the supernet that it was prepared for."""
    net = make_supernet(small_space(), torch.float32)
    images, targets = draw_images(6, 17, dtype=torch.float32)
    prepared = prepare_paths(net, covering_paths(net), images, targets)
    expected = prepared.result().losses
    other = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    prepared.launch()
    assert torch.equal(prepared.result().losses, expected)


@pytest.mark.parametrize("bn", ["batch", "running"])
def test_biases_of_convolutions_before_batch_norm(bn: Any) -> None:
    """They are in the means that the kernels are given, which have to be computed anew at each launch."""
    net = small_supernet(torch.float64)
    part = net.choices[1][0].expand
    part.conv.bias = nn.Parameter(torch.linspace(-1, 1, part.conv.out_channels, dtype=torch.float64))
    images, targets = draw_images(6, 17, dtype=torch.float64)
    paths = covering_paths(net)
    prepared = prepare_paths(net, paths, images, targets, k=1, bn=bn)
    before = prepared.result()
    with torch.no_grad():
        part.conv.bias.mul_(-2)
        part.bn.running_mean.add_(0.1)
    prepared.launch()
    after = prepared.result()
    assert same(after, evaluate_paths(net, paths, images, targets, k=1, bn=bn, fused=True))
    assert torch.equal(after.losses, before.losses) == (bn == "batch")
    part.bn.running_mean = part.bn.running_mean.clone()
    with pytest.raises(RuntimeError, match="prepare again"):
        prepared.result()


def test_an_adapted_supernet() -> None:
    net = make("fairnas")
    view = adapt(net, **FOREIGN["fairnas"].arguments)
    images, targets = draw_images(6, 20)
    paths = covering(FOREIGN["fairnas"].sizes)
    prepared = prepare_paths(view, paths, images, targets, k=2)
    before = prepared.result()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.1)
    prepared.launch()
    after = prepared.result()
    assert not torch.equal(after.losses, before.losses)
    assert same(after, evaluate_paths(view, paths, images, targets, k=2, fused=True))
    for name, module in net.named_children():
        setattr(net, name, copy.deepcopy(module))
    with pytest.raises(RuntimeError, match="call adapt again"):
        prepared.result()
