"""Finds how a supernet chooses: by an argument of forward, by an attribute, or as `select=` says.

Nothing is guessed from names of classes. The forward is traced (`adapt_trace`) with one choice, then with others, and
what a choice changes tells what it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from greedynas_ext.adapt_parts import Part
from greedynas_ext.adapt_select import ByArgument, ByAttribute, ByAttributes, ByFunction, Selection
from greedynas_ext.adapt_told import ToldLayer, containers_in, options_in
from greedynas_ext.adapt_trace import Chosen, ChosenPath, NeedsOpening, Run, Supernet
from greedynas_ext.fx_trace import Untraceable

_MOST_OPTIONS = 1000
_LONGEST = 512
_OF_ANY_MODULE = frozenset(vars(nn.Module()))
_NO_SUCH_OPTION = (IndexError, KeyError, AttributeError)


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
    """The selection of a supernet whose forward takes a path, or whose attribute holds one.

    `name` is that of the argument or attribute; None: to be found.

    Raises:
        NotFound: where nothing is such an argument.
        Untraceable: where one has to be, and cannot be traced.
        ValueError: where an option runs another candidate than was told.
    """
    reasons = []
    for kind, place in _places(supernet.module, name):
        probe = _Probe(supernet, kind, place)
        try:
            return probe.selection(told), probe.traces
        except Untraceable as error:
            if kind == "required":
                raise Untraceable(f"with a path as {place!r}, {error}") from error
            reasons.append(f"{place!r}: {error}")
    raise NotFound("; ".join(reasons))


def _places(module: nn.Module, name: str | None) -> Iterator[tuple[str, str]]:
    """What may hold the path: a required argument, one with a default, or an attribute."""
    parameters = list(inspect.signature(module.forward).parameters.values())[1:]
    if name is not None:
        found = next((parameter for parameter in parameters if parameter.name == name), None)
        if found is not None:
            yield ("spread" if found.kind is found.VAR_POSITIONAL else "required"), name
        elif hasattr(module, name):
            yield "attribute", name
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
    for attribute, value in vars(module).items():
        if not attribute.startswith("_") and (value is None or _is_path(value)):
            yield "attribute", attribute


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
        options: list[tuple[Any, ...]] = [self._options(layer, length, base) for layer in range(length)]
        return self._made(options)

    def _made(self, options: Sequence[tuple[Any, ...]]) -> Selection:
        if self._kind == "attribute":
            return ByAttribute(tuple(options), self._place)
        return ByArgument(tuple(options), self._place, self._kind == "spread")

    def _run(self, path: ChosenPath) -> Run:
        def run(module: nn.Module, images: Any) -> Any:
            if self._kind == "attribute":
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
            seen.append(found)
            repeated = repeated + 1 if found in seen[:-1] else 0
            if repeated == 3:
                break
        return tuple(range(len(seen) - repeated))


def _chosen(path: Sequence[int]) -> ChosenPath:
    return ChosenPath(map(Chosen, path))


def _held(base: tuple[Part, ...], other: tuple[Part, ...], supernet: Supernet) -> tuple[Any, ...] | None:
    """The options that a list or dictionary of modules holds, where one child of it takes another's place."""
    before, after = _called(base), _called(other)
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


def _called(parts: tuple[Part, ...]) -> set[str]:
    return {call.target for part in parts for call in part if call.kind == "module"}


def _check_told(selection: Selection, told: Sequence[ToldLayer], base: tuple[Part, ...], traces: Traces) -> None:
    """Each option of a layer runs the candidate that stands at its place."""
    for number, layer in enumerate(told):
        for option, candidate in enumerate(layer.candidates):
            path = [0] * len(told)
            path[number] = option
            found = base if option == 0 else traces.of(selection.of(path))
            if not any(name == candidate or name.startswith(f"{candidate}.") for name in _called(found)):
                raise ValueError(
                    f"choices[{number}][{option}]: expected that this option runs {candidate}, which it does not"
                )


