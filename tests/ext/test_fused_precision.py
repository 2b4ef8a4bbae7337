"""Fused kernels in bfloat16, under autocast, and inside the modes that gradients know."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from supernets import draw_images, plain_image_losses, relative_error
from test_fused_spaces import FP32, FP64, POLICIES, calibration_for, compare, covering_paths, make_supernet, small_space
from torch import Tensor

from greedynas import Supernet
from greedynas_ext import _library, arguments, evaluate_paths

needs_bf16 = pytest.mark.skipif(
    not (_library.ops_available() and _library.require_chain().bf16_kernels()),
    reason="this machine has no bfloat16 products, and precision='bf16' is fp32 there",
)


def small(dtype: torch.dtype = torch.float32, seed: int = 1) -> Supernet:
    return make_supernet(small_space("hswish"), dtype, seed)


def losses_of(net: Any, paths: Tensor, images: Tensor, targets: Tensor, bn: str = "batch", **kwargs: Any) -> Tensor:
    calibration = calibration_for(bn, images)
    return evaluate_paths(net, paths, images, targets, bn=bn, calibration=calibration, **kwargs).losses


@needs_bf16
@pytest.mark.parametrize("bn", ["batch", "running"])
def test_bf16_is_no_worse_than_autocast(bn: str) -> None:
    """bfloat16 has 8 bits: what they cost is not known beforehand, but autocast pays it too, on the same images."""
    fused_errors, autocast_errors = [], []
    for seed in range(4):
        net = small(seed=seed)
        paths = covering_paths(net, 6)
        images, targets = draw_images(8, 33, dtype=torch.float32, seed=seed)
        exact, _ = plain_image_losses(copy.deepcopy(net).double(), paths, images.double(), targets, bn)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded, _ = plain_image_losses(net, paths, images, targets, bn)
        result = evaluate_paths(net, paths, images, targets, bn=bn, precision="bf16", fused=True)
        assert result.plan.kernels == f"fused, {_library.require_chain().bf16_kernels()}"
        assert result.losses.dtype == torch.float32
        fused_errors.append(relative_error(result.losses, exact.mean(1)))
        autocast_errors.append(relative_error(rounded.mean(1), exact.mean(1)))
    assert max(fused_errors) > 1e-4, "it did run in bfloat16"
    assert max(fused_errors) <= 1.5 * max(autocast_errors)


@needs_bf16
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_bf16_of_any_stride(stride: int) -> None:
    net = small()
    for block in net.choices[2]:
        for module in block.modules():
            if isinstance(module, torch.nn.Conv2d) and module.stride == (2, 2):
                module.stride = (stride, stride)
    paths = covering_paths(net)
    images, targets = draw_images(8, 65, dtype=torch.float32)
    for bn in ("batch", "running"):
        exact, _ = plain_image_losses(copy.deepcopy(net).double(), paths, images.double(), targets, bn)
        losses = losses_of(net, paths, images, targets, bn, precision="bf16", fused=True)
        assert relative_error(losses, exact.mean(1)) < 0.1


@needs_bf16
@pytest.mark.parametrize("bn", POLICIES)
def test_autocast_and_precision_ask_for_the_same(bn: str) -> None:
    net = small()
    paths = covering_paths(net)
    batch = draw_images(4, 17, dtype=torch.float32)
    asked = losses_of(net, paths, *batch, bn, precision="bf16", fused=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        active = losses_of(net, paths, *batch, bn, fused=True)
        single = losses_of(net, paths, *batch, bn, precision="fp32", fused=True)
    assert torch.equal(active, asked)
    assert torch.equal(single, losses_of(net, paths, *batch, bn, fused=True))
    assert relative_error(active, single) > 1e-5


def test_autocast_to_float16_runs_the_modules() -> None:
    net = small()
    images, targets = draw_images(4, 17, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.float16):
        result = evaluate_paths(net, covering_paths(net), images, targets)
        with pytest.raises(ValueError, match=r"^fused: expected .*; autocast to torch\.float16 is not computed$"):
            evaluate_paths(net, covering_paths(net), images, targets, fused=True)
    assert result.plan.kernels == "modules: autocast to torch.float16 is not computed"


def test_modules_in_fp16_run_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU for what the kernels do not recognise; on a CPU precision='fp16' is refused before."""
    monkeypatch.setattr(arguments, "check_precision", lambda precision, device: None)
    net = small()
    images, targets = draw_images(4, 17, dtype=torch.float32)
    paths = covering_paths(net)[:2]
    with torch.autocast("cpu", dtype=torch.float16):
        expected = evaluate_paths(net, paths, images, targets, fused=False).losses
    assert torch.equal(evaluate_paths(net, paths, images, targets, precision="fp16", fused=False).losses, expected)
    wider = evaluate_paths(net.double(), paths, images.double(), targets, precision="fp16", fused=False).losses
    assert torch.equal(wider, expected)


