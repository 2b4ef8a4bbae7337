"""Describes the modules of a supernet as plain dataclasses of tensors, by what they compute.

Class and attribute names play no part: a module is traced (`fx_trace`), its graph is read as steps (`fx_read`), and
the steps are matched here. A description holds the module's own tensors, so that later writes to them are seen, and
it is kept until the module changes (`recognise_cache`). Weights that are computed of others (`derived`) are computed
anew for each description.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from greedynas_ext.block_layout import ACTIVATIONS, GATES
from greedynas_ext.derived import WithDerivedWeights, resolved
from greedynas_ext.fx_read import read_steps
from greedynas_ext.fx_steps import Mismatch, Step, Steps, pair
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
    match: Callable[[_Cursor], _Description],
) -> Callable[[nn.Module, int | None], _Description | Unrecognised]:
    """Describes modules whose steps match."""

    def describe(module: nn.Module, in_channels: int | None) -> _Description | Unrecognised:
        try:
            return matched(read_steps(trace(module), in_channels), match)
        except (Untraceable, Mismatch) as error:
            return Unrecognised(str(error))

    return describe


def matched(steps: Steps, match: Callable[[_Cursor], _Description]) -> _Description:
    """What `match` says of all of the steps. Raises Mismatch."""
    cursor = _Cursor(steps)
    description = match(cursor)
    cursor.expect_end()
    return description


class _Cursor:
    """Goes along steps that each read what the one before computed."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._position = 0
        self.value = 0

    def peek(self) -> Step | None:
        steps = self._steps.steps
        return steps[self._position] if self._position < len(steps) else None

    def previous(self) -> Step:
        return self._steps.steps[self._position - 1]

    def comes(self, *kinds: str) -> bool:
        step = self.peek()
        return step is not None and step.kind in kinds

    def channels(self) -> Any:
        return self._steps.shapes[self.value][1]

    def take(self, kinds: tuple[str, ...], expected: str, *others: int) -> Step:
        """The next step, which reads the current value and `others`, in any order."""
        step = self.peek()
        if step is None:
            raise Mismatch(f"output: expected {expected}, got the end")
        if step.kind not in kinds:
            raise Mismatch(f"{step.name}: expected {expected}, got {step.kind}")
        if sorted(step.inputs) != sorted((self.value, *others)):
            raise Mismatch(f"{step.name}: expected {expected} of what comes before it, got it of another value")
        self._position += 1
        self.value = self._position
        return step

    def expect_end(self) -> None:
        step = self.peek()
        if step is not None:
            raise Mismatch(f"{step.name}: expected the end, got {step.kind}")
        if self._steps.output != self.value:
            raise Mismatch("output: expected the result of the last step, got another value")


def _stem(cursor: _Cursor) -> StemWeights:
    step = cursor.take(("conv",), "the stem's convolution")
    conv, weight = _conv(step), _weight(step)
    if conv.groups != 1 or weight.shape[2] > 7:
        raise Mismatch(
            f"{step.name}: expected groups 1 and a kernel up to 7x7, got groups {conv.groups} and "
            f"{weight.shape[2]}x{weight.shape[2]}"
        )
    norm, activation = _norm(cursor), _activation(cursor)
    blocks = []
    while cursor.peek() is not None:
        blocks.append(_inverted_bottleneck(cursor))
    return StemWeights(weight, pair(conv.stride)[0], norm, activation, tuple(blocks))


def _head(cursor: _Cursor) -> HeadWeights:
    weight = _pointwise(cursor, "the head's 1x1 convolution")
    norm, activation = _norm(cursor), _activation(cursor)
    pool = cursor.take(("pool",), "a mean over the image")
    linear_weight, linear_bias = _weight_and_bias(cursor.take(("linear",), "a linear layer"))
    return HeadWeights(weight, norm, activation, linear_weight, linear_bias, pool.side)


def _operation(cursor: _Cursor) -> InvertedBottleneckWeights | ConvBNWeights | IdentityWeights:
    first = cursor.peek()
    if first is None:
        return IdentityWeights(cursor.channels())
    if first.kind == "conv" and not _is_depthwise(first):
        step = cursor.take(("conv",), "a 1x1 convolution")
        weight, stride = _weight(step), pair(_conv(step).stride)[0]
        _check_pointwise(step)
        norm = _norm(cursor)
        if cursor.peek() is None:
            return ConvBNWeights(weight, norm, stride)
        activation = _activation(cursor)
        if cursor.peek() is None:
            return ConvBNWeights(weight, norm, stride, activation)
        if stride != 1:
            raise Mismatch(f"{step.name}: expected stride 1, got {stride}")
        return _after_expansion(cursor, 0, weight, norm, activation)
    return _after_expansion(cursor, 0, None, None, None)


def operations_in_a_row(cursor: _Cursor) -> tuple[InvertedBottleneckWeights | ConvBNWeights, ...]:
    """Inverted bottlenecks and convolutions (of any odd size) with BN, one after the other to the end."""
    operations: list[InvertedBottleneckWeights | ConvBNWeights] = []
    while cursor.peek() is not None:
        operations.append(_next_operation(cursor))
    return tuple(operations)