def by_attributes(supernet: Supernet, told: Sequence[ToldLayer] | None, name: str | None) -> tuple[Selection, Traces]:
    """The selection of a supernet in which modules with several candidates hold an attribute that chooses.

    Layers stand in the order of `told`, or in that in which the modules are registered.

    Raises:
        NotFound: where there are no such modules, or more than one attribute may be what chooses.
    """
    found: dict[str, tuple[str, str, tuple[Any, ...]]] = {}  # container: (module, attribute, options)
    wanted = None if told is None else [layer.container for layer in told]
    for module_name, module in list(supernet.modules.items()):
        holders = containers_in(module, module_name) or [(module_name, module)]
        for container, holder in holders:
            if wanted is not None and container not in wanted and module_name not in wanted:
                continue
            attributes = _attributes_that_choose(supernet, module, holder, container, name)
            if len(attributes) > 1:
                names = ", ".join(repr(attribute) for attribute, _ in attributes)
                raise NotFound(f"{module_name}: any of {names} may choose")
            if attributes:
                key = module_name if wanted is not None and module_name in wanted else container
                found[key] = (module_name, *attributes[0])
    if wanted is not None:
        missing = [layer for layer in wanted if layer not in found]
        if missing:
            raise NotFound(f"no attribute of {missing[0]!r} was found that chooses among its candidates")
        order: list[str] = [layer for layer in wanted if layer is not None]
    else:
        order = list(found)
    if not order:
        raise NotFound("no module was found with candidates and an attribute that chooses among them")
    chosen = [found[key] for key in order]
    opened = {""}
    for module_name, _, _ in chosen:
        pieces = module_name.split(".")
        opened |= {".".join(pieces[:count]) for count in range(1, len(pieces) + 1)}
    modules, attributes_, options = zip(*chosen, strict=True)
    return ByAttributes(options, modules, attributes_), Traces(supernet, frozenset(opened))


def _attributes_that_choose(
    supernet: Supernet, module: nn.Module, holder: nn.Module, container: str, name: str | None
) -> list[tuple[str, tuple[Any, ...]]]:
    """Attributes of `module`, with the values for each option, that make it call one child of `holder`."""
    keys = [key for key, child in holder._modules.items() if child is not None]
    if len(keys) < 2 or type(module).forward is nn.Module.forward:
        return []
    if name is not None:
        given = [(name, getattr(module, name))] if hasattr(module, name) else []
    else:
        given = [(attribute, value) for attribute, value in vars(module).items() if attribute not in _OF_ANY_MODULE]
    found = []
    for attribute, value in given:
        for values in _forms(value, keys):
            if _chooses(supernet, module, holder, container, keys, attribute, values):
                found.append((attribute, values))
                break
    return found


def _forms(value: Any, keys: Sequence[str]) -> list[tuple[Any, ...]]:
    """How an attribute that holds `value` may name the options."""
    positions = tuple(range(len(keys)))
    if isinstance(value, bool):
        return []
    if isinstance(value, int):
        return [positions]
    if isinstance(value, str):
        return [tuple(keys)]
    if value is None:
        return [tuple(keys), positions]
    if type(value) in (list, tuple) and len(value) == 1:
        return [tuple(type(value)([each]) for each in options) for options in _forms(value[0], keys)]
    return []


def _chooses(
    supernet: Supernet,
    module: nn.Module,
    holder: nn.Module,
    container: str,
    keys: Sequence[str],
    attribute: str,
    values: Sequence[Any],
) -> bool:
    prefix = f"{container}." if container else ""
    names = [supernet.names[id(holder._modules[key])] for key in keys]
    opened = frozenset([supernet.names[id(module)]])
    if len(set(names)) < len(names):
        return False  # the same module twice: nothing tells which of the two is chosen
    # The second first: most attributes choose nothing, and the first is what runs whatever they are.
    for position in (1, 0, *range(2, len(keys))):

        def run(shadow: nn.Module, images: Any, position: int = position) -> Any:
            value = values[position]
            setattr(shadow, attribute, list(value) if isinstance(value, list) else value)
            return shadow(images)

        try:
            called = _called(supernet.trace(run, opened, module))
        except Untraceable:
            return False
        if {name for name in called if name in names or name.startswith(prefix)} != {names[position]}:
            return False
    return True


def by_function(supernet: Supernet, told: Sequence[ToldLayer], select: Any) -> tuple[Selection, Traces]:
    """The selection that `select` makes; what it switches is opened."""
    selection = ByFunction(tuple(layer.options for layer in told), select)
    most = max(selection.sizes)
    paths = [[min(option, size - 1) for size in selection.sizes] for option in range(most)]
    switched = supernet.switched([lambda module, path=path: select(module, _values(selection, path)) for path in paths])  # type: ignore[misc]
    opened = {""}
    for name in switched:
        pieces = name.split(".")
        opened |= {".".join(pieces[:count]) for count in range(1, len(pieces) + 1)}
    return selection, Traces(supernet, frozenset(opened))


def _values(selection: Selection, path: Sequence[int]) -> list[Any]:
    return [options[op] for options, op in zip(selection.options, path, strict=True)]
