"""Operations as kernels run them: those of choice blocks, and those that only units have; sizes and costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from greedynas_ext.packing import (
    BatchNormWeights,
    ConvBNWeights,
    IdentityWeights,
    InvertedBottleneckWeights,
    OperationWeights,
)

Size: TypeAlias = tuple[int, int]  # height, width

POOLINGS = {"maximum": 1, "mean": 2, "mean with padding": 3}
"""Kinds of pooling: a mean is over the pixels that there are, or over all with the padding for zeros."""


@dataclass(frozen=True)
class SeparableWeights:
    """Depthwise kxk, project 1x1, BN, act; both convolutions without biases, the depthwise one padded by k // 2."""

    depthwise: Tensor  # [channels, 1, k, k], k odd
    project: Tensor  # [out, channels, 1, 1]
    bn: BatchNormWeights
    stride: int
    activation: str = "linear"


@dataclass(frozen=True)
class PoolWeights:
    """Pooling over windows of kxk pixels, k odd, padded by k // 2; [BN], act."""

    channels: int
    pooling: str  # of POOLINGS
    kernel: int
    stride: int
    bn: BatchNormWeights | None = None
    activation: str = "linear"


UnitOperation: TypeAlias = InvertedBottleneckWeights | ConvBNWeights | SeparableWeights | PoolWeights
Described: TypeAlias = OperationWeights | SeparableWeights | PoolWeights


def operation_shape(operation: Described) -> tuple[int, int, int]:
    """Channels in, channels out, stride."""
    if isinstance(operation, IdentityWeights):
        return operation.channels, operation.channels, 1
    if isinstance(operation, PoolWeights):
        return operation.channels, operation.channels, operation.stride
    if isinstance(operation, ConvBNWeights):
        return operation.weight.shape[1], operation.weight.shape[0], operation.stride
    if isinstance(operation, SeparableWeights) or operation.expand is None:
        return operation.depthwise.shape[0], operation.project.shape[0], operation.stride
    return operation.expand.shape[1], operation.project.shape[0], operation.stride


def operation_norms(
    operation: Described,
) -> tuple[BatchNormWeights | None, BatchNormWeights | None, BatchNormWeights | None]:
    """After expand, depthwise and project, which the output of any operation counts as."""
    if isinstance(operation, IdentityWeights):
        return None, None, None
    if isinstance(operation, InvertedBottleneckWeights):
        return operation.expand_bn, operation.depthwise_bn, operation.project_bn
    return None, None, operation.bn


def operation_macs(operation: Described, into: Size) -> int:
    """Multiply-accumulates of an operation on one image of size `into`."""
    if isinstance(operation, IdentityWeights | PoolWeights):
        return 0
    if isinstance(operation, ConvBNWeights):
        return int(area(size_after(into, operation.stride)) * operation.weight.numel())
    macs = area(size_after(into, operation.stride)) * (operation.depthwise.numel() + operation.project.numel())
    if isinstance(operation, SeparableWeights):
        return int(macs)
    if operation.expand is not None:
        macs += area(into) * operation.expand.numel()
    if operation.squeeze_excitation is not None:
        excitation = operation.squeeze_excitation
        macs += excitation.reduce_weight.numel() + excitation.expand_weight.numel()
    return int(macs)


def operation_numbers(operation: Described, into: Size, of_batch: bool) -> int:
    """Numbers that the kernels of an operation write to maps, for one image of size `into`.

    The depthwise output, which stays in the cache where statistics are known, and the output, with the statistics of
    the batch (`of_batch`) twice.
    """
    if isinstance(operation, IdentityWeights):
        return 0
    _, out, stride = operation_shape(operation)
    hidden = 0 if isinstance(operation, ConvBNWeights | PoolWeights) else operation.depthwise.shape[0]
    return area(size_after(into, stride)) * (int(hidden) + (1 + of_batch) * out)


def size_after(size: Size, stride: int) -> Size:
    """Of the output."""
    return -(-size[0] // stride), -(-size[1] // stride)


def area(size: Size) -> int:
    """Pixels."""
    return size[0] * size[1]
