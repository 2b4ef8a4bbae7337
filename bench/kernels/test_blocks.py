"""A choice block of `mbv2-7` at 224x224: torch.ops.greedynas.mixed_op, and the packing of its weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from greedynas_ext import ops, reference
from greedynas_ext.packing import (
    BatchNormWeights,
    IdentityWeights,
    InvertedBottleneckWeights,
    OperationWeights,
    pack_choice_block,
    running_statistics,
)

IMPLEMENTATIONS = {"ops": ops, "torch": reference}
# Height and width, channels in and out, stride.
LAYERS = [(56, 32, 32, 1), (28, 40, 80, 2), (14, 96, 96, 1), (7, 192, 192, 1)]
IMAGES = 8


def norm(channels: int, generator: torch.Generator) -> BatchNormWeights:
    def drawn(low: float, high: float) -> Tensor:
        return torch.rand(channels, generator=generator) * (high - low) + low

    return BatchNormWeights(drawn(0.5, 1.5), drawn(-0.3, 0.3), 1e-5, drawn(-0.3, 0.3), drawn(0.5, 2.0))


def bottleneck(
    into: int, out: int, expansion: int, kernel: int, stride: int, generator: torch.Generator
) -> InvertedBottleneckWeights:
    def drawn(*shape: int) -> Tensor:
        fan_in = shape[1] * shape[2] * shape[3]
        return torch.randn(shape, generator=generator) / fan_in**0.5

    hidden = expansion * into
    return InvertedBottleneckWeights(
        drawn(hidden, into, 1, 1),
        norm(hidden, generator),
        drawn(hidden, 1, kernel, kernel),
        norm(hidden, generator),
        drawn(out, hidden, 1, 1),
        norm(out, generator),
        stride,
        "relu6",
        stride == 1 and into == out,
    )


def operations(into: int, out: int, stride: int, generator: torch.Generator) -> list[OperationWeights]:
    made: list[OperationWeights] = [
        bottleneck(into, out, expansion, kernel, stride, generator) for expansion in (3, 6) for kernel in (3, 5, 7)
    ]
    return made + ([IdentityWeights(into)] if stride == 1 and into == out else [])


@pytest.mark.parametrize("by", IMPLEMENTATIONS)
@pytest.mark.parametrize("bn", ["batch", "running"])
@pytest.mark.parametrize(("expansion", "kernel"), [(3, 3), (6, 7)])
@pytest.mark.parametrize(("side", "into", "out", "stride"), LAYERS)
def test_mixed_op(
    timed: Any,
    generator: Any,
    by: str,
    bn: str,
    expansion: int,
    kernel: int,
    side: int,
    into: int,
    out: int,
    stride: int,
) -> None:
    weights = [bottleneck(into, out, expansion, kernel, stride, generator)]
    block, index = pack_choice_block(weights), torch.zeros(1, dtype=torch.int64)
    inputs = torch.randn(1, IMAGES, side, side, into, generator=generator)
    statistics = running_statistics(weights, block) if bn == "running" else None
    group = f"{IMAGES} of {side}x{side} {into}->{out} s{stride} e{expansion}k{kernel} {bn}"
    outputs, used = timed(IMPLEMENTATIONS[by].mixed_op, inputs, index, index, block, statistics, group=group)
    expected, expected_used = reference.mixed_op(inputs, index, index, block, statistics)
    # Sums of up to 1,152 products in float32, in another order, then normalised.
    torch.testing.assert_close(outputs, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(used, expected_used, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("by", IMPLEMENTATIONS)
def test_mixed_op_of_several_nodes(timed: Any, generator: Any, by: str) -> None:
    weights = operations(40, 40, 1, generator)
    block = pack_choice_block(weights)
    inputs = torch.randn(2, IMAGES, 28, 28, 40, generator=generator)
    arguments = inputs, torch.tensor([0, 1, 0, 1]), torch.tensor([0, 1, 5, 6]), block
    outputs, _ = timed(IMPLEMENTATIONS[by].mixed_op, *arguments, group=f"{IMAGES} of 28x28 40->40")
    torch.testing.assert_close(outputs, reference.mixed_op(*arguments)[0], rtol=1e-3, atol=1e-3)


def copied(weights: list[OperationWeights]) -> Tensor:
    """The same numbers in one tensor, in no order that a kernel could use: what copying them costs at least."""
    parts: list[Tensor] = []
    for operation in weights:
        if isinstance(operation, InvertedBottleneckWeights):
            assert operation.expand is not None
            parts += [operation.expand, operation.depthwise, operation.project]
            for bn in (operation.expand_bn, operation.depthwise_bn, operation.project_bn):
                assert bn is not None
                assert bn.weight is not None
                assert bn.bias is not None
                parts += [bn.weight, bn.bias]
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("by", ["ops", "torch"])
@pytest.mark.parametrize(("side", "into", "out", "stride"), LAYERS)
def test_packing(timed: Any, generator: Any, by: str, side: int, into: int, out: int, stride: int) -> None:
    weights = operations(into, out, stride, generator)
    function: Any = pack_choice_block if by == "ops" else copied
    packed = timed(function, weights, group=f"{into}->{out} s{stride}, {len(weights)} operations")
    numbers = packed.weights if by == "ops" else packed
    # Nothing is lost, and what is added is zeros that pad.
    assert numbers.count_nonzero() == copied(weights).count_nonzero()
    torch.testing.assert_close(numbers.double().sum(), copied(weights).double().sum(), rtol=1e-9, atol=1e-6)