def _next_operation(cursor: _Cursor) -> InvertedBottleneckWeights | ConvBNWeights:
    start, first = cursor.value, cursor.peek()
    if first is None or first.kind != "conv" or _is_depthwise(first):
        return _after_expansion(cursor, start, None, None, None)
    step = cursor.take(("conv",), "a convolution")
    weight, stride, norm = _weight(step), pair(_conv(step).stride)[0], _norm(cursor)
    activation = _activation(cursor) if cursor.comes("act") else "linear"
    following = cursor.peek()
    expands = weight.shape[2] == 1 and stride == 1
    if expands and following is not None and following.kind == "conv" and _is_depthwise(following):
        return _after_expansion(cursor, start, weight, norm, activation)
    return ConvBNWeights(weight, norm, stride, activation)


def _inverted_bottleneck(cursor: _Cursor) -> InvertedBottleneckWeights:
    start, first = cursor.value, cursor.peek()
    if first is None or first.kind != "conv" or _is_depthwise(first):
        return _after_expansion(cursor, start, None, None, None)
    weight = _pointwise(cursor, "the 1x1 convolution that expands")
    norm, activation = _norm(cursor), _activation(cursor)
    return _after_expansion(cursor, start, weight, norm, activation)


def _after_expansion(
    cursor: _Cursor,
    start: int,
    expand: Tensor | None,
    expand_norm: BatchNormWeights | None,
    expand_activation: str | None,
) -> InvertedBottleneckWeights:
    """The rest of the block whose input is value `start`."""
    step = cursor.take(("conv",), "a depthwise convolution")
    depthwise, stride = _weight(step), pair(_conv(step).stride)[0]
    if not _is_depthwise(step) or depthwise.shape[2] not in (3, 5, 7):
        raise Mismatch(
            f"{step.name}: expected a depthwise convolution of 3x3, 5x5 or 7x7, got weight {list(depthwise.shape)} "
            f"and groups {_conv(step).groups}"
        )
    depthwise_norm = _norm(cursor)
    activation = _activation(cursor) if cursor.comes("act") else "linear"
    squeeze_excitation = _squeeze_excitation(cursor) if cursor.comes("pool") else None
    project = _pointwise(cursor, "the 1x1 convolution that projects")
    project_norm = _norm(cursor)
    project_activation = _activation(cursor) if cursor.comes("act") else "linear"
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


def _squeeze_excitation(cursor: _Cursor) -> SqueezeExcitationWeights:
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


def _dense(cursor: _Cursor, expected: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of a 1x1 convolution or linear layer; a missing bias is zeros."""
    step = cursor.take(("conv", "linear"), expected)
    if step.kind == "conv":
        _check_pointwise(step, stride=1)
    weight, bias = _weight_and_bias(step)
    if bias is None:
        bias = torch.zeros(weight.shape[0], dtype=weight.dtype, device=weight.device)
    return weight, bias


def _weight_and_bias(step: Step) -> tuple[Tensor, Tensor | None]:
    assert step.module is not None
    weight = step.module._parameters["weight"]
    assert weight is not None
    return weight, step.module._parameters.get("bias")


def _conv(step: Step) -> nn.Conv2d:
    assert isinstance(step.module, nn.Conv2d)
    return step.module


def _weight(step: Step) -> Tensor:
    """Of a convolution that batch normalisation follows, which takes its bias."""
    return _weight_and_bias(step)[0]


def _is_depthwise(step: Step) -> bool:
    conv = _conv(step)
    kernel = conv.weight.shape[2]
    return conv.weight.shape[1] == 1 and conv.groups == conv.weight.shape[0] and (conv.groups > 1 or kernel > 1)


def _pointwise(cursor: _Cursor, expected: str) -> Tensor:
    step = cursor.take(("conv",), expected)
    _check_pointwise(step, stride=1)
    return _weight(step)


def _check_pointwise(step: Step, stride: int | None = None) -> None:
    conv = _conv(step)
    side = conv.weight.shape[2]
    if side != 1 or conv.groups != 1:
        raise Mismatch(f"{step.name}: expected a 1x1 convolution of groups 1, got {side}x{side}, groups {conv.groups}")
    if stride is not None and pair(conv.stride)[0] != stride:
        raise Mismatch(f"{step.name}: expected stride {stride}, got {pair(conv.stride)[0]}")


def _norm(cursor: _Cursor) -> BatchNormWeights:
    """The batch normalisation after the convolution that was taken last."""
    conv = cursor.previous()
    norm = cursor.take(("bn",), "batch normalisation").norm
    assert norm is not None
    return replace(norm, conv_bias=_weight_and_bias(conv)[1])


def _activation(cursor: _Cursor) -> str:
    step = cursor.take(("act",), "an activation")
    if step.activation not in ACTIVATIONS:
        raise Mismatch(f"{step.name}: expected one of {', '.join(ACTIVATIONS)}, got {step.activation}")
    return step.activation
