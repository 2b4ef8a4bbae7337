"""Operations one after the other, as the branches of units have them."""

from __future__ import annotations

from greedynas_ext.fx_cursor import (
    Cursor,
    conv_of,
    is_depthwise,
    take_activation,
    take_depthwise,
    take_norm,
    take_pointwise,
    weight_and_bias,
    weight_of,
)
from greedynas_ext.fx_steps import Mismatch, Step, pair
from greedynas_ext.operations import PoolWeights, SeparableWeights, UnitOperation
from greedynas_ext.packing import ConvBNWeights
from greedynas_ext.recognise import after_expansion


def activated_operations(cursor: Cursor) -> tuple[str, tuple[UnitOperation, ...]]:
    """An activation, "linear" where there is none, and operations to the end.

    Inverted bottlenecks, separable convolutions, convolutions of any odd size with BN, and pooling.
    """
    activation = _activation(cursor)
    operations: list[UnitOperation] = []
    while cursor.peek() is not None:
        operations.append(_next_operation(cursor))
    return activation, tuple(operations)


def _next_operation(cursor: Cursor) -> UnitOperation:
    start, first = cursor.value, cursor.peek()
    if cursor.comes("window"):
        return _pooling(cursor)
    if _separable_begins(cursor):
        return _separable(cursor)
    if first is None or first.kind != "conv" or is_depthwise(first):
        return after_expansion(cursor, start, None, None, None)
    step = cursor.take(("conv",), "a convolution")
    weight, stride, norm = weight_of(step), pair(conv_of(step).stride)[0], take_norm(cursor)
    activation = _activation(cursor)
    expands = weight.shape[2] == 1 and stride == 1 and _is_depthwise(cursor.peek())
    if expands and not _separable_begins(cursor):
        return after_expansion(cursor, start, weight, norm, activation)
    return ConvBNWeights(weight, norm, stride, activation)


def _separable_begins(cursor: Cursor) -> bool:
    """Whether a depthwise convolution comes that no batch normalisation follows."""
    following = cursor.peek(1)
    return _is_depthwise(cursor.peek()) and following is not None and following.kind == "conv"


def _separable(cursor: Cursor) -> SeparableWeights:
    step = take_depthwise(cursor)
    depthwise, bias = weight_and_bias(step)
    if bias is not None:
        raise Mismatch(f"{step.name}: expected no bias where no batch normalisation follows")
    project = take_pointwise(cursor, "the 1x1 convolution that projects")
    norm = take_norm(cursor)
    return SeparableWeights(depthwise, project, norm, pair(conv_of(step).stride)[0], _activation(cursor))


def _pooling(cursor: Cursor) -> PoolWeights:
    channels = cursor.channels()
    step = cursor.take(("window",), "pooling")
    norm = cursor.take(("bn",), "batch normalisation").norm if cursor.comes("bn") else None
    return PoolWeights(channels, step.pooling, step.kernel, step.stride, norm, _activation(cursor))


def _activation(cursor: Cursor) -> str:
    return take_activation(cursor) if cursor.comes("act") else "linear"


def _is_depthwise(step: Step | None) -> bool:
    return step is not None and step.kind == "conv" and is_depthwise(step)
