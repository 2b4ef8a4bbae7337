"""Finds the path that a supernet is given: an argument of its forward, or an attribute.

Nothing is guessed from names of classes. The forward is traced (`adapt_trace`) with one choice, then with others, and
what a choice changes tells what it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from greedynas_ext.adapt_parts import Part
from greedynas_ext.adapt_select import ByArgument, ByAttribute, Selection
from greedynas_ext.adapt_told import ToldLayer, options_in
from greedynas_ext.adapt_trace import Chosen, ChosenPath, NeedsOpening, Run, Supernet
from greedynas_ext.fx_trace import Untraceable

_MOST_OPTIONS = 1000
_LONGEST = 512
_NO_SUCH_OPTION = (IndexError, KeyError, AttributeError, AssertionError, ValueError)


class NotFound(Exception):
    """No way was found in which the supernet chooses; the message says what was tried."""


class Traces:
    """Traces of a supernet for one way of choosing. `opened` grows with the modules that turn out to choose."""

    def __init__(self, supernet: Supernet, opened: frozenset[str] = frozenset([""])) -> None:
        self.supernet, self.opened = supernet, opened

    def of(self, run: Run) -> tuple[Part, ...]:
        """What `run` does. Raises Untraceable."""
        while True:
            try:
                return self.supernet.trace(run, self.opened)
            except NeedsOpening as request:
                if request.name in self.opened:
                    raise
                self.opened |= {request.name}

    def attempt(self, run: Run) -> tuple[Part, ...] | None:
        """The same; None where it cannot be traced."""
        try:
            return self.of(run)
        except Untraceable:
            return None


def by_argument(supernet: Supernet, told: Sequence[ToldLayer] | None, name: str | None) -> tuple[Selection, Traces]:
    """The selection of a supernet whose forward takes a path; `name` is that of the argument, None: to be found.

    Raises:
        NotFound: where nothing is such an argument.
        Untraceable: where one has to be, and cannot be traced.
        ValueError: where an option runs another candidate than was told.
    """
    reasons = []
    for kind, place in _arguments(supernet.module, name):
        probe = _Probe(supernet, kind, place)
        try:
            return probe.selection(told), probe.traces
        except Untraceable as error:
            if kind == "required":
                raise Untraceable(f"with a path as {place!r}, {error}") from error
            reasons.append(f"{place!r}: {error}")
    raise NotFound("; ".join(reasons))


def by_attribute(supernet: Supernet, told: Sequence[ToldLayer] | None, name: str | None) -> tuple[Selection, Traces]:
    """The selection of a supernet one of whose attributes holds the path; `name` is the attribute's, None: to be found.

    Raises:
        NotFound: where there is no such attribute.
        ValueError: where an option runs another candidate than was told.
    """
    module, reasons = supernet.module, []
    if name is not None:
        attributes = [name] if hasattr(module, name) else []
    else:
        attributes = [
            attribute
            for attribute, value in vars(module).items()
            if not attribute.startswith("_") and (value is None or _is_path(value))
        ]
    for attribute in attributes:
        probe = _Probe(supernet, "attribute" if name is None else "told attribute", attribute)
        try:
            return probe.selection(told), probe.traces
        except Untraceable as error:
            reasons.append(f"{attribute!r}: {error}")
    raise NotFound("; ".join(reasons))


def _arguments(module: nn.Module, name: str | None) -> Iterator[tuple[str, str]]:
    """What may be the path: the one required argument, or else any that has a default."""
    parameters = list(inspect.signature(module.forward).parameters.values())[1:]
    if name is not None:
        for parameter in parameters:
            if parameter.name == name:
                yield ("spread" if parameter.kind is parameter.VAR_POSITIONAL else "required"), name
        return
    required = [parameter for parameter in parameters if parameter.default is parameter.empty]
    required = [parameter for parameter in required if parameter.kind is not parameter.VAR_KEYWORD]
    if len(required) > 1:
        names = ", ".join(parameter.name for parameter in required)
        raise NotFound(f"forward takes more than images and a path ({names})")
    if required:
        yield ("spread" if required[0].kind is required[0].VAR_POSITIONAL else "required"), required[0].name
        return
    for parameter in parameters:
        if parameter.kind is not parameter.VAR_KEYWORD:
            yield "optional", parameter.name


def _is_path(value: Any) -> bool:
    integers = isinstance(value, list | tuple) and all(isinstance(each, int | str) for each in value)
    return integers and not all(isinstance(each, bool) for each in value)


class _Endless(ChosenPath):
    """As many zeros as anybody reads."""

    def __init__(self) -> None:
        super().__init__()
        self.read = 0

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, int) or index < 0 or index >= _LONGEST:
            raise _LengthNeeded("the path's length is asked for")
        self.read = max(self.read, index + 1)
        return Chosen(0)

    def __iter__(self) -> Iterator[Any]:
        index = 0
        while True:
            yield self[index]
            index += 1

    def __len__(self) -> int:
        raise _LengthNeeded("the path's length is asked for")

    def __bool__(self) -> bool:
        return True


class _LengthNeeded(Exception):
    pass


class _Probe:
    """Finds the number of layers and of options of a path that is given at one place."""

    def __init__(self, supernet: Supernet, kind: str, place: str) -> None:
        self._supernet, self._kind, self._place = supernet, kind, place
        self.traces = Traces(supernet)

    def selection(self, told: Sequence[ToldLayer] | None) -> Selection:
        if told is not None:
            selection = self._made([layer.options for layer in told])
            base = self.traces.of(selection.of([0] * len(told)))
            _check_told(selection, told, base, self.traces)
            return selection
        length, base = self._length()
        return self._made([self._options(layer, length, base) for layer in range(length)])

    def _made(self, options: Sequence[tuple[Any, ...]]) -> Selection:
        if "attribute" in self._kind:
            return ByAttribute(tuple(options), self._place)
        return ByArgument(tuple(options), self._place, self._kind == "spread")

    def _run(self, path: ChosenPath) -> Run:
        def run(module: nn.Module, images: Any) -> Any:
            if "attribute" in self._kind:
                setattr(module, self._place, path)
                return module(images)
            return module(images, *path) if self._kind == "spread" else module(images, **{self._place: path})

        return run

    def _zeros(self, length: int) -> tuple[Part, ...] | None:
        return self.traces.attempt(self._run(_chosen([0] * length)))

    def _length(self) -> tuple[int, tuple[Part, ...]]:
        """How many layers a path has, and what the first options do."""
        endless = _Endless()
        try:
            if self._kind == "spread":
                raise Untraceable("the path's length is asked for")
            base = self.traces.of(self._run(endless))
            length = endless.read
            # An iteration may have read one more than it had a use for.
            while length > 1 and self._zeros(length - 1) == base:
                length -= 1
            if length == 0:
                raise Untraceable("it is not used as a path")
            return length, base
        except Untraceable as error:
            if (
                self._kind in ("optional", "attribute")
                and endless.read == 0
                and not isinstance(error.__cause__, _LengthNeeded)
            ):
                raise  # nothing speaks for a path here
            guesses = [endless.read - 1, endless.read]
            for length in [*(guess for guess in guesses if guess > 0), *range(1, _LONGEST)]:
                found = self._zeros(length)
                if found is not None:
                    break
            else:
                raise
        while (longer := self._zeros(length + 1)) is not None and longer != found:
            length, found = length + 1, longer
        return length, found

    def _options(self, layer: int, length: int, base: tuple[Part, ...]) -> tuple[Any, ...]:
        """Values of the options of a layer: what holds the candidates tells, or else the last that can be chosen."""
        seen = [base]
        repeated = 0
        for option in range(1, _MOST_OPTIONS):
            path = [0] * length
            path[layer] = option
            try:
                found = self.traces.of(self._run(_chosen(path)))
            except Untraceable as error:
                if not isinstance(error.__cause__, _NO_SUCH_OPTION):
                    raise
                repeated = 0
                break
            if option == 1:
                held = _held(base, found, self._supernet)
                if held is not None:
                    return held
                if self._kind in ("optional", "attribute"):  # it may be anything: only candidates in a row tell
                    raise Untraceable("what it changes are no candidates in a list or dictionary of modules")
            seen.append(found)
            repeated = repeated + 1 if found in seen[:-1] else 0
            if repeated == 3:
                break
        return tuple(range(len(seen) - repeated))


def _chosen(path: Sequence[int]) -> ChosenPath:
    return ChosenPath(map(Chosen, path))


def _held(base: tuple[Part, ...], other: tuple[Part, ...], supernet: Supernet) -> tuple[Any, ...] | None:
    """The options that a list or dictionary of modules holds, where one child of it takes another's place."""
    before, after = called(base), called(other)
    gone = {name.rpartition(".")[0] for name in before - after}
    come = {name.rpartition(".")[0] for name in after - before}
    found = set()
    for name in gone & come:
        module = supernet.modules.get(name)
        if isinstance(module, nn.ModuleList | nn.ModuleDict):
            options, candidates = options_in(module, name)
            by_key = isinstance(module, nn.ModuleDict) and name in supernet.by_position
            found.add(options if by_key else tuple(range(len(candidates))))
    return found.pop() if len(found) == 1 else None


def called(parts: tuple[Part, ...]) -> set[str]:
    """Names of the modules that are called."""
    return {call.target for part in parts for call in part if call.kind == "module"}


def _check_told(selection: Selection, told: Sequence[ToldLayer], base: tuple[Part, ...], traces: Traces) -> None:
    """Each option of a layer runs the candidate that stands at its place."""
    for number, layer in enumerate(told):
        for option, candidate in enumerate(layer.candidates):
            path = [0] * len(told)
            path[number] = option
            found = base if option == 0 else traces.of(selection.of(path))
            if not any(name == candidate or name.startswith(f"{candidate}.") for name in called(found)):
                raise ValueError(
                    f"choices[{number}][{option}]: expected that this option runs {candidate}, which it does not"
                )
