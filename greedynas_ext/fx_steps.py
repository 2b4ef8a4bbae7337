"""Supernet operations as the few steps that they consist of, with the shapes between them.

Shapes hold channels as integers and all else as names: a convolution of stride 1 leaves "H" and "W" as they are, any
other gives new names, so that equal shapes mean equal sizes for any input. Reshaping a mean over the image is no step;
the same mean then has another shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import nn

from greedynas_ext.packing import BatchNormWeights

Shape: TypeAlias = tuple[int | str | None, ...]


class Mismatch(Exception):
    """A graph that is not read; the message is the reason."""


@dataclass(frozen=True)
class Step:
    """One step; step i computes value i + 1, and value 0 is the module's input.

    Attributes:
        kind: "conv", "bn", "act", "pool" (mean over the image), "window" (pooling by such), "linear", "add", "mul"
            or "channels" (some of a map's).
        name: the module or function behind it, for reasons.
        inputs: the values it reads.
        module: of conv and linear.
        norm: of bn.
        activation: of act: of ACTIVATIONS or GATES.
        side: of pool: the height and width that the image has to have for it to be a mean over the image; 0: any.
        channels: of channels: which.
        pooling: of window: of POOLINGS.
        kernel: of window: its height and width, odd.
        stride: of window.
    """

    kind: str
    name: str
    inputs: tuple[int, ...]
    module: nn.Module | None = None
    norm: BatchNormWeights | None = None
    activation: str = ""
    side: int = 0
    channels: range = range(0)
    pooling: str = ""
    kernel: int = 0
    stride: int = 0


@dataclass(frozen=True)
class Steps:
    """The steps in the order of execution, the shapes of values 0, 1, ..., and which of them is the output."""

    steps: tuple[Step, ...]
    shapes: tuple[Shape, ...]
    output: int


@dataclass(frozen=True)
class Value:
    """A value in a shape: its own or a reshaped one."""

    index: int
    shape: Shape


@dataclass(frozen=True)
class Pending:
    """What may be part of an activation or a mean that later calls complete.

    Attributes:
        what: "sigmoid", "hsigmoid", "x + 3", "relu6(x + 3)", "x * relu6(x + 3)", or "mean" over one side of the image.
        of: x.
    """

    what: str
    of: Value
    shape: Shape


class StepList:
    """Collects steps in the order of execution, and sees to it that no value is read after it was written to."""

    def __init__(self, in_channels: int | None) -> None:
        self.name = ""  # of what is being read, for reasons
        self._steps: list[Step] = []
        self._shapes: list[Shape] = [("N", in_channels, "H", "W")]
        self._overwritten: set[int] = set()

    def input(self) -> Value:
        """The module's input."""
        return Value(0, self._shapes[0])

    def step(self, kind: str, shape: Shape, *inputs: Any, writes: bool = False, **details: Any) -> Value:
        """Adds a step that computes a value of `shape`; with `writes` in the place of its first input."""
        for value in inputs:
            if not isinstance(value, Value):
                raise Mismatch(f"{self.name}: expected a tensor computed from the input, got {value!r}")
            self._check_readable(value)
        if writes:
            if inputs[0].index == 0:
                raise Mismatch(f"{self.name}: writes to the module's input")
            self._overwritten.add(inputs[0].index)
        self._steps.append(Step(kind, self.name, tuple(value.index for value in inputs), **details))
        self._shapes.append(shape)
        return Value(len(self._steps), shape)

    def settled(self, value: Any) -> Any:
        """The value of something pending that is an activation already; anything else as it is."""
        if isinstance(value, tuple):
            return tuple(map(self.settled, value))
        if not isinstance(value, Pending):
            return value
        self.check("an activation or a mean", value.what in ("sigmoid", "hsigmoid"), value.what)
        return self.step("act", value.shape, value.of, activation=value.what)

    def finished(self, output: Any) -> Steps:
        """The steps that lead to `output`."""
        self.name = "output"
        output = self.settled(output)
        self.check("a tensor", isinstance(output, Value), output)
        self.check("a tensor that is not reshaped", output.shape == self._shapes[output.index], list(output.shape))
        self._check_readable(output)
        used = {output.index, *(value for step in self._steps for value in step.inputs)}
        for index, step in enumerate(self._steps, 1):
            if index not in used:
                raise Mismatch(f"{step.name}: its result is not used")
        return Steps(tuple(self._steps), tuple(self._shapes), output.index)

    def check(self, expected: str, holds: bool, got: Any) -> None:
        """Raises Mismatch unless `holds`."""
        if not holds:
            raise Mismatch(f"{self.name}: expected {expected}, got {got}")

    def _check_readable(self, value: Value) -> None:
        if value.index in self._overwritten:
            raise Mismatch(f"{self.name}: reads a value that was overwritten in place")


def pair(value: Any) -> tuple[Any, Any]:
    """A convolution's stride, padding or dilation in height and width."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    if len(values) not in (1, 2) or not all(map(is_int, values)):
        raise Mismatch(f"expected one or two integers, got {value!r}")
    return values[0], values[-1]


def strided(shape: Shape, stride: int) -> Shape:
    """Of a map after a convolution or pooling that keeps the channels and, but for the stride, the size."""
    return shape if stride == 1 else (*shape[:2], *(f"{side}/{stride}" for side in shape[2:]))


def is_int(value: Any) -> bool:
    """Whether it is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether it is an int or a float and not a bool."""
    return is_int(value) or isinstance(value, float)
