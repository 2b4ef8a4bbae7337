"""Supernets of which the CUDA kernels run parts, units among them, against loops over the modules in float64."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from cells import Cells
from foreign_by_path import mb
from foreign_elastic import ONCE, set_once
from foreign_supernets import FOREIGN, by_argument, covering, make, once, own_losses
from supernets import draw_images, randomise
from test_cuda_chain import draw, drawn_paths, exact_losses, make_net
from torch import Tensor, nn
from unit_cases import use_cuda_kernels

from greedynas_ext import adapt, arguments, evaluate_paths
from greedynas_ext.arguments import Chain
from greedynas_ext.unit_cuda import CudaUnit

# In 16 bits roundings of 2^-9 and 2^-12 through some ten operations, and the modules' own.
TOLERANCE = {
    "fp32": {"rtol": 1e-4, "atol": 1e-5},
    "fp16": {"rtol": 0.01, "atol": 0.01},
    "bf16": {"rtol": 0.05, "atol": 0.05},
}
of_maps = pytest.mark.parametrize("cuda", list(TOLERANCE), indirect=True)
MEMORY = 1 << 30  # on a GPU it is always asked for before


@pytest.fixture(autouse=True)
def calls(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """What units that ran fused were given."""
    use_cuda_kernels(cuda, monkeypatch)
    if cuda.device.type == "cpu":
        monkeypatch.setattr(arguments, "check_precision", lambda precision, device: None)
    run, found = CudaUnit.run, []

    def counted(self: CudaUnit, x: Tensor, *others: Any) -> Any:
        found.append(x.dtype)
        return run(self, x, *others)

    monkeypatch.setattr(CudaUnit, "run", counted)
    return found


class Odd(nn.Module):
    """An operation that is not recognised."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * (1 + torch.tanh(x.mean((1, 2, 3), keepdim=True)))


def check(cuda: Any, found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double().cpu(), expected, **TOLERANCE[cuda.precision])


@of_maps
@pytest.mark.parametrize("bn", ["batch", "running", "recalibrated"])
def test_recognised_operations_run_fused_beside_others(cuda: Any, calls: list[torch.dtype], bn: Any) -> None:
    net: Any = make_net("e3k3 e6k5s id", "hswish")
    net.choices[1][0] = Odd(net.choices[1][0])
    images, targets = draw(6)
    paths = drawn_paths(net, 4)
    paths[0] = 0
    kwargs: dict[str, Any] = {"bn": bn, "per_image": True}
    if bn == "recalibrated":
        kwargs["calibration"] = draw(7, seed=8)[0]
    expected = exact_losses(net, paths, images, targets, **kwargs)
    moved = copy.deepcopy(net).to(cuda.device)
    moved._adapted_chain = replace(Chain.of(moved), partly_fused=True)
    if bn == "recalibrated":
        kwargs["calibration"] = kwargs["calibration"].to(cuda.device)
    kwargs |= {"precision": cuda.precision, "max_memory": MEMORY}
    result = evaluate_paths(moved, paths, images.to(cuda.device), targets.to(cuda.device), **kwargs)
    assert result.plan.kernels.startswith("partly fused; modules: supernet.choices[1][0]")
    nodes = {(layer, tuple(path[: layer + 1])) for path in paths.tolist() for layer in range(4)}
    fused = [(layer, path) for layer, path in nodes if (layer, path[layer]) not in ((1, 0), (1, 2), (3, 2))]
    heads = {tuple(path) for path in paths.tolist()}
    assert len(calls) == (1 + len(fused) + len(heads)) * (2 if bn == "recalibrated" else 1)
    assert set(calls) <= {cuda.dtype, torch.float32}
    check(cuda, result.image_losses, expected.image_losses)


@of_maps
@pytest.mark.parametrize("bn", ["batch", "running"])
@pytest.mark.parametrize("name", ["spos", "split units"])
def test_supernets_of_units(cuda: Any, calls: list[torch.dtype], name: str, bn: Any) -> None:
    net, (images, targets) = make(name), draw_images(8, 20)
    paths = covering(FOREIGN[name].sizes)
    expected = own_losses(net, FOREIGN[name].run, paths, images, targets, bn)
    batch = images.float().to(cuda.device), targets.to(cuda.device)
    kwargs: dict[str, Any] = {"bn": bn, "per_image": True, "precision": cuda.precision, "max_memory": MEMORY}
    result = evaluate_paths(adapt(net.float().to(cuda.device)), paths, *batch, **kwargs)
    assert result.plan.macs_fused > 0.95 * result.plan.macs_computed, result.plan.kernels
    assert calls
    check(cuda, result.image_losses, expected)


@of_maps
@pytest.mark.parametrize("bn", ["batch", "running"])
def test_separable_convolutions_and_poolings(cuda: Any, calls: list[torch.dtype], bn: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        net = Cells()
    randomise(net, 4)
    images, targets = draw_images(5, 11)
    paths = torch.cartesian_prod(torch.arange(6), torch.arange(6))
    expected = own_losses(copy.deepcopy(net).double(), by_argument, paths, images, targets, bn)
    batch = images.float().to(cuda.device), targets.to(cuda.device)
    kwargs: dict[str, Any] = {"bn": bn, "per_image": True, "precision": cuda.precision, "max_memory": MEMORY}
    result = evaluate_paths(adapt(net.to(cuda.device)), paths, *batch, **kwargs)
    dilated = "partly fused; modules: supernet.choices[0][2]: 1: expected dilation 1, got (2, 2)"
    assert result.plan.kernels.startswith(dilated), result.plan.kernels
    assert len(calls) >= 1 + 4 + 6 * 4  # the stem, and all but dilated convolutions and identities
    check(cuda, result.image_losses, expected)


@of_maps
@pytest.mark.parametrize("bn", ["batch", "running"])
def test_elastic_networks_in_parts(cuda: Any, calls: list[torch.dtype], bn: Any) -> None:
    """Sliced weights and transformed kernels are computed on the device, and read there."""
    net, (images, targets) = make("once for all, mobile"), draw_images(4, 20)
    paths = covering(tuple(map(len, ONCE)))
    expected = own_losses(net, once, paths, images, targets, bn)
    batch = images.float().to(cuda.device), targets.to(cuda.device)
    kwargs: dict[str, Any] = {"bn": bn, "per_image": True, "precision": cuda.precision, "max_memory": MEMORY}
    view = adapt(net.float().to(cuda.device), choices=ONCE, select=set_once)
    result = evaluate_paths(view, paths, *batch, **kwargs)
    assert result.plan.macs_fused > 0.9 * result.plan.macs_computed, result.plan.kernels
    assert calls
    check(cuda, result.image_losses, expected)


@of_maps
def test_what_there_are_no_kernels_for_is_named(cuda: Any) -> None:
    net = Cells()
    net.edges[0][2] = mb(8, 8, 3, 3, 2)
    paths = torch.tensor([[2, 1], [1, 3]])
    images, targets = draw_images(5, 11)
    expected = own_losses(copy.deepcopy(net).double(), by_argument, paths, images, targets)
    batch = images.float().to(cuda.device), targets.to(cuda.device)
    kwargs: dict[str, Any] = {"per_image": True, "precision": cuda.precision, "max_memory": MEMORY}
    result = evaluate_paths(adapt(net.to(cuda.device)), paths, *batch, **kwargs)
    strided = "partly fused; modules: supernet.choices[0][2]: stride 3 (the CUDA kernels have 1 and 2)"
    assert result.plan.kernels.startswith(strided), result.plan.kernels
    check(cuda, result.image_losses, expected)
