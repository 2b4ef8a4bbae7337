"""Goes along steps that each read what the one before computed, and takes what stands there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from torch import Tensor, nn

from greedynas_ext.block_layout import ACTIVATIONS
from greedynas_ext.fx_steps import Mismatch, Step, Steps, pair
from greedynas_ext.packing import BatchNormWeights

_Description = TypeVar("_Description")


def matched(steps: Steps, match: Callable[[Cursor], _Description]) -> _Description:
    """What `match` says of all of the steps. Raises Mismatch."""
    cursor = Cursor(steps)
    description = match(cursor)
    cursor.expect_end()
    return description


class Cursor:
    """Goes along steps that each read what the one before computed."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._position = 0
        self.value = 0

    def peek(self, ahead: int = 0) -> Step | None:
        """The next step, or a later one, if there is any."""
        steps = self._steps.steps
        return steps[self._position + ahead] if self._position + ahead < len(steps) else None

    def previous(self) -> Step:
        """The step that was taken last."""
        return self._steps.steps[self._position - 1]

    def comes(self, *kinds: str) -> bool:
        """Whether the next step is of one of those kinds."""
        step = self.peek()
        return step is not None and step.kind in kinds

    def channels(self) -> Any:
        """Of the current value."""
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
        """Raises Mismatch where something comes, or where the current value is not the output."""
        step = self.peek()
        if step is not None:
            raise Mismatch(f"{step.name}: expected the end, got {step.kind}")
        if self._steps.output != self.value:
            raise Mismatch("output: expected the result of the last step, got another value")


def weight_and_bias(step: Step) -> tuple[Tensor, Tensor | None]:
    """Of a convolution or linear layer."""
    assert step.module is not None
    weight = step.module._parameters["weight"]
    assert weight is not None
    return weight, step.module._parameters.get("bias")


def conv_of(step: Step) -> nn.Conv2d:
    """The module of a convolution."""
    assert isinstance(step.module, nn.Conv2d)
    return step.module


def weight_of(step: Step) -> Tensor:
    """Of a convolution that batch normalisation follows, which takes its bias."""
    return weight_and_bias(step)[0]


def is_depthwise(step: Step) -> bool:
    """Whether a convolution is."""
    conv = conv_of(step)
    kernel = conv.weight.shape[2]
    return conv.weight.shape[1] == 1 and conv.groups == conv.weight.shape[0] and (conv.groups > 1 or kernel > 1)


def take_pointwise(cursor: Cursor, expected: str) -> Tensor:
    """The weight of a 1x1 convolution of stride 1, which comes next."""
    step = cursor.take(("conv",), expected)
    check_pointwise(step, stride=1)
    return weight_of(step)


def check_pointwise(step: Step, stride: int | None = None) -> None:
    """Raises Mismatch unless a convolution is of 1x1 and, where that is given, of that stride."""
    conv = conv_of(step)
    side = conv.weight.shape[2]
    if side != 1 or conv.groups != 1:
        raise Mismatch(f"{step.name}: expected a 1x1 convolution of groups 1, got {side}x{side}, groups {conv.groups}")
    if stride is not None and pair(conv.stride)[0] != stride:
        raise Mismatch(f"{step.name}: expected stride {stride}, got {pair(conv.stride)[0]}")


def take_depthwise(cursor: Cursor) -> Step:
    """A depthwise convolution of a size that there are kernels for, which comes next."""
    step = cursor.take(("conv",), "a depthwise convolution")
    shape = weight_of(step).shape
    if not is_depthwise(step) or shape[2] not in (3, 5, 7):
        raise Mismatch(
            f"{step.name}: expected a depthwise convolution of 3x3, 5x5 or 7x7, got weight {list(shape)} and groups "
            f"{conv_of(step).groups}"
        )
    return step


def take_norm(cursor: Cursor) -> BatchNormWeights:
    """The batch normalisation after the convolution that was taken last."""
    conv = cursor.previous()
    norm = cursor.take(("bn",), "batch normalisation").norm
    assert norm is not None
    return replace(norm, conv_bias=weight_and_bias(conv)[1])


def take_activation(cursor: Cursor) -> str:
    """An activation of ACTIVATIONS, which comes next."""
    step = cursor.take(("act",), "an activation")
    if step.activation not in ACTIVATIONS:
        raise Mismatch(f"{step.name}: expected one of {', '.join(ACTIVATIONS)}, got {step.activation}")
    return step.activation
