"""Whole units by the CUDA kernels against their modules in float64, under every policy of batch normalisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from foreign_by_path import mb
from native_memory import poisoned_memory
from precisions import of_all, of_both
from recognised import conv, separable
from torch import Tensor, nn
from unit_cases import exact, fused, use_cuda_kernels
from unit_modules import UNITS, made

from greedynas_ext import ops_cuda, unit_cuda
from greedynas_ext.recognise_unit import recognise_unit
from greedynas_ext.unit import UnitWeights
from greedynas_ext.unit_cuda import MOST_DENSE, CudaUnit

# Of the largest output: roundings of 6e-8, 2^-12 and 2^-9, of inputs, weights and maps, through up to six
# normalisations (1.8e-6, 0.0041 and 0.013 at most, here).
TOLERANCE = {"fp32": 1e-5, "fp16": 0.008, "bf16": 0.025}


@pytest.fixture(autouse=True)
def on_the_device(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use_cuda_kernels(cuda, monkeypatch)


def images(channels: int, height: int, width: int, seed: int = 0, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, height, width, generator=generator)


def channels_of(name: str) -> int:
    return UNITS[name][0]


def check(cuda: Any, found: Tensor, expected: Tensor) -> None:
    assert found.dtype == cuda.dtype
    assert found.shape == expected.shape
    error = float((found.cpu().double() - expected).abs().max()) / max(1.0, float(expected.abs().max()))
    assert error <= TOLERANCE[cuda.precision], error


@of_all
@pytest.mark.parametrize("size", [(9, 7), (2, 3), (15, 31)])  # the last has several units of 128 pixels
@pytest.mark.parametrize("name", UNITS)
@torch.no_grad()
def test_equals_the_module(cuda: Any, name: str, size: tuple[int, int]) -> None:
    """With statistics of the batch, of the module, and of another batch."""
    module = made(name, torch.float32)
    x = images(channels_of(name), *size).to(cuda.dtype)
    given, moved = x.to(cuda.device), made(name, torch.float32).to(cuda.device)
    outputs = {}
    for policy in ("batch", "running", "capture"):
        unit, interceptor = fused(moved, cuda.precision, policy, channels_of(name))
        with poisoned_memory():
            outputs[policy] = unit(given)
        check(cuda, outputs[policy], exact(module, x, policy != "running"))
        assert interceptor.macs == interceptor.macs_fused
    (kept,) = interceptor.statistics
    interceptor.normalisation = "constants"
    interceptor.statistics = [kept, kept]
    assert torch.equal(outputs["batch"], outputs["capture"])
    repeated = unit(given)
    check(cuda, repeated, exact(module, x, True))
    assert torch.equal(unit(given[1:]), repeated[1:])
    assert torch.equal(given.cpu(), x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "images last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "not aligned": lambda x: (
        torch.cat([x.new_zeros(1), x.permute(0, 2, 3, 1).flatten()])[1:]
        .view(len(x), *x.shape[2:], -1)
        .permute(0, 3, 1, 2)
    ),
}


@of_both
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["shuffle last", "in a row"])
@torch.no_grad()
def test_layouts_of_the_input(cuda: Any, name: str, layout: str) -> None:
    module = made(name, torch.float32).to(cuda.device)
    x = images(channels_of(name), 9, 10).to(cuda.dtype).to(cuda.device)
    first, second = (fused(module, cuda.precision, "batch")[0](given) for given in (x, LAYOUTS[layout](x)))
    assert torch.equal(first, second)
    assert second.is_contiguous(memory_format=torch.channels_last)


@of_both
@pytest.mark.parametrize("name", ["shuffle last, strided", "separable"])
@torch.no_grad()
def test_the_order_of_threads_does_not_matter(cuda: Any, emulation: Any, name: str) -> None:
    module, outputs = made(name, torch.float32).to(cuda.device), []
    for order in range(3):
        emulation(order=order)
        x = images(channels_of(name), 11, 10).to(cuda.dtype).to(cuda.device)
        outputs.append(fused(module, cuda.precision, "batch")[0](x))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("name", ["separable", "separable, 7x7", "mean", "mean, projected"])
@torch.no_grad()
def test_bfloat16_beyond_half_precision(cuda: Any, name: str) -> None:
    """Inputs whose depthwise sums half precision does not hold."""
    module = made(name, torch.float32)
    x = (images(channels_of(name), 14, 13) * 1e6).to(cuda.dtype)
    for policy in ("batch", "running"):
        unit, _ = fused(made(name, torch.float32).to(cuda.device), "bf16", policy, channels_of(name))
        check(cuda, unit(x.to(cuda.device)), exact(module, x, policy == "batch"))


@pytest.mark.parametrize("cuda", ["fp16 on sm_75", "fp32 on sm_75"], indirect=True)
@torch.no_grad()
def test_the_deepest_dense_convolution(cuda: Any) -> None:
    """Fits the shared memory of 64 KB."""
    channels = MOST_DENSE // 9
    module = nn.Sequential(conv(channels, 72, 3), nn.BatchNorm2d(72)).to(cuda.device)
    x = images(channels, 4, 3).to(cuda.dtype)
    check(cuda, fused(module, cuda.precision, "batch")[0](x.to(cuda.device)), exact(module.cpu(), x, True))


class Parallel(nn.Module):
    """As many branches as there are modules."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def pointwise(into: int, out: int) -> nn.Sequential:
    return nn.Sequential(conv(into, out), nn.BatchNorm2d(out))


