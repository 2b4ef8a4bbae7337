"""What the kernels do not compute runs as modules, with the same numbers, and the plan says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from supernets import draw_images, plain_image_losses, relative_error
from test_fused_spaces import FP64, POLICIES, calibration_for, covering_paths, small_supernet
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from greedynas import Supernet
from greedynas_ext import evaluate_paths

Change = Callable[[Supernet], object]


class Halved(nn.Module):
    """An operation of the user's own."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5 + x.flip(-1)


def conv(into: int, out: int, kernel: int, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(into, out, kernel, padding=kernel // 2, dtype=torch.float64, **{"bias": False, **kwargs})


def set_(place: str, value: Any) -> Change:
    def change(net: Supernet) -> None:
        path, _, name = place.rpartition(".")
        parent = net.get_submodule(path)
        if isinstance(parent, nn.ModuleList):
            parent[int(name)] = value()
        else:
            setattr(parent, name, value())

    return change


def another_stride(block: nn.Module) -> None:
    block.depthwise.conv.stride = (2, 2)
    block.residual = False


# What is changed, and a part of the reason that is given.
CASES: dict[str, tuple[Change, str]] = {
    "hook": (
        lambda net: net.choices[1][0].project.register_forward_hook(lambda m, a, y: y.abs()),
        "supernet.choices[1][0]: project: forward hooks are registered",
    ),
    "pre-hook": (
        lambda net: net.head.linear.register_forward_pre_hook(lambda m, a: (a[0].abs(),)),
        "supernet.head: linear: forward hooks are registered",
    ),
    "forward of an instance": (
        lambda net: setattr(net.stem.act, "forward", torch.tanh),
        "supernet.stem: act: forward is replaced on the instance",
    ),
    "kernel 9": (
        set_("choices.1.0.depthwise.conv", lambda: conv(36, 36, 9, groups=36)),
        "supernet.choices[1][0]: depthwise.conv: expected a depthwise convolution of 3x3, 5x5 or 7x7",
    ),
    "no depthwise convolution": (
        set_("choices.1.0.depthwise.conv", lambda: conv(36, 36, 3, groups=4)),
        "supernet.choices[1][0]: depthwise.conv: ",
    ),
    "another operation": (set_("choices.1.0", Halved), "supernet.choices[1][0]: "),
    "another activation": (set_("choices.1.0.expand.act", nn.GELU), "supernet.choices[1][0]: "),
    "no activation": (set_("choices.1.0.expand.act", nn.Identity), "supernet.choices[1][0]: "),
    "another normalisation": (
        set_("choices.1.0.expand.bn", lambda: nn.GroupNorm(4, 36, dtype=torch.float64)),
        "supernet.choices[1][0]: ",
    ),
    "no normalisation": (set_("stem.bn", nn.Identity), "supernet.stem: "),
    "a stem of 9x9": (set_("stem.conv", lambda: conv(3, 7, 9, stride=2)), "supernet.stem: conv: expected groups 1 and"),
    "max pooling in the head": (set_("head.pool", lambda: nn.AdaptiveMaxPool2d(1)), "supernet.head: "),
    "reflected borders": (
        set_("choices.1.0.depthwise.conv", lambda: conv(36, 36, 3, groups=36, padding_mode="reflect")),
        "supernet.choices[1][0]: ",
    ),
    "a stride of one candidate": (
        lambda net: another_stride(net.choices[1][0]),
        "supernet.choices: a layer's operations differ in their stride",
    ),
}


def change_(name: str) -> tuple[Supernet, str]:
    net = small_supernet()
    change, reason = CASES[name]
    change(net)
    return net, reason


@pytest.mark.parametrize("name", CASES)
def test_modules_run_and_the_plan_says_why(name: str) -> None:
    net, reason = change_(name)
    paths, (images, targets) = covering_paths(net), draw_images(3, 17)
    for bn in ("batch", "running"):
        result = evaluate_paths(net, paths, images, targets, bn=bn)
        expected = evaluate_paths(net, paths, images, targets, bn=bn, fused=False)
        assert result.plan.kernels.startswith(f"modules: {reason}")
        assert torch.equal(result.losses, expected.losses)
    with pytest.raises(
        ValueError, match=r"^fused: expected a supernet that the fused kernels can evaluate; "
    ) as raised:
        evaluate_paths(net, paths, images, targets, fused=True)
    assert reason in str(raised.value)
    if name not in ("hook", "pre-hook", "forward of an instance"):  # the loop's copies have none
        loop = plain_image_losses(net, paths, images, targets)[0].mean(1)
        assert relative_error(evaluate_paths(net, paths, images, targets).losses, loop) <= FP64


@pytest.mark.parametrize("name", ["hook", "kernel 9", "another operation", "a stride of one candidate"])
def test_operations_that_no_path_uses_are_not_looked_at(name: str) -> None:
    net, _ = change_(name)
    paths = covering_paths(net)
    paths = paths[paths[:, 1] != 0]
    images, targets = draw_images(3, 17)
    result = evaluate_paths(net, paths, images, targets, fused=True)
    assert relative_error(result.losses, evaluate_paths(net, paths, images, targets, fused=False).losses) <= FP64


def test_candidates_that_give_different_channels() -> None:
    """A supernet that pools over its channels in the end can do with that; the kernels cannot."""
    net = small_supernet()
    wide = nn.Sequential(conv(12, 16, 1, stride=1), nn.BatchNorm2d(16, dtype=torch.float64))
    net.choices[1][0] = wide
    images, targets = draw_images(3, 17)
    with pytest.raises(ValueError, match=r"supernet\.choices\[1\]\[1\]: gives 12 channels where another .* gives 16$"):
        evaluate_paths(net, [[0, 0, 0], [0, 1, 0]], images, targets, fused=True)
    with pytest.raises(ValueError, match=r"supernet\.choices\[2\]\[0\]: .*16"):
        evaluate_paths(net, [[0, 0, 0]], images, targets, fused=True)


def test_functions_for_modules() -> None:
    net = small_supernet()
    images, targets = draw_images(3, 17)
    paths = covering_paths(net)

    class Functions:
        stem = staticmethod(net.stem.forward)
        choices = net.choices
        head = net.head

    result = evaluate_paths(Functions(), paths, images, targets)
    assert result.plan.kernels == "modules: supernet.stem: not a module"


@pytest.mark.parametrize("bn", POLICIES)
def test_running_statistics_that_are_not_stored(bn: str) -> None:
    net = small_supernet()
    net.choices[1][0].expand.bn = nn.BatchNorm2d(36, track_running_stats=False, dtype=torch.float64)
    images, targets = draw_images(3, 17)
    paths, calibration = covering_paths(net), calibration_for(bn, images)
    result = evaluate_paths(net, paths, images, targets, bn=bn, calibration=calibration)
    modules = evaluate_paths(net, paths, images, targets, bn=bn, calibration=calibration, fused=False)
    assert relative_error(result.losses, modules.losses) <= FP64
    assert result.statistics == modules.statistics
    used = result.plan.kernels
    if bn == "running":
        assert used == "modules: a batch normalisation stores no running statistics"
    else:
        assert used.startswith("fused, ")


# Modes --------------------------------------------------------------------------------------------------------------


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.convolutions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.convolutions += "convolution" in str(func)
        return func(*args, **(kwargs or {}))


def test_a_mode_sees_what_the_modules_do() -> None:
    net = small_supernet()
    images, targets = draw_images(3, 17)
    paths = covering_paths(net)
    with FlopCounterMode(display=False) as counter:
        result = evaluate_paths(net, paths, images, targets)
    assert result.plan.kernels == "modules: a torch mode is active, which wants to see what the modules do"
    assert counter.get_total_flops() == 2 * 3 * result.plan.macs_computed
    with Seen() as seen, pytest.raises(ValueError, match=r"^fused: .*; a torch mode is active"):
        evaluate_paths(net, paths, images, targets, fused=True)
    with seen:
        evaluate_paths(net, paths, images, targets)
    assert seen.convolutions > 20
    assert evaluate_paths(net, paths, images, targets).plan.kernels.startswith("fused, ")


# Errors -------------------------------------------------------------------------------------------------------------


def both(net: Supernet, *args: Any, **kwargs: Any) -> tuple[str, str]:
    """The messages of the kernels and of the modules."""
    messages = []
    for fused in (True, False):
        with pytest.raises((ValueError, RuntimeError)) as raised:
            evaluate_paths(net, covering_paths(net), *args, fused=fused, **kwargs)
        messages.append(f"{type(raised.value).__name__}: {raised.value}")
    return messages[0], messages[1]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2])
