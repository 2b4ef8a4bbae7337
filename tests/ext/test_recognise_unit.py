"""Units are described by which channels their branches read and write; what else rearranges is refused.

The oracle of the numbers is the module itself in training mode (`check`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from foreign_by_path import ShuffleUnit, SplitUnit, mb
from recognised import Parts, asserting, conv, filled, only_even, only_many, plain, reason, separable
from test_recognise import check
from torch import Tensor, nn

from greedynas_ext.operations import PoolWeights, SeparableWeights
from greedynas_ext.packing import ConvBNWeights, InvertedBottleneckWeights
from greedynas_ext.recognise_unit import recognise_unit
from greedynas_ext.unit import UnitWeights


class Moves(nn.Module):
    """`function(self, x)` around two branches from 6 to 6 channels."""

    def __init__(self, function: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.branch, self.other = plain(6, 12, 6), plain(6, 8, 6)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def described(module: nn.Module, channels: int | None = None) -> UnitWeights:
    weights = recognise_unit(module, channels)
    assert isinstance(weights, UnitWeights), weights
    return weights


def routes(module: nn.Module) -> list[tuple[range, range, int]]:
    return [(each.reads, each.writes, len(each.operations)) for each in described(module).branches]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5, 7, 0])
def test_units_that_shuffle_first(kernel: int, stride: int) -> None:
    module = filled(ShuffleUnit(12, 20 if stride == 2 else 12, 8, kernel or 3, stride, xception=kernel == 0))
    count = 3 if kernel == 0 else 1
    if stride == 1:
        assert routes(module) == [(range(0, 12, 2), range(6), 0), (range(1, 12, 2), range(6, 12), count)]
    else:
        assert routes(module) == [(range(12), range(12), 1), (range(12), range(12, 20), count)]
    check(module, described(module), 12)
    block = described(module).branches[1].operations[0]
    assert isinstance(block, InvertedBottleneckWeights)
    assert block.activations == (("linear", "linear", "relu") if kernel == 0 else ("relu", "linear", "relu"))
    assert block.project_bn.running_var is not None
    assert block.depthwise.data_ptr() in [p.data_ptr() for p in module.parameters()]


@pytest.mark.parametrize("stride", [1, 2])
def test_units_that_shuffle_last(stride: int) -> None:
    module = filled(SplitUnit(12, 12, 5, stride))
    if stride == 1:
        assert routes(module) == [(range(6), range(0, 12, 2), 0), (range(6, 12), range(1, 12, 2), 1)]
    else:
        assert routes(module) == [(range(12), range(0, 12, 2), 1), (range(12), range(1, 12, 2), 1)]
    check(module, described(module), 12)


SAME: dict[str, Callable[[Any, Tensor], Any]] = {
    "split": lambda m, x: torch.cat([(p := x.split(6, 1))[0], m.branch(p[1])], 1),
    "sections": lambda m, x: torch.cat([(p := x.split([4, 6, 2], dim=1))[2], m.branch(p[1]), p[0]], 1),
    "slices": lambda m, x: torch.cat((m.branch(x[:, : x.shape[1] // 2]), x[:, x.size(1) // 2 :]), dim=1),
    "steps": lambda m, x: torch.cat((m.branch(x[:, ::2]), m.other(x[:, 1::2])), dim=1),
    "narrow": lambda m, x: torch.cat((m.branch(x.narrow(1, 3, 6)), x.narrow(1, 0, 3), x.narrow(1, 9, 3)), 1),
    "F.channel_shuffle": lambda m, x: F.channel_shuffle(torch.cat((m.branch(x[:, :6]), x[:, 6:]), 1), 2),
    "unflatten": lambda m, x: torch.cat((m.branch(x.unflatten(1, (2, 6))[:, 1]), x.unflatten(1, (6, 2))[:, :, 0]), 1),
    "stacked": lambda m, x: torch.stack((m.branch(x[:, :6]), m.other(x[:, 6:])), 2).flatten(1, 2),
    "both": lambda m, x: F.channel_shuffle(torch.cat((m.branch(x[:, 6:]), m.other(x[:, :6])), 1), 2),
    "whole and part": lambda m, x: torch.cat((x, m.branch(x[:, 6:])), 1),
    "an assertion": lambda m, x: asserting(m, x),
    "a residual": lambda m, x: torch.cat(((p := x.chunk(2, 1))[0], p[1] + m.branch(p[1])), 1),
    "several in a row": lambda m, x: torch.cat((m.other(F.silu(m.branch(x[:, :6]))), x[:, 6:]), 1),
}


@pytest.mark.parametrize("name", SAME)
def test_moves_of_channels(name: str) -> None:
    module = filled(Moves(SAME[name]))
    for channels in (None, 12):
        check(module, described(module, channels), 12)


def test_operations_in_a_row() -> None:
    parts = [conv(6, 8, 5, 2), nn.BatchNorm2d(8), nn.Hardswish(), conv(8, 10), nn.BatchNorm2d(10), nn.ReLU()]
    module = filled(
        nn.Sequential(*parts, mb(10, 10, 3, 1, 2), nn.Sequential(nn.ReLU6(), conv(10, 4)), nn.BatchNorm2d(4))
    )
    unit = described(module)
    assert [type(each) for each in unit.operations()] == [
        ConvBNWeights,
        ConvBNWeights,
        InvertedBottleneckWeights,
        ConvBNWeights,
    ]
    check(module, unit, 6)
    assert (unit.out_channels, unit.size_after((9, 8)), len(unit.norms())) == (4, (5, 4), 6)
    expected = 20 * (6 * 8 * 25 + 8 * 10 + 10 * 20 + 20 * 9 + 20 * 10 + 10 * 4)
    assert unit.macs((9, 8)) == expected


def test_separable_convolutions() -> None:
    module = filled(nn.Sequential(*separable(6, 5, 2), *separable(6, 3, out=10)))
    unit = described(module)
    (branch,) = unit.branches
    assert [type(each) for each in branch.operations] == [SeparableWeights] * 2
    assert (branch.activation, branch.operations[0].activation, branch.stride) == ("relu", "relu", 2)
    check(module, unit, 6)
    assert unit.macs((9, 8)) == 20 * (6 * 25 + 36 + 6 * 9 + 60)
    # One of them behind an expansion without an activation, or one that normalises between, is a bottleneck no more.
    after = [conv(6, 12), nn.BatchNorm2d(12), *separable(12, out=4)[1:], conv(4, 8, 3), nn.BatchNorm2d(8), nn.SiLU()]
    module = filled(nn.Sequential(*after))
    unit = described(module)
    assert [type(each) for each in unit.operations()] == [ConvBNWeights, SeparableWeights, ConvBNWeights]
    check(module, unit, 6)


POOLED: dict[str, Callable[[], list[nn.Module]]] = {
    "maximum": lambda: [nn.MaxPool2d(3, 1, 1)],
    "mean": lambda: [nn.AvgPool2d(5, 2, 2, count_include_pad=False), nn.BatchNorm2d(6)],
    "mean with padding": lambda: [nn.AvgPool2d(3, stride=1, padding=1), nn.BatchNorm2d(6, affine=False), nn.ReLU6()],
}


@pytest.mark.parametrize("pooling", POOLED)
def test_pooling(pooling: str) -> None:
    module = filled(nn.Sequential(*POOLED[pooling]()))
    assert "convolution" in reason(recognise_unit(module, None))
    unit = described(module, 6)
    (operation,) = unit.operations()
    assert isinstance(operation, PoolWeights)
    assert operation.pooling == pooling
    check(module, unit, 6)
    assert unit.macs((9, 8)) == 0
    module = filled(nn.Sequential(conv(6, 6, 3), nn.BatchNorm2d(6), *POOLED[pooling](), *plain(6, 12, 6)))
    assert [type(each) for each in described(module).operations()] == [
        ConvBNWeights,
        PoolWeights,
        InvertedBottleneckWeights,
    ]
    check(module, described(module), 6)


def test_pooling_by_functions() -> None:
    check(module := Moves(lambda m, x: F.max_pool2d(x, 3, 2, padding=1)).double(), described(module, 12), 12)
    check(module := Moves(lambda m, x: F.avg_pool2d(x, (3, 3), 3, 1, False, False)).double(), described(module, 12), 12)
    check(module := Moves(lambda m, x: torch.max_pool2d(x, 3, padding=1)).double(), described(module, 12), 12)


class Around(nn.Module):
    """A sum with what goes in."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


