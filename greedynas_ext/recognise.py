"""Describes the modules of a supernet as plain dataclasses of tensors, by what they compute.

Class and attribute names play no part: a module is traced (`fx_trace`), its graph is read as steps (`fx_read`), and
the steps are matched here. A description holds the module's own tensors, so that later writes to them are seen, and
it is kept until the module changes (`recognise_cache`). Weights that are computed of others (`derived`) are computed
anew for each description.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from greedynas_ext.block_layout import GATES
from greedynas_ext.derived import WithDerivedWeights, resolved
from greedynas_ext.fx_cursor import (
    Cursor,
    check_pointwise,
    conv_of,
    is_depthwise,
    matched,
    take_activation,
    take_depthwise,
    take_norm,
    take_pointwise,
    weight_and_bias,
    weight_of,
)
from greedynas_ext.fx_read import read_steps
from greedynas_ext.fx_steps import Mismatch, pair
from greedynas_ext.fx_trace import RandomNumbersDrawn, Untraceable, first_line, refusal, trace
from greedynas_ext.packing import (
    BatchNormWeights,
    ConvBNWeights,
    IdentityWeights,
    InvertedBottleneckWeights,
    SqueezeExcitationWeights,
)
from greedynas_ext.recognise_cache import Cache, Fingerprint

_Description = TypeVar("_Description")


@dataclass(frozen=True)
class StemWeights:
    """Convolution, padded by k // 2, BN (with the bias, if any), act, then inverted bottlenecks, if any."""

    conv: Tensor  # [out, in, k, k], k odd
    stride: int
    bn: BatchNormWeights
    activation: str  # of ACTIVATIONS, not linear
    blocks: tuple[InvertedBottleneckWeights, ...]


@dataclass(frozen=True)
class HeadWeights:
    """1x1 convolution, BN (with its bias, if any), act, mean over the image (maybe one of a given size), linear."""

    conv: Tensor  # [hidden, in, 1, 1]
    bn: BatchNormWeights
    activation: str  # of ACTIVATIONS, not linear
    weight: Tensor  # [classes, hidden]
    bias: Tensor | None  # [classes]
    side: int = 0  # height and width that the image has to have for the mean; 0: any


@dataclass(frozen=True)
class Unrecognised:
    """A module that has no description, and why, in one line."""

    reason: str


_cache: Cache[Any] = Cache()


def recognise_stem(module: object) -> StemWeights | Unrecognised:
    """Describes `module` if it computes a stem, [N, in, H, W] to [N, out, H', W'], in evaluation mode. Never raises."""
    return recognise(module, "stem", None, _matching(_stem))


def recognise_operation(
    module: object, in_channels: int | None
) -> InvertedBottleneckWeights | ConvBNWeights | IdentityWeights | Unrecognised:
    """Describes `module` if it computes an operation on [N, in_channels, H, W], in evaluation mode. Never raises.

    Without `in_channels` they are those of the first convolution; an identity has none to tell.
    """
    return recognise(module, "operation", in_channels, _matching(_operation))


def recognise_head(module: object) -> HeadWeights | Unrecognised:
    """Describes `module` if it computes a head, [N, in, H, W] to [N, classes], in evaluation mode. Never raises."""
    return recognise(module, "head", None, _matching(_head))


def recognise(
    module: object,
    role: str,
    in_channels: int | None,
    describe: Callable[[nn.Module, int | None], _Description | Unrecognised],
) -> _Description | Unrecognised:
    """What `describe(module, in_channels)` says, which is kept for `role` until the module changes. Never raises."""
    if not isinstance(module, nn.Module):
        return Unrecognised("not a module")
    key = (role, in_channels)
    try:
        stand_in = module.stand_in() if isinstance(module, WithDerivedWeights) else None
        if stand_in is not None:
            return resolved(recognise(stand_in.module, role, in_channels, describe), stand_in.weights)
        known: _Description | Unrecognised | None = _cache.get(module, key)
        if known is not None:
            return known
        reason = refusal(module)
        if reason is not None:
            return Unrecognised(reason)
        fingerprint = Fingerprint.of(module)
        found = describe(module, in_channels)
        # What another thread changed meanwhile may or may not be in the description.
        if fingerprint is not None and refusal(module) is None and fingerprint.matches(module):
            _cache.put(module, key, fingerprint, found)
        return found
    except RandomNumbersDrawn as error:
        return Unrecognised(str(error))
    except Exception as error:
        return Unrecognised(first_line(error))


def _matching(
    match: Callable[[Cursor], _Description],
) -> Callable[[nn.Module, int | None], _Description | Unrecognised]:
    """Describes modules whose steps match."""

    def describe(module: nn.Module, in_channels: int | None) -> _Description | Unrecognised:
        try:
            return matched(read_steps(trace(module), in_channels), match)
        except (Untraceable, Mismatch) as error:
            return Unrecognised(str(error))

    return describe