def test_a_single_value_per_channel(size: int, count: int) -> None:
    net = small_supernet()
    images, targets = draw_images(count, size)
    if count == 1 and size <= 4:  # 1 or 2 pixels a side after the stem, halved in the last layer
        fused, modules = both(net, images, targets)
        assert fused == modules
        assert fused.startswith("ValueError: images: a batch normalisation in supernet.")
        calibration = both(net, *draw_images(2, size), bn="recalibrated", calibration=images)
        assert calibration[0] == calibration[1]
        assert calibration[0].startswith("ValueError: calibration: ")
    else:
        evaluate_paths(net, covering_paths(net), images, targets, fused=True)
    result = evaluate_paths(net, covering_paths(net), images, targets, bn="running", fused=True)
    modules_result = evaluate_paths(net, covering_paths(net), images, targets, bn="running", fused=False)
    assert relative_error(result.losses, modules_result.losses) <= FP64


def test_micro_batches_of_one_image_with_one_pixel() -> None:
    fused, modules = both(small_supernet(), *draw_images(3, 2), micro_batch=1)
    assert fused == modules


@pytest.mark.parametrize("where", [0, 1])
def test_targets_out_of_range(where: int) -> None:
    net = small_supernet()
    loader = [draw_images(3, 17), draw_images(3, 17)]
    loader[where][1][1] = 7
    with pytest.raises(ValueError, match=r"^targets: expected classes below 5 .*, got 7$"):
        evaluate_paths(net, covering_paths(net), loader, fused=True)
    fused, modules = both(net, loader)
    assert fused == modules
    loader[where][1][1] = -1
    with pytest.raises(ValueError, match=r"^targets: expected classes from 0, got -1$"):
        evaluate_paths(net, covering_paths(net), loader, fused=True)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_images_of_other_channels(channels: int) -> None:
    net = small_supernet()
    images, targets = draw_images(3, 17, channels=channels)
    expected = rf"expected 3 channels, got \[3, {channels}, 17, 17\]$"
    with pytest.raises(ValueError, match="^images: " + expected):
        evaluate_paths(net, covering_paths(net), images, targets, fused=True)
    with pytest.raises(ValueError, match="^calibration: " + expected):
        evaluate_paths(net, covering_paths(net), *draw_images(3, 17), bn="recalibrated", calibration=images, fused=True)


