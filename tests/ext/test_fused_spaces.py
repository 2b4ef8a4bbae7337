"""Fused losses of the search spaces equal those of the modules and of a plain loop over copies of the modules.

The supernets of the other test_fused_ files are made here too.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from supernets import draw_images, draw_paths, plain_image_losses, randomise, relative_error
from torch import Tensor, nn

from greedynas import Supernet, get_space
from greedynas.layers import Layer, Operation
from greedynas.spaces import Space
from greedynas_ext import PathEvaluation, evaluate_paths

POLICIES = ("batch", "running", "recalibrated")
# The kernels add in another order. float64 rounds at 1e-16, and 60 convolutions, each normalised by statistics of its
# own, make a million of that at the worst; a wrong weight, tap or statistic is seen from 1e-4 on.
FP64 = 1e-10
# float32 rounds at 6e-8, and the same layers make a hundred of that. Statistics over few values make it more, for the
# modules as for the kernels, so the images here leave at least 50 values for each channel of a deep supernet.
FP32 = 1e-5


def small_space(activation: str = "relu6", operations: str = "e3k3 e6k5s e1k7 id", in_channels: int = 3) -> Space:
    """Every kind of operation in few layers: channels that fill no vector, a fixed block, strides, identities."""
    return Space(
        name="small",
        in_channels=in_channels,
        num_classes=5,
        resolution=17,
        stem_channels=7,
        stem_stride=2,
        fixed=(Layer(7, 9, 1),),
        layers=(Layer(9, 12, 1), Layer(12, 12, 1), Layer(12, 20, 2)),
        operations=tuple(Operation.parse(name) for name in operations.split()),
        head_channels=24,
        activation=activation,
    )


def make_supernet(space: Space, dtype: torch.dtype = torch.float64, seed: int = 1) -> Supernet:
    """Biases and batch normalisations that are not those of a fresh module; a linear layer that tells paths apart."""
    net = Supernet(space, seed=seed)
    randomise(net, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                module.bias.normal_(0.0, 0.3, generator=generator)
        net.head.linear.weight.normal_(0.0, 0.1, generator=generator)
    return net.to(dtype)


def small_supernet(dtype: torch.dtype = torch.float64, **kwargs: Any) -> Supernet:
    return make_supernet(small_space(**kwargs), dtype)


def calibration_for(bn: str, images: Tensor) -> Tensor | None:
    """Other images of the same shape, and one more of them."""
    if bn != "recalibrated":
        return None
    generator = torch.Generator().manual_seed(17)
    shape = (len(images) + 1, *images.shape[1:])
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(images.dtype) * 1.5 + 0.2


def compare(
    net: Any, paths: Tensor, images: Tensor, targets: Tensor, *, bn: str = "batch", tolerance: float, **kwargs: Any
) -> PathEvaluation:
    """Checks a fused result against the loop in float64, and against the modules; returns it."""
    calibration = calibration_for(bn, images)
    exact = copy.deepcopy(net).double()
    smoothing = kwargs.get("label_smoothing", 0.0)
    expected, accuracy = plain_image_losses(
        exact, paths, images.double(), targets, bn, None if calibration is None else calibration.double(), smoothing
    )
    arguments: dict[str, Any] = {"bn": bn, "calibration": calibration, "per_image": True, **kwargs}
    result = evaluate_paths(net, paths, images, targets, fused=True, **arguments)
    modules = evaluate_paths(net, paths, images, targets, fused=False, **arguments)
    assert result.plan.kernels.startswith("fused, ")
    assert modules.plan.kernels.startswith("modules: ")
    assert expected.std(0).mean() > 1e-3, "paths differ, so a mix-up would show"
    assert result.image_losses is not None
    assert modules.image_losses is not None
    assert relative_error(result.losses, expected.mean(1)) <= tolerance
    assert relative_error(result.losses, modules.losses) <= 2 * tolerance  # each is off by as much
    # Of an image the loss can be small where the mean is not.
    scale = float(expected.mean())
    assert float((result.image_losses.double() - expected).abs().max()) <= 20 * tolerance * scale
    torch.testing.assert_close(result.accuracy.double(), accuracy, rtol=0, atol=1e-6)
    assert result.losses.dtype == modules.losses.dtype
    assert result.statistics == modules.statistics
    return result


@functools.cache
def space_supernet(name: str) -> Supernet:
    return make_supernet(get_space(name, num_classes=10), torch.float32)


# Resolutions at which no layer is reduced to a single pixel without need, and which no stride divides.
RESOLUTIONS = {"mbv2-7": 65, "mbv2-se-13": 65, "macro": 17, "mini-28": 13, "mini-16": 9}


def covering_paths(net: Any, extra: int = 2) -> Tensor:
    """Each operation of each layer at least once, and some more paths that share prefixes with the first."""
    longest = max(map(len, net.choices))
    covering = torch.tensor([[(i + layer) % len(ops) for layer, ops in enumerate(net.choices)] for i in range(longest)])
    half = covering.shape[1] // 2
    others = draw_paths(net, extra)
    others[:, :half] = covering[0, :half]
    return torch.cat([covering, others, covering[:1]])


# The loop over the 13 operations of mbv2-se-13 in float64 is what takes long.
def _cases() -> list[Any]:
    cases = []
    for name in RESOLUTIONS:
        for bn in POLICIES:
            for dtype in (torch.float64, torch.float32):
                large = name.startswith("mbv2") and not (bn == "batch" and dtype == torch.float64) and name != "mbv2-7"
                slow = large or (name == "mbv2-7" and bn == "recalibrated" and dtype == torch.float64)
                marks = [pytest.mark.slow] if slow else []
                cases.append(pytest.param(name, bn, dtype, marks=marks, id=f"{name}-{bn}-{str(dtype)[6:]}"))
    return cases


@pytest.mark.parametrize("bn", POLICIES)
def test_biases_before_batch_norm(bn: str) -> None:
    net = small_supernet()
    generator = torch.Generator().manual_seed(5)
    for conv in [module for module in net.modules() if isinstance(module, nn.Conv2d) and module.bias is None]:
        conv.bias = nn.Parameter(torch.randn(conv.out_channels, generator=generator, dtype=torch.float64))
    images, targets = draw_images(4, 17)
    compare(net, covering_paths(net), images, targets, bn=bn, tolerance=FP64)


@pytest.mark.parametrize(("name", "bn", "dtype"), _cases())
def test_spaces(name: str, bn: str, dtype: torch.dtype) -> None:
    net = space_supernet(name)
    if dtype == torch.float64:
        net = copy.deepcopy(net).double()
    count = 2 if dtype == torch.float64 else 6
    images, targets = draw_images(count, RESOLUTIONS[name], classes=10, channels=net.space.in_channels, dtype=dtype)
    tolerance = FP64 if dtype == torch.float64 else FP32
    result = compare(net, covering_paths(net), images, targets, bn=bn, tolerance=tolerance, label_smoothing=0.1)
    assert result.plan.num_layers == net.space.num_layers


@pytest.mark.parametrize("activation", ["relu", "relu6", "hswish", "silu"])
@pytest.mark.parametrize("bn", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_activations(activation: str, bn: str, dtype: torch.dtype) -> None:
    net = small_supernet(dtype, activation=activation)
    images, targets = draw_images(4, 33, dtype=dtype)
    tolerance = FP64 if dtype == torch.float64 else FP32
    compare(net, covering_paths(net, 4), images, targets, bn=bn, tolerance=tolerance)


def staged(into: int, out: int, stride: int, activations: Sequence[type[nn.Module]]) -> nn.Module:
    """An inverted bottleneck with an activation, or nn.Identity, for each stage."""
    hidden = 2 * into
    return nn.Sequential(
        *(nn.Conv2d(into, hidden, 1, bias=False), nn.BatchNorm2d(hidden), activations[0]()),
        *(nn.Conv2d(hidden, hidden, 5, stride, 2, groups=hidden), nn.BatchNorm2d(hidden), activations[1]()),
        *(nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out), activations[2]()),
    )


@pytest.mark.parametrize("bn", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_activations_that_differ_between_stages(bn: str, dtype: torch.dtype) -> None:
    net = small_supernet(dtype)
    stages = [(nn.ReLU, nn.Identity, nn.ReLU), (nn.SiLU, nn.ReLU6, nn.Identity), (nn.ReLU6, nn.Identity, nn.Hardswish)]
    net.choices = nn.ModuleList(
        nn.ModuleList(staged(layer.in_channels, layer.out_channels, layer.stride, each) for each in stages)
        for layer in net.space.layers
    )
    randomise(net, 5)
    net.to(dtype)
    paths = torch.tensor([[(row + layer) % 3 for layer in range(len(net.choices))] for row in range(3)])
    images, targets = draw_images(4, 33, dtype=dtype)
    compare(net, paths, images, targets, bn=bn, tolerance=FP64 if dtype == torch.float64 else FP32)


def test_all_paths_of_a_small_space() -> None:
    """Each prefix under each parent: 64 paths of 4 operations."""
    net = small_supernet()
    paths = torch.cartesian_prod(*[torch.arange(4)] * 3)
    images, targets = draw_images(5, 17)
    result = compare(
        net, paths[torch.randperm(64, generator=torch.Generator().manual_seed(0))], images, targets, tolerance=FP64
    )
    assert result.plan.nodes_per_layer == (4, 16, 64)