REFUSALS: list[tuple[str, Callable[[], Any]]] = [
    # four groups: what one branch reads is not evenly spaced
    ("evenly spaced", lambda: Moves(lambda m, x: SAME["split"](m, F.channel_shuffle(x, 4)))),
    ("evenly spaced", lambda: Moves(lambda m, x: F.channel_shuffle(torch.cat((m.branch(x[:, :6]), x[:, 6:]), 1), 4))),
    ("dilation 1", lambda: Parts(nn.Sequential(conv(6, 6, 3, groups=6, dilation=2), nn.BatchNorm2d(6)))),
    ("padding 1", lambda: Parts(nn.Sequential(conv(6, 6, 3, groups=6, padding=0), nn.BatchNorm2d(6)))),
    ("groups 1 or as many", lambda: Parts(nn.Sequential(conv(6, 6, 3, groups=2), nn.BatchNorm2d(6)))),
    ("no bias where", lambda: Parts(nn.Sequential(conv(6, 6, 3, groups=6, bias=True), conv(6, 6), nn.BatchNorm2d(6)))),
    ("3x3, 5x5 or 7x7", lambda: Parts(nn.Sequential(conv(6, 6, 9, groups=6), conv(6, 6), nn.BatchNorm2d(6)))),
    ("got add", lambda: Around(nn.Sequential(*separable(12)))),
    ("square window of odd size", lambda: Parts(nn.MaxPool2d(2))),
    ("square window of odd size", lambda: Parts(nn.AvgPool2d((3, 5), 1, (1, 2)))),
    ("padding 1", lambda: Parts(nn.MaxPool2d(3, 1))),
    ("dilation 1", lambda: Parts(nn.MaxPool2d(3, 1, 1, 2))),
    ("ceil_mode False", lambda: Parts(nn.MaxPool2d(3, 2, 1, ceil_mode=True))),
    ("ceil_mode False", lambda: Parts(nn.AvgPool2d(3, 2, 1, ceil_mode=True))),
    ("divisor_override", lambda: Parts(nn.AvgPool2d(3, 1, 1, divisor_override=2))),
    ("one stride", lambda: Parts(nn.AvgPool2d(3, (1, 2), 1))),
    ("with_indices", lambda: Moves(lambda m, x: F.max_pool2d(m.branch(x[:, :6]), 3, 1, 1, return_indices=True)[0])),
    ("1x1 convolution that projects", lambda: Parts(nn.Sequential(conv(6, 6, 3, groups=6), nn.BatchNorm2d(6)))),
    ("got sigmoid", lambda: Parts(nn.Sequential(*plain(6, 12, 6), nn.Sigmoid()))),
    ("adaptive_max_pool2d", lambda: Parts(nn.Sequential(*plain(6, 12, 6), nn.AdaptiveMaxPool2d(9)))),
    ("Sizes of tensors", lambda: Moves(lambda m, x: torch.cat((m.branch(x[:, :6]), x[:, 6:].transpose(2, 3)), 1))),
    ("as they are", lambda: Moves(lambda m, x: SAME["split"](m, x.transpose(2, 3).reshape(x.shape)))),
    ("flip", lambda: Moves(lambda m, x: torch.cat((m.branch(x[:, :6]), x[:, 6:].flip(2)), 1))),
    ("as they are", lambda: Moves(lambda m, x: torch.cat((m.branch(x[:, :6])[:, :, :4], x[:, 6:, :4]), 1))),
    ("in no branch", lambda: Moves(lambda m, x: (m.other(x[:, 6:]), torch.cat((m.branch(x[:, :6]), x[:, 6:]), 1))[1])),
    ("each of its channels once", lambda: Moves(lambda m, x: torch.cat((m.branch(x[:, :6])[:, :3], x[:, 6:]), 1))),
    ("each of its channels once", lambda: Moves(lambda m, x: torch.cat((y := m.branch(x[:, :6]), y), 1))),
    ("from several values", lambda: Moves(lambda m, x: torch.cat((m.branch(x[:, :6]) + x[:, 6:], x[:, 6:]), 1))),
    ("channels of one map", lambda: Moves(lambda m, x: F.relu(torch.cat((m.branch(x[:, :6]), x[:, 6:]), 1)))),
    ("that is overwritten", lambda: Moves(lambda m, x: torch.cat((m.branch(x[:, :6].relu_()), x[:, 6:]), 1))),
    ("writes to the module's input", lambda: Moves(lambda m, x: torch.cat((m.branch(x.relu_()[:, :6]), x[:, 6:]), 1))),
    ("overwritten in place", lambda: Moves(lambda m, x: overwriting(m, x))),
    ("calls add_ on something else", lambda: Moves(lambda m, x: (m.count.add_(1), SAME["split"](m, x))[1])),
    ("draws random numbers", lambda: Moves(lambda m, x: (torch.manual_seed(3), SAME["split"](m, x))[1])),
    ("depends on data", lambda: Moves(lambda m, x: SAME["split"](m, x) if x.shape[2] > 5 else x)),
    ("an assertion that holds", lambda: Moves(lambda m, x: (only_even(x), SAME["split"](m, x))[1])),
    ("an assertion that holds", lambda: Moves(lambda m, x: (only_many(x), SAME["split"](m, x))[1])),
    ("is in two", lambda: Moves(lambda m, x: torch.cat(((y := m.branch(x[:, :6])), m.other(y)), 1))),
    ("expected a convolution", nn.Identity),
    ("not a module", lambda: F.relu),
]


def overwriting(module: Any, x: Tensor) -> Tensor:
    y = module.branch(x[:, :6])
    out = torch.cat((y, x[:, 6:]), 1)
    y.relu_()
    return out


@pytest.mark.parametrize("number", range(len(REFUSALS)))
def test_refusals(number: int) -> None:
    text, make = REFUSALS[number]
    assert text in reason(recognise_unit(make(), 12))


def test_a_description_is_kept_until_the_module_changes() -> None:
    module = ShuffleUnit(12, 12, 8, 3, 1)
    first = recognise_unit(module, None)
    assert recognise_unit(module, None) is first
    module.branch_main[3] = conv(8, 8, 5, groups=8)
    again = described(module)
    assert again.branches[1].operations[0].depthwise.shape[2] == 5  # type: ignore[union-attr]
    module.branch_main[1].register_forward_hook(lambda *args: None)
    assert "forward hooks" in reason(recognise_unit(module, None))
