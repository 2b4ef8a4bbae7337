"""Units by the fused kernels against their modules: every policy of batch normalisation, layout and precision.

In float64 1e-10 of values of about 1, as in test_adapt: the kernels add in another order. In float32 1e-4, which a
hundred roundings of 6e-8 may become in ten layers of normalisation; in bfloat16 0.08 of the largest value, ten
roundings of 0.4% and then some.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from native_memory import poisoned_memory
from recognised import conv
from supernets import randomise
from torch import Tensor, nn
from unit_modules import UNITS, made

from greedynas_ext import _library
from greedynas_ext.fused_operation import FusedHead, FusedUnit
from greedynas_ext.intercept import Interceptor
from greedynas_ext.recognise import HeadWeights, Unrecognised, recognise_head
from greedynas_ext.recognise_unit import recognise_unit
from greedynas_ext.unit import UnitWeights

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def fused(module: nn.Module, precision: str, policy: Any = "batch") -> tuple[FusedUnit, Interceptor]:
    unit = recognise_unit(module, None)
    if isinstance(unit, Unrecognised):  # pooling does not say of how many channels
        unit = recognise_unit(module, 12)
    assert isinstance(unit, UnitWeights), unit
    interceptor = Interceptor(None, frozenset())
    interceptor.normalisation = policy

    def refuse(x: Tensor) -> Tensor:
        raise AssertionError("the kernels should have run")

    return FusedUnit(refuse, unit, precision, interceptor), interceptor


def images(channels: int, height: int, width: int, seed: int = 0, count: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, height, width, generator=generator, dtype=torch.float64)


@torch.no_grad()
def expected(module: nn.Module, x: Tensor, training: bool = True) -> Tensor:
    return copy.deepcopy(module).train(training)(x.clone())


def assert_near(actual: Tensor, wanted: Tensor, tolerance: float | None = None) -> None:
    assert actual.shape == wanted.shape
    allowed = TOLERANCE[actual.dtype] if tolerance is None else tolerance
    difference = float((actual.double() - wanted.double()).abs().max())
    assert difference <= allowed * max(1.0, float(wanted.abs().max())), difference


@pytest.mark.parametrize("size", [(9, 7), (1, 2), (14, 15), (3, 40)])
@pytest.mark.parametrize("name", UNITS)
@torch.no_grad()
def test_statistics_of_the_batch(name: str, size: tuple[int, int]) -> None:
    module = made(name)
    x = images(UNITS[name][0], *size)
    unit, interceptor = fused(module, "fp64")
    with poisoned_memory():
        output = unit(x)
    assert output.dtype == x.dtype
    assert_near(output, expected(module, x))
    assert interceptor.macs == interceptor.macs_fused
    assert (interceptor.macs > 0) == any(isinstance(part, nn.Conv2d) for part in module.modules())
    single, _ = fused(module.float(), "fp32")
    assert_near(single(x.float()), expected(module.double(), x))


@pytest.mark.parametrize("name", UNITS)
@torch.no_grad()
def test_running_statistics(name: str) -> None:
    module = made(name)
    x = images(UNITS[name][0], 9, 8)
    unit, _ = fused(module, "fp64", "running")
    assert_near(unit(x), expected(module, x, training=False))
    assert_near(unit(x[:1]), expected(module, x[:1], training=False))


@pytest.mark.parametrize("name", UNITS)
@torch.no_grad()
def test_statistics_that_were_captured(name: str) -> None:
    """Used on the images that they are of, they give what those of the batch give; on others, other outputs."""
    module = made(name)
    x, other = images(UNITS[name][0], 9, 8), images(UNITS[name][0], 9, 8, seed=1)
    unit, interceptor = fused(module, "fp64", "capture")
    captured = unit(x)
    assert_near(captured, expected(module, x))
    (statistics,) = interceptor.statistics
    interceptor.normalisation = "constants"
    outputs = []
    for given in (x, other, other[1:2]):
        interceptor.statistics = [statistics]
        outputs.append(unit(given))
        assert interceptor.statistics == []
    assert_near(outputs[0], captured)
    assert_near(outputs[2], outputs[1][1:2])
    # Each module's own normalisations with those constants.
    plain, norms = copy.deepcopy(module), []
    for norm in plain.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.register_forward_pre_hook(lambda module, args: norms.append((module, args[0])))
    plain.train()(x.clone())
    for norm, seen in norms:
        norm.running_mean, norm.running_var = seen.mean((0, 2, 3)), seen.var((0, 2, 3), correction=0)
    assert_near(outputs[1], plain.eval()(other.clone()))
    with pytest.raises(RuntimeError, match="normalised more often than on the calibration images"):
        unit(x)


@pytest.mark.parametrize("mean", [nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1, count_include_pad=False)])
@pytest.mark.parametrize("kernel", [3, 5])
@torch.no_grad()
def test_special_values_go_where_torch_pools_them(kernel: int, mean: nn.Module) -> None:
    x = images(12, 9, 8)
    for place, value in enumerate((float("nan"), float("inf"), -float("inf"), -0.0)):
        x[0, place, 2 * place, place] = value
    x[1, :3] = -float("inf")
    for module in (nn.MaxPool2d(kernel, 1, kernel // 2), mean):
        for dtype, precision in ((torch.float64, "fp64"), (torch.float32, "fp32"), (torch.bfloat16, "bf16")):
            unit, _ = fused(module, precision)
            given = x.to(dtype)
            wanted = module(given.double())
            tolerance = {"fp64": 1e-12, "fp32": 1e-6, "bf16": 0.01}[precision]
            torch.testing.assert_close(unit(given).double(), wanted, rtol=tolerance, atol=tolerance, equal_nan=True)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every other": lambda x: x.repeat_interleave(2, 1).repeat_interleave(2, 3)[:, ::2, :, ::2],
    "expanded": lambda x: x[:1, :, :1].expand(3, -1, 9, -1),
    "images last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["shuffle first", "shuffle last, strided", "dense, strided"])
@torch.no_grad()
def test_layouts_of_the_input(name: str, layout: str) -> None:
    module = made(name)
    x = LAYOUTS[layout](images(UNITS[name][0], 9, 35))
    unit, _ = fused(module, "fp64")
    output = unit(x)
    assert_near(output, expected(module, x))
    assert output.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("wide", [False, True], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("name", UNITS)
@torch.no_grad()
def test_bfloat16(name: str, wide: bool) -> None:
    """Also where there are no bfloat16 products: then it is computed in float32."""
    module = made(name, torch.float32)
    x = images(UNITS[name][0], 14, 13).bfloat16()
    for policy in ("batch", "running", "capture"):
        unit, interceptor = fused(module, "bf16", policy)
        output = unit(x.float() if wide else x)
        assert output.dtype == torch.bfloat16
        reference = expected(module.double(), x.double(), training=policy != "running")
        module.float()
        assert_near(output, reference, 0.08)
        if policy == "capture":
            interceptor.normalisation = "constants"
            assert_near(unit(x), output, 0.02)


@pytest.mark.parametrize("name", ["separable", "separable, 7x7", "mean", "mean, projected"])
@torch.no_grad()
def test_bfloat16_beyond_half_precision(name: str) -> None:
    """Inputs whose depthwise sums half precision does not hold."""
    module = made(name, torch.float32)
    x = (images(UNITS[name][0], 14, 13) * 1e6).bfloat16()
    for policy in ("batch", "running"):
        unit, _ = fused(module, "bf16", policy)
        output = unit(x)
        assert_near(output, expected(module.double(), x.double(), training=policy == "batch"), 0.08)
        module.float()


@torch.no_grad()
def test_threads_do_not_change_the_bits() -> None:
    module = made("shuffle last", torch.float32)
    x = images(32, 17, 19).float()
    before, outputs = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            outputs.append(fused(module, "fp32")[0](x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*outputs)


@torch.no_grad()
def test_what_the_kernels_do_not_take_runs_as_the_operation() -> None:
    module = made("shuffle first")
    unit, interceptor = fused(module, "fp64")
    unit.operation = lambda x: x * 0 + 7
    x = images(36, 9, 8)
    for other in (x.float(), x[:, :12], x[:1, :, :1, :1], x[:0]):
        assert bool((unit(other) == 7).all())
    assert interceptor.macs == interceptor.macs_fused == 0
    interceptor.normalisation = "probe"
    assert bool((unit(x) == 7).all())
    stateless = nn.Sequential(conv(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    unit, interceptor = fused(stateless.double(), "fp64", "running")
    unit.operation = lambda x: x * 0 + 7
    assert bool((unit(images(4, 9, 8)) == 7).all())


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
@torch.no_grad()
def test_a_head(precision: str) -> None:
    head = nn.Sequential(
        *(conv(9, 20), nn.BatchNorm2d(20), nn.ReLU(), nn.AvgPool2d(7), nn.Flatten(), nn.Linear(20, 5, bias=False))
    )
    randomise(head, 3)
    head.double().eval()
    weights = recognise_head(head)
    assert isinstance(weights, HeadWeights)
    interceptor = Interceptor(None, frozenset())
    run = FusedHead(head, weights, precision, interceptor)
    x = images(9, 7, 7)
    if precision == "bf16":
        head.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert_near(run(x.bfloat16()), expected(head.double(), x), 0.08)
        return
    with interceptor:
        logits = run(x)
    assert_near(logits, expected(head, x))
    assert interceptor.macs == 3 * (49 * 180 + 100)
    assert interceptor.macs_fused == 3 * 49 * 180
    interceptor.normalisation = "running"
    larger = images(9, 7, 13)  # of which the pooling takes a part
    assert_near(run(larger), expected(head, larger, training=False))


def rows(count: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    return np.zeros((count, 33), dtype=np.int64), np.zeros((count, 3))


@pytest.mark.parametrize(
    ("branches", "text"),
    [
        ([], r"\[branches, 8\]"),
        ([[0, 0, 1, 4, 0, 1, 5, 0]], "branches of one shape"),
        ([[0, 0, 1, 4, 0, 1, 4, 0]], "each output channel from a branch"),
        ([[0, 0, 1, 6, 0, 1, 6, 0], [0, 0, 1, 2, 5, 1, 2, 0]], "each output channel from one branch"),
        ([[0, 3, 1, 6, 0, 1, 6, 0]], "channels of the input"),
        ([[0, 0, 0, 6, 0, 1, 6, 0]], "channels of the input"),
        ([[0, 0, 1, 6, 0, 2, 6, 0]], "channels of the input"),
        ([[1, 0, 1, 8, 0, 1, 8, 0]], "as many operations as there are rows"),
        ([[0, 0, 1, 6, 0, 1, 6, 1]], "an operation after the activation"),
    ],
)
def test_branches_that_do_not_fit_together_are_refused(branches: list[list[int]], text: str) -> None:
    module = _library.require_chain()
    with pytest.raises(ValueError, match=text):
        module.UnitEvaluation(*rows(0), np.array(branches, dtype=np.int64), 8, 8, "fp32")
