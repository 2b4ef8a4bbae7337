"""Parameters and multiply-accumulates of a search space, as additive tables.

An operation's cost depends on its layer alone (channels, stride, height and width of the input), never on the
other choices. So a path costs the fixed parts plus one table entry per layer, and nothing has to be built or run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from greedynas.layers import Layer, Operation
    from greedynas.spaces import Space


@dataclass(frozen=True)
class Cost:
    """What a part of a network costs for one image.

    Args:
        params: learnable parameters, affine parameters of BatchNorm and biases included.
        dense_macs: multiply-accumulates of dense and pointwise convolutions and of linear maps.
        depthwise_macs: multiply-accumulates of depthwise convolutions.
    """

    params: int = 0
    dense_macs: int = 0
    depthwise_macs: int = 0

    @property
    def macs(self) -> int:
        """All multiply-accumulates."""
        return self.dense_macs + self.depthwise_macs

    def __add__(self, other: Cost) -> Cost:
        """Cost of both parts."""
        return Cost(
            self.params + other.params,
            self.dense_macs + other.dense_macs,
            self.depthwise_macs + other.depthwise_macs,
        )


@dataclass(frozen=True)
class CostTable:
    """Cost of every operation of every layer of a space at one resolution.

    Args:
        fixed: what every path pays: stem, fixed blocks, head.
        operations: ``operations[layer][op]``.
    """

    fixed: Cost
    operations: tuple[tuple[Cost, ...], ...]

    @cached_property
    def macs(self) -> Tensor:
        """Multiply-accumulates per layer and operation, int64 ``[L, operations]``."""
        return _table([[cost.macs for cost in layer] for layer in self.operations])

    @cached_property
    def params(self) -> Tensor:
        """Parameters per layer and operation, int64 ``[L, operations]``."""
        return _table([[cost.params for cost in layer] for layer in self.operations])


def output_size(size: int, stride: int) -> int:
    """Pixels along one side after a convolution of odd kernel padded by kernel // 2."""
    return (size + stride - 1) // stride


def conv_bn_cost(in_channels: int, out_channels: int, kernel: int, pixels: int, *, depthwise: bool = False) -> Cost:
    """Cost of a convolution without bias and its BatchNorm, on ``pixels`` output positions."""
    weights = out_channels * kernel**2 * (1 if depthwise else in_channels)
    params = weights + 2 * out_channels
    if depthwise:
        return Cost(params, depthwise_macs=weights * pixels)
    return Cost(params, dense_macs=weights * pixels)


def operation_cost(space: Space, layer: Layer, op: Operation, size: int) -> Cost:
    """Cost of one operation in one layer whose input is ``size`` x ``size`` pixels."""
    out = output_size(size, layer.stride)
    if op.identity:
        if layer.keeps_shape:
            return Cost()
        return conv_bn_cost(layer.in_channels, layer.out_channels, 1, out**2)
    hidden = layer.in_channels * op.expansion
    cost = conv_bn_cost(hidden, hidden, op.kernel, out**2, depthwise=True)
    cost += conv_bn_cost(hidden, layer.out_channels, 1, out**2)
    if op.expansion != 1:
        cost += conv_bn_cost(layer.in_channels, hidden, 1, size**2)
    if op.se:
        weights = 2 * hidden * space.squeeze_channels(hidden)
        cost += Cost(weights + space.squeeze_channels(hidden) + hidden, dense_macs=weights)
    return cost


def cost_table(space: Space, resolution: int) -> CostTable:
    """Build the table for images of ``resolution`` x ``resolution`` pixels; ``Space.cost_table`` keeps it."""
    size = output_size(resolution, space.stem_stride)
    fixed = conv_bn_cost(space.in_channels, space.stem_channels, 3, size**2)
    for layer in space.fixed:
        fixed += operation_cost(space, layer, space.fixed_operation, size)
        size = output_size(size, layer.stride)
    operations = []
    for layer in space.layers:
        operations.append(tuple(operation_cost(space, layer, op, size) for op in space.operations))
        size = output_size(size, layer.stride)
    fixed += conv_bn_cost(space.layers[-1].out_channels, space.head_channels, 1, size**2)
    classifier = space.head_channels * space.num_classes
    fixed += Cost(classifier + space.num_classes, dense_macs=classifier)
    return CostTable(fixed, tuple(operations))


def _table(entries: list[list[int]]) -> Tensor:
    return torch.tensor(entries, dtype=torch.int64, device="cpu")