class Sized(nn.Module):
    """A head that pools a given size."""

    def __init__(self, head: nn.Module, side: int, **kwargs: Any) -> None:
        super().__init__()
        self.conv, self.bn, self.act, self.linear = head.conv, head.bn, head.act, head.linear
        self.pool = nn.AvgPool2d(side, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.pool(self.act(self.bn(self.conv(x)))).flatten(1))


@pytest.mark.parametrize("bn", POLICIES)
def test_a_pooling_of_a_given_size(bn: str) -> None:
    """Fused where it is a mean over the whole map, which the resolution says; 17x17 becomes 5x5 before the head."""
    net = small_supernet()
    net.head = Sized(net.head, 5)
    paths, (images, targets) = covering_paths(net), draw_images(3, 17)
    calibration = calibration_for(bn, images)
    how: dict[str, Any] = {"bn": bn, "calibration": calibration}
    result = evaluate_paths(net, paths, images, targets, fused=True, **how)
    modules = evaluate_paths(net, paths, images, targets, fused=False, **how)
    assert relative_error(result.losses, modules.losses) < FP64
    assert result.plan.macs_computed == modules.plan.macs_computed
    reason = "modules: supernet.head: pools a given size, and that of the batches is not known before"
    assert evaluate_paths(net, paths, [(images, targets)], **how).plan.kernels == reason
    if calibration is not None:
        with pytest.raises(ValueError, match="pools 5x5 of 6x6"):
            evaluate_paths(net, paths, images, targets, fused=True, bn=bn, calibration=draw_images(3, 21)[0])
    else:
        with pytest.raises(ValueError, match="pools 5x5 of 6x6"):
            evaluate_paths(net, paths, *draw_images(3, 21), fused=True, bn=bn)


@pytest.mark.parametrize(
    "kwargs", [{"side": 5, "padding": 1}, {"side": 5, "divisor_override": 3}, {"side": (5, 4)}, {"side": 4}]
)
def test_other_poolings_run_as_modules(kwargs: dict[str, Any]) -> None:
    net = small_supernet()
    net.head = Sized(net.head, **kwargs)
    if kwargs.get("padding"):
        net.head.pool.stride = 7
    paths, (images, targets) = covering_paths(net), draw_images(3, 17)
    result = evaluate_paths(net, paths, images, targets)
    assert result.plan.kernels.startswith("modules: supernet.head: ")