def _stem(cursor: Cursor) -> StemWeights:
    step = cursor.take(("conv",), "the stem's convolution")
    conv, weight = conv_of(step), weight_of(step)
    if conv.groups != 1 or weight.shape[2] > 7:
        raise Mismatch(
            f"{step.name}: expected groups 1 and a kernel up to 7x7, got groups {conv.groups} and "
            f"{weight.shape[2]}x{weight.shape[2]}"
        )
    norm, activation = take_norm(cursor), take_activation(cursor)
    blocks = []
    while cursor.peek() is not None:
        blocks.append(_inverted_bottleneck(cursor))
    return StemWeights(weight, pair(conv.stride)[0], norm, activation, tuple(blocks))


def _head(cursor: Cursor) -> HeadWeights:
    weight = take_pointwise(cursor, "the head's 1x1 convolution")
    norm, activation = take_norm(cursor), take_activation(cursor)
    pool = cursor.take(("pool",), "a mean over the image")
    linear_weight, linear_bias = weight_and_bias(cursor.take(("linear",), "a linear layer"))
    return HeadWeights(weight, norm, activation, linear_weight, linear_bias, pool.side)


def _operation(cursor: Cursor) -> InvertedBottleneckWeights | ConvBNWeights | IdentityWeights:
    first = cursor.peek()
    if first is None:
        return IdentityWeights(cursor.channels())
    if first.kind == "conv" and not is_depthwise(first):
        step = cursor.take(("conv",), "a 1x1 convolution")
        weight, stride = weight_of(step), pair(conv_of(step).stride)[0]
        check_pointwise(step)
        norm = take_norm(cursor)
        if cursor.peek() is None:
            return ConvBNWeights(weight, norm, stride)
        activation = take_activation(cursor)
        if cursor.peek() is None:
            return ConvBNWeights(weight, norm, stride, activation)
        if stride != 1:
            raise Mismatch(f"{step.name}: expected stride 1, got {stride}")
        return after_expansion(cursor, 0, weight, norm, activation)
    return after_expansion(cursor, 0, None, None, None)


def _inverted_bottleneck(cursor: Cursor) -> InvertedBottleneckWeights:
    start, first = cursor.value, cursor.peek()
    if first is None or first.kind != "conv" or is_depthwise(first):
        return after_expansion(cursor, start, None, None, None)
    weight = take_pointwise(cursor, "the 1x1 convolution that expands")
    norm, activation = take_norm(cursor), take_activation(cursor)
    return after_expansion(cursor, start, weight, norm, activation)


def after_expansion(
    cursor: Cursor,
    start: int,
    expand: Tensor | None,
    expand_norm: BatchNormWeights | None,
    expand_activation: str | None,
) -> InvertedBottleneckWeights:
    """The rest of the block whose input is value `start`."""
    step = take_depthwise(cursor)
    depthwise, stride = weight_of(step), pair(conv_of(step).stride)[0]
    depthwise_norm = take_norm(cursor)
    activation = take_activation(cursor) if cursor.comes("act") else "linear"
    squeeze_excitation = _squeeze_excitation(cursor) if cursor.comes("pool") else None
    project = take_pointwise(cursor, "the 1x1 convolution that projects")
    project_norm = take_norm(cursor)
    project_activation = take_activation(cursor) if cursor.comes("act") else "linear"
    residual = cursor.comes("add")
    if residual:
        cursor.take(("add",), "the sum with the block's input", start)
    return InvertedBottleneckWeights(
        expand,
        expand_norm,
        depthwise,
        depthwise_norm,
        project,
        project_norm,
        stride,
        activation if expand_activation is None else expand_activation,
        residual,
        squeeze_excitation,
        None if expand_activation in (None, activation) else activation,
        project_activation,
    )


def _squeeze_excitation(cursor: Cursor) -> SqueezeExcitationWeights:
    features = cursor.value
    pool = cursor.take(("pool",), "a mean over the image")
    if pool.side:
        raise Mismatch(f"{pool.name}: expected a mean over the image, got one of {pool.side}x{pool.side}")
    reduce, reduce_bias = _dense(cursor, "the layer that reduces")
    step = cursor.take(("act",), "relu")
    if step.activation != "relu":
        raise Mismatch(f"{step.name}: expected relu in squeeze-excitation, got {step.activation}")
    expand, expand_bias = _dense(cursor, "the layer that expands")
    gate = cursor.take(("act",), "a gate")
    if gate.activation not in GATES:
        raise Mismatch(f"{gate.name}: expected one of {', '.join(GATES)} as the gate, got {gate.activation}")
    cursor.take(("mul",), "the product with the features", features)
    return SqueezeExcitationWeights(reduce, reduce_bias, expand, expand_bias, gate.activation)


def _dense(cursor: Cursor, expected: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of a 1x1 convolution or linear layer; a missing bias is zeros."""
    step = cursor.take(("conv", "linear"), expected)
    if step.kind == "conv":
        check_pointwise(step, stride=1)
    weight, bias = weight_and_bias(step)
    if bias is None:
        bias = torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)
    return weight, bias