@pytest.mark.parametrize("bn", POLICIES)
def test_a_bfloat16_supernet(bn: str) -> None:
    """Weights are rounded already, so fp32 on them is exact; in bfloat16 activations are rounded as well."""
    net = small(torch.bfloat16)
    paths = covering_paths(net)
    images, targets = draw_images(6, 33, dtype=torch.float32)
    calibration = calibration_for(bn, images)
    exact, _ = plain_image_losses(
        copy.deepcopy(net).double(),
        paths,
        images.double(),
        targets,
        bn,
        None if calibration is None else calibration.double(),
    )
    single = losses_of(net, paths, images, targets, bn, precision="fp32", fused=True)
    assert single.dtype == torch.float32
    assert relative_error(single, exact.mean(1)) <= FP32
    followed = losses_of(net, paths, images, targets, bn, fused=True)
    assert followed.dtype == torch.float32
    assert torch.equal(followed, losses_of(net, paths, images, targets, bn, precision="bf16", fused=True))
    modules = losses_of(net, paths, images, targets, bn, fused=False)  # rounds after every module
    assert relative_error(followed, exact.mean(1)) <= max(1.5 * relative_error(modules, exact.mean(1)), FP32)


def test_a_float64_supernet_in_fp32() -> None:
    net = small(torch.float64)
    images, targets = draw_images(6, 33)
    compare(net, covering_paths(net), images, targets, tolerance=FP32, precision="fp32")
    result = losses_of(net, covering_paths(net), images, targets, precision="fp32", fused=True)
    assert result.dtype == torch.float32


def test_a_float16_supernet_runs_the_modules() -> None:
    net = small(torch.float16)
    images, targets = draw_images(4, 17, dtype=torch.float32)
    result = evaluate_paths(net, covering_paths(net)[:2], images, targets)
    assert result.plan.kernels == "modules: a supernet of torch.float16 is not computed"


# Gradients ----------------------------------------------------------------------------------------------------------

MODES = {
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "enable grad": torch.enable_grad,
    "nothing": contextlib.nullcontext,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bn", POLICIES)
def test_gradient_modes_make_no_difference(mode: str, bn: str) -> None:
    net = small(torch.float64)
    paths = covering_paths(net)
    images, targets = draw_images(4, 17)
    expected = losses_of(net, paths, images, targets, bn, fused=False)
    wanted = images.clone().requires_grad_()
    with MODES[mode]():
        losses = losses_of(net, paths, wanted, targets, bn, fused=True)
        computed = wanted * 1.0  # an inference tensor, or one with a history
        inside = losses_of(net, paths, computed, targets, bn, fused=True)
    assert not losses.requires_grad
    assert relative_error(losses, expected) <= FP64
    assert torch.equal(inside, losses)
    assert wanted.grad is None


def test_a_supernet_made_in_inference_mode() -> None:
    with torch.inference_mode():
        net = small(torch.float64)
    assert net.stem.conv.weight.is_inference()
    images, targets = draw_images(4, 17)
    compare(net, covering_paths(net), images, targets, tolerance=FP64)


@pytest.mark.parametrize("precision", [None, "bf16", "fp32"])
def test_a_training_step_in_the_same_autocast_region(precision: str | None) -> None:
    images, targets = draw_images(4, 17, dtype=torch.float32)

    def gradients(evaluated: bool) -> list[Tensor | None]:
        net = small()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if evaluated:
                losses_of(net, covering_paths(net), images, targets, precision=precision, fused=True)
            F.cross_entropy(net(images, [0, 1, 2]).float(), targets).backward()
            if evaluated:
                losses_of(net, covering_paths(net), images, targets, precision=precision, fused=True)
        return [parameter.grad for parameter in net.parameters()]

    without, with_evaluation = gradients(False), gradients(True)
    assert sum(gradient is not None for gradient in without) > 10
    for one, other in zip(without, with_evaluation, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
