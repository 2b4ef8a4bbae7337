"""A forward as calls, cut into parts: each reads one value and gives the one that is all that the next part needs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import fx

from greedynas_ext.fx_trace import Untraceable

# An argument of a call: ("value", i) for the input (0) or the result of call i, ("constant", c), or ("tuple" or "list"
# or "slice", arguments), ("dict", ((key, argument), ...)).
Argument: TypeAlias = tuple[str, Any]

_SIZES = ("size", "dim", "ndimension", "numel", "getitem", "getattr")


class Call(NamedTuple):
    """One step of a forward.

    Attributes:
        kind: "module", "function", "method" or "tensor".
        target: a module's name, the function, the method's name, or (module's name, name of its tensor).
        args: positional arguments.
        kwargs: (name, argument) pairs.
    """

    kind: str
    target: Any
    args: tuple[Argument, ...]
    kwargs: tuple[tuple[str, Argument], ...]


Part: TypeAlias = tuple[Call, ...]
"""Calls that read one value, number 0, and whose last gives the result."""


_KINDS = {"call_module": "module", "call_function": "function", "call_method": "method", "get_attr": "tensor"}


def parts_of(graph: fx.Graph) -> tuple[Part, ...]:
    """What a graph with one placeholder computes, cut wherever a single value is all that what follows needs.

    Raises:
        Untraceable: where something is written in place that nobody is known to read.
    """
    return _parts(*_program(graph))


def _program(graph: fx.Graph) -> tuple[list[Call], int]:
    """The calls that lead to the output, and which of them gives it (0: none, it is the input)."""
    nodes = list(graph.nodes)
    placeholder, output = nodes[0], nodes[-1]
    used = {output.args[0]}
    for node in reversed(nodes[1:-1]):
        if node in used:
            used.update(node.all_input_nodes)
        elif _writes(node):
            raise Untraceable(f"{node.target}: writes in place, and its result is not used")
    numbers = {placeholder: 0}
    calls = []
    for node in nodes[1:-1]:
        if node in used:
            kwargs = tuple((key, _encoded(value, numbers)) for key, value in node.kwargs.items())
            args = tuple(_encoded(value, numbers) for value in node.args)
            target = node.target
            if node.op == "get_attr":
                module, _, name = node.target.rpartition(":")
                target = module, name
            calls.append(Call(_KINDS[node.op], target, args, kwargs))
            numbers[node] = len(calls)
    return calls, numbers[output.args[0]]


def _writes(node: fx.Node) -> bool:
    """Whether a function or method may write to what it is given. Modules whose result nobody uses are extra heads."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op in ("call_module", "get_attr") or name in _SIZES:
        return False
    flags = any(value is True for value in (*node.args, *node.kwargs.values()))
    return (
        flags or (name.endswith("_") and not name.endswith("__")) or name in ("setitem", "iadd", "imul", "__setitem__")
    )


def _encoded(value: Any, numbers: dict[fx.Node, int]) -> Argument:
    if isinstance(value, fx.Node):
        return "value", numbers[value]
    if isinstance(value, tuple | list):
        return "tuple" if isinstance(value, tuple) else "list", tuple(_encoded(each, numbers) for each in value)
    if isinstance(value, slice):
        return "slice", tuple(_encoded(each, numbers) for each in (value.start, value.stop, value.step))
    if isinstance(value, dict):
        return "dict", tuple((key, _encoded(each, numbers)) for key, each in value.items())
    if isinstance(value, int) and not isinstance(value, bool):
        return "constant", int(value)
    return "constant", value


def _inner(argument: Argument) -> tuple[Argument, ...]:
    kind, content = argument
    if kind in ("tuple", "list", "slice"):
        return tuple(content)
    return tuple(each for _, each in content) if kind == "dict" else ()


def values_in(call: Call) -> Iterator[int]:
    """The values that a call reads."""
    pending = [*call.args, *(argument for _, argument in call.kwargs)]
    while pending:
        argument = pending.pop()
        if argument[0] == "value":
            yield argument[1]
        pending.extend(_inner(argument))


def renumbered(call: Call, number: Callable[[int], int]) -> Call:
    """The call with other numbers for the values that it reads."""

    def moved(argument: Argument) -> Argument:
        kind, content = argument
        if kind == "value":
            return kind, number(content)
        if kind == "dict":
            return kind, tuple((key, moved(each)) for key, each in content)
        return (kind, tuple(map(moved, content))) if _inner(argument) else argument

    return Call(call.kind, call.target, tuple(map(moved, call.args)), tuple((k, moved(v)) for k, v in call.kwargs))


def joined(parts: tuple[Part, ...] | list[Part]) -> Part:
    """One part that does what `parts` do one after the other."""
    calls: list[Call] = []
    for part in parts:
        first = len(calls)
        calls += [renumbered(call, lambda value, first=first: first + value) for call in part]  # type: ignore[misc]
    return tuple(calls)


def executed(
    calls: Iterable[tuple[str, Any, Any, Any]],
    values: list[Any],
    module: Callable[[Any], Callable[..., Any]],
    tensor: Callable[[Any], Any],
    unseen: Collection[int] = (),
) -> Any:
    """What the last of `calls` gives; `values` holds what number 0 stands for, and is added to.

    `module` and `tensor` find what the targets of such calls name. Torch function modes do not see those numbered in
    `unseen`.
    """
    for number, (kind, target, encoded_args, encoded_kwargs) in enumerate(calls, 1):
        args = [decoded(each, values) for each in encoded_args]
        kwargs = {key: decoded(each, values) for key, each in encoded_kwargs}
        if kind == "module":
            values.append(module(target)(*args, **kwargs))
        elif kind == "tensor":
            values.append(tensor(target))
        else:
            call = functools.partial(getattr(args[0], target), *args[1:]) if kind == "method" else target
            with torch._C.DisableTorchFunction() if number in unseen else contextlib.nullcontext():
                values.append(call(**kwargs) if kind == "method" else call(*args, **kwargs))
    return values[-1]


def of_image(part: Part) -> list[bool]:
    """Whether value 0, and what each call gives, depends on value 0."""
    found = [True]
    for call in part:
        found.append(any(found[value] for value in values_in(call)))
    return found


def decoded(argument: Argument, values: Sequence[Any]) -> Any:
    """The argument that is meant, given the values that are numbered in it."""
    kind, content = argument
    if kind == "value":
        return values[content]
    if kind == "constant":
        return content
    if kind == "dict":
        return {key: decoded(each, values) for key, each in content}
    parts = [decoded(each, values) for each in content]
    return slice(*parts) if kind == "slice" else tuple(parts) if kind == "tuple" else parts


def _parts(calls: list[Call], output: int) -> tuple[Part, ...]:
    last_use = {0: 0} | {number: number for number in range(1, len(calls) + 1)}
    no_tensors: set[int] = set()
    for number, call in enumerate(calls, 1):
        for value in values_in(call):
            last_use[value] = number
        if _takes_element(call):  # of a tuple, for all that is known
            no_tensors.update((number, *values_in(call)))
        if call.kind == "tensor" or call.target in ("size", "dim", getattr):
            no_tensors.add(number)
    last_use[output] = len(calls) + 1
    parts, start, alive_until = [], 0, last_use[0]
    for number in range(1, len(calls) + 1):
        if number == len(calls) or (alive_until <= number and number not in no_tensors):
            parts.append(tuple(renumbered(call, lambda v, start=start: v - start) for call in calls[start:number]))  # type: ignore[misc]
            start, alive_until = number, last_use[number]
        alive_until = max(alive_until, last_use[number])
    return tuple(parts)


def _takes_element(call: Call) -> bool:
    return getattr(call.target, "__name__", "") == "getitem" and isinstance(call.args[1][1], int)
