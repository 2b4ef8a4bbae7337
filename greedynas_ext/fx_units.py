"""Reads a traced module as branches between a split and a concatenation of channels.

Reshapes, transpositions, splits and concatenations are not looked at one by one: they run on the indices of the values
that they move, for two sizes of the input. Where each index ends up says which channels they pick, if that is what they
do.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from greedynas_ext.fx_read import Reader
from greedynas_ext.fx_steps import Mismatch, Pending, Step, Steps, Value
from greedynas_ext.fx_trace import Trace, asserted, first_line

# Images, height and width: odd and even, and none of them alike.
_SIZES = ((2, 7, 5), (3, 4, 9))
_JOINS = ("cat", "concat", "concatenate", "stack")
_MOVES = frozenset(
    [
        *("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "clone", "detach"),
        *("permute", "transpose", "swapaxes", "swapdims", "movedim", "channel_shuffle"),
        *("chunk", "split", "tensor_split", "unbind", "select", "narrow", "getitem"),
        *_JOINS,
    ]
)
_ARITHMETIC = ("_operator", "math", "builtins")  # modules of functions that sizes are computed with
_SHIFT = 40  # an index is the number of a value, shifted, plus a place in it


@dataclass(frozen=True)
class Branch:
    """`reads`, channels of the input, through `steps` to `writes`, channels of the output; None: as they are."""

    reads: range
    writes: range
    steps: Steps | None


def read_branches(trace: Trace, in_channels: int) -> tuple[Branch, ...]:
    """The branches of a module whose input has that many channels; each channel of the output is of one of them.

    Raises:
        Mismatch: naming what is no such thing.
    """
    found = [_UnitReader(trace, in_channels, sizes).branches() for sizes in _SIZES]
    shapes = [[(b.reads, b.writes, b.steps and [step.name for step in b.steps.steps]) for b in each] for each in found]
    if shapes[0] != shapes[1]:
        raise Mismatch("output: expected channels that do not depend on the size of the image")
    return found[0]


def likely_channels(trace: Trace) -> tuple[int, ...]:
    """How many channels the input may have: as many as the first convolution reads, or twice that, of a split.

    A split is followed by a concatenation.
    """
    joins = any(getattr(node.target, "__name__", node.target) in _JOINS for node in trace.graph.nodes)
    for node in trace.graph.nodes:
        module = trace.leaves.get(node.target) if node.op == "call_module" else None
        if isinstance(module, nn.Conv2d) and module._parameters.get("weight") is not None:
            channels = int(module.weight.shape[1] * module.groups)
            return (channels, 2 * channels) if joins else (channels,)
    return ()


class _Size(int):
    """A side of an input, by its number and by its name."""

    name: str

    def __new__(cls, number: int, name: str) -> _Size:
        size = super().__new__(cls, number)
        size.name = name
        return size

    def __eq__(self, other: object) -> bool:
        return other == self.name if isinstance(other, str) else int(self) == other

    __hash__ = int.__hash__


@dataclass(frozen=True, eq=False)
class _View:
    """Values on their way: the indices of those that it holds."""

    indices: Tensor


class _UnitReader(Reader):
    def __init__(self, trace: Trace, in_channels: int, sizes: Sequence[int]) -> None:
        super().__init__(trace, in_channels)
        self._sides = dict(zip(("N", "H", "W"), sizes, strict=True))
        self._parts: dict[tuple[int, range], Value] = {}  # channels of values that were read
        self._written: list[tuple[int, int]] = []  # value and channel of each channel of the output

    def branches(self) -> tuple[Branch, ...]:
        """Reads all."""
        return tuple(_branches(self.read(), self._written))

    def finished(self, output: Any) -> Steps:
        """The steps; `_written` says what they are to the output."""
        self.name = "output"
        self._written = self._channels(self._indices(self.settled(output)))
        parts = {index for index, step in enumerate(self._steps, 1) if step.kind == "channels"}
        if parts & self._overwritten:
            raise Mismatch("output: expected maps that are written to as a whole, got a part that is overwritten")
        return Steps(tuple(self._steps), tuple(self._shapes), len(self._steps))

    def call(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A call of a function or method; of sizes alone it is carried out."""
        name = self.name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        if target is asserted:
            self.check("an assertion that holds", bool(args[0]), "one that does not")
            return None
        if not _values((args, kwargs)):
            return self._of_sizes(target, args, kwargs)
        if name == "size" or (target is getattr and args[1] == "shape"):
            shape = self._shape(args[0])
            dim = kwargs.get("dim", args[1] if name == "size" and len(args) > 1 else None)
            return shape if dim is None else shape[dim]
        if name == "dim" or (target is getattr and args[1] == "ndim"):
            return len(self._shape(args[0]))
        if target is getattr and args[1] == "data":
            return args[0]
        if name in _MOVES:
            args = self.settled(args)
            if all(map(self._is_map, _values(args))):
                return self._moved(target, name, args, kwargs)
        args, kwargs = self._as_values(args), self._as_values(kwargs)
        return super().call(target, args, kwargs)

    def _weighted(self, name: str, value: Any) -> Value:
        self.name = name
        return super()._weighted(name, self._as_values(value))

    def _of_sizes(self, target: Any, args: Any, kwargs: Any) -> Any:
        arithmetic = not isinstance(target, str) and getattr(target, "__module__", None) in _ARITHMETIC
        self.check("a function of tensors or arithmetic", arithmetic, self.name)
        return target(*args, **kwargs)

    def _is_map(self, value: Any) -> bool:
        return isinstance(value, _View) or (
            isinstance(value, Value) and len(value.shape) == 4 and value.shape[2:] != (1, 1)
        )

    def _side(self, side: Any) -> Any:
        if not isinstance(side, str):
            return side
        name, *strides = side.split("/")
        number = self._sides[name]
        for stride in strides:
            number = -(-number // int(stride))
        return _Size(number, side)

    def _shape(self, value: Any) -> tuple[Any, ...]:
        if isinstance(value, _View):
            return tuple(value.indices.shape)
        self.check("a tensor", isinstance(value, Value), value)
        return tuple(map(self._side, value.shape))

    # Views.

    def _indices_of(self, index: int) -> Tensor:
        shape = [int(side) for side in map(self._side, self._shapes[index])]
        count = torch.Size(shape).numel()
        return torch.arange(count, device="cpu").reshape(shape) + (index << _SHIFT)

    def _indices(self, value: Any) -> Tensor:
        if isinstance(value, _View):
            return value.indices
        self.check("a map", isinstance(value, Value) and value.shape == self._shapes[value.index], value)
        return self._indices_of(value.index)

    def _moved(self, target: Any, name: str, args: Any, kwargs: Any) -> Any:
        args, kwargs = self._replaced(args, self._indices), self._replaced(kwargs, self._indices)
        try:
            if name.endswith("channel_shuffle"):
                moved = _shuffled(*args, **kwargs)
            elif isinstance(target, str):
                moved = getattr(args[0], target)(*args[1:], **kwargs)
            else:
                moved = target(*args, **kwargs)
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise Mismatch(f"{name}: {first_line(error)}") from None
        views = tuple(map(_View, (moved,) if isinstance(moved, Tensor) else moved))
        self.check("channels", all(view.indices.numel() > 0 for view in views), "none")
        return views[0] if isinstance(moved, Tensor) else views

    def _as_values(self, given: Any) -> Any:
        """With values in the place of views."""
        return self._replaced(given, lambda each: self._value(each) if isinstance(each, _View) else each)

    def _value(self, view: _View) -> Value:
        picked = self._channels(view.indices)
        index = picked[0][0]
        self.check("channels of one map", all(value == index for value, _ in picked), "those of several")
        channels = _progression([channel for _, channel in picked])
        shape = self._shapes[index]
        if channels == range(shape[1]):  # type: ignore[arg-type]
            return Value(index, shape)
        key = index, channels
        if key not in self._parts:
            whole = Value(index, shape)
            self._parts[key] = self.step("channels", (shape[0], len(channels), *shape[2:]), whole, channels=channels)
        return self._parts[key]

    def _channels(self, indices: Tensor) -> list[tuple[int, int]]:
        """Value and channel of each channel of a view that consists of such, else Mismatch."""
        self.check("a map", indices.dim() == 4 and indices.numel() > 0, list(indices.shape))
        wholes: dict[int, Tensor] = {}
        picked, maps = [], []
        for first in indices[0, :, 0, 0].tolist():
            value = first >> _SHIFT
            if value not in wholes:
                self._check_readable(Value(value, self._shapes[value]))
                wholes[value] = self._indices_of(value)
                self.check("a map", wholes[value].dim() == 4, self._shapes[value])
            whole = wholes[value]
            channel = (first - (value << _SHIFT)) // whole[0, 0].numel() % whole.shape[1]
            picked.append((value, channel))
            maps.append(whole[:, channel])
        same = all(each.shape == maps[0].shape for each in maps) and torch.equal(torch.stack(maps, 1), indices)
        self.check("channels of maps as they are", same, "other rearrangements")
        return picked

    @classmethod
    def _replaced(cls, given: Any, change: Any) -> Any:
        """With what `change` makes of values and views in it."""
        if isinstance(given, Value | _View):
            return change(given)
        if isinstance(given, tuple):
            return tuple(cls._replaced(each, change) for each in given)
        if isinstance(given, dict):
            return {key: cls._replaced(each, change) for key, each in given.items()}
        return given


def _values(given: Any) -> list[Any]:
    return [each for each in _leaves(given) if isinstance(each, Value | Pending | _View)]


def _leaves(given: Any) -> Iterator[Any]:
    if isinstance(given, tuple | dict):
        for each in given.values() if isinstance(given, dict) else given:
            yield from _leaves(each)
    else:
        yield given


def _shuffled(input: Tensor, groups: int) -> Tensor:
    images, channels, height, width = input.shape
    return input.reshape(images, groups, channels // groups, height, width).transpose(1, 2).reshape(input.shape)


def _progression(numbers: Sequence[int]) -> range:
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    found = range(numbers[0], numbers[0] + step * len(numbers), step) if step > 0 else range(0)
    if list(found) != list(numbers):
        raise Mismatch(f"expected evenly spaced channels, got {list(itertools.islice(numbers, 6))}, ...")
    return found


def _branches(steps: Steps, written: Sequence[tuple[int, int]]) -> Iterator[Branch]:
    used: set[int] = set()
    for value in dict.fromkeys(index for index, _ in written):
        routes = [(channel, place) for place, (index, channel) in enumerate(written) if index == value]
        if value == 0:
            yield from _handed_on(routes)
            continue
        places = dict(routes)
        if sorted(channel for channel, _ in routes) != list(range(steps.shapes[value][1])):  # type: ignore[arg-type]
            raise Mismatch(f"{steps.steps[value - 1].name}: expected each of its channels once in the output")
        root, members = _leading_to(steps, value)
        if used & members:
            raise Mismatch(f"{steps.steps[min(used & members) - 1].name}: expected to be in one branch, is in two")
        used |= members
        reads = range(steps.shapes[0][1]) if root == 0 else steps.steps[root - 1].channels  # type: ignore[arg-type]
        yield Branch(reads, _progression([places[c] for c in sorted(places)]), _part(steps, root, sorted(members)))
    for index, step in enumerate(steps.steps, 1):
        if index not in used and step.kind != "channels":
            raise Mismatch(f"{step.name}: its result is in no branch")


def _handed_on(routes: Sequence[tuple[int, int]]) -> Iterator[Branch]:
    """Channels of the input, and where in the output they are, in runs that are evenly spaced."""
    runs: list[list[tuple[int, int]]] = []
    for route in routes:
        run = runs[-1] if runs else []
        ahead = [b - a for a, b in zip(run[-1], route, strict=True)] if run else [0]
        before = [b - a for a, b in zip(run[-2], run[-1], strict=True)] if len(run) > 1 else ahead
        if min(ahead) > 0 and ahead == before:
            run.append(route)
        else:
            runs.append([route])
    for run in runs:
        yield Branch(_progression([channel for channel, _ in run]), _progression([place for _, place in run]), None)


def _leading_to(steps: Steps, value: int) -> tuple[int, set[int]]:
    """The input, or the channels of it, from which a value is computed, and the steps between."""
    members: set[int] = set()
    roots: set[int] = set()
    pending = [value]
    while pending:
        index = pending.pop()
        if index == 0 or steps.steps[index - 1].kind == "channels":
            roots.add(index)
        elif index not in members:
            members.add(index)
            pending += steps.steps[index - 1].inputs
    root = roots.pop()
    name = steps.steps[value - 1].name
    if roots or (root != 0 and steps.steps[root - 1].inputs != (0,)):
        raise Mismatch(f"{name}: expected a branch from some channels of the input, got one from several values")
    return root, members


def _part(steps: Steps, root: int, members: Sequence[int]) -> Steps:
    """Steps `members` alone, with `root` for their input."""
    numbers = {index: number for number, index in enumerate((root, *members))}

    def moved(step: Step) -> Step:
        return replace(step, inputs=tuple(numbers[index] for index in step.inputs))

    inner = tuple(moved(steps.steps[index - 1]) for index in members)
    return Steps(inner, tuple(steps.shapes[index] for index in numbers), len(members))