@of_both
@torch.no_grad()
def test_as_many_branches_as_there_may_be(cuda: Any) -> None:
    module = Parallel(*(pointwise(6, 3) for _ in range(16))).to(cuda.device)
    x = images(6, 5, 4).to(cuda.dtype)
    check(cuda, fused(module, cuda.precision, "batch")[0](x.to(cuda.device)), exact(module.cpu(), x, True))


@pytest.mark.parametrize("cuda", ["fp16"], indirect=True)
def test_what_there_are_no_kernels_for(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops_cuda, "most_inputs", lambda device, precision: (20, 800))
    for module, why in (
        (Parallel(*(pointwise(6, 3) for _ in range(17))), "17 branches (the CUDA kernels take 16)"),
        (nn.Sequential(conv(MOST_DENSE // 9, 8, 3), nn.BatchNorm2d(8)), None),
        (nn.Sequential(conv(200, 8, 3), nn.BatchNorm2d(8)), "3x3 of 200 channels (the CUDA kernels take 199)"),
        (mb(8, 8, 3, 3, 2), "stride 3 (the CUDA kernels have 1 and 2)"),
        (mb(20, 8, 3, 2, 2), None),
        (mb(21, 8, 3, 2, 2), "21 input channels (on this GPU the CUDA kernels take 20)"),
        (nn.Sequential(*separable(8, 7, 3)), None),
    ):
        unit = recognise_unit(module, None)
        assert isinstance(unit, UnitWeights), unit
        assert unit_cuda.unsupported(unit, cuda.device, cuda.dtype) == why


@of_both
@torch.no_grad()
def test_what_is_not_taken_runs_as_the_operation(cuda: Any) -> None:
    unit, interceptor = fused(mb(8, 8, 3, 3, 2).to(cuda.device), cuda.precision, "batch")
    unit.operation = lambda x: x * 0 + 7
    assert bool((unit(images(8, 4, 4).to(cuda.dtype).to(cuda.device)) == 7).all())
    assert interceptor.macs_fused == 0


@of_both
@pytest.mark.parametrize("name", UNITS)
def test_memory_that_is_asked_for_before_suffices(cuda: Any, name: str) -> None:
    unit = recognise_unit(made(name, torch.float32).to(cuda.device), channels_of(name))
    assert isinstance(unit, UnitWeights)
    native = CudaUnit(unit, cuda.dtype)
    asked = native.working_memory(images(channels_of(name), 9, 8).to(cuda.dtype)).numel()
    for statistics in ("BATCH", "CAPTURE", "RUNNING", "CONSTANTS"):
        policy = getattr(cuda.module.Statistics, statistics)
        assert 0 < native._evaluation.needed_bytes(3, 9, 8, policy) <= asked
