"""Traces paths of elastic networks: blocks that are told what to be, with slices of weights that are larger.

A path is traced by setting it on a shadow of the supernet and calling that (`adapt_worlds`). Most of a path is seen
before in others: a module that computes an operation, a unit, is traced once for each state that a path leaves it in,
and afterwards only named. So a new path takes little more than the forward of the supernet's outermost modules.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

from greedynas_ext.adapt_parts import Part, joined, parts_of, renumbered
from greedynas_ext.adapt_segment import module_of
from greedynas_ext.adapt_select import Selection
from greedynas_ext.adapt_state import OF_ANY_MODULE, UNSET, ModuleState, ReadUnset, copied, frozen, unset_like
from greedynas_ext.adapt_trace import Shadows, Supernet, finished, is_plain, reasons, without_chance
from greedynas_ext.adapt_worlds import Worlds, WorldsRecorder, WorldsTracer, images_of, leaf_forward, worlds_of
from greedynas_ext.fx_trace import Untraceable, first_line
from greedynas_ext.recognise import Unrecognised, recognise_operation

Key: TypeAlias = tuple[str, int, int]
"""Where something stands in a path: the module, how often it came before, and how many parts after it."""

_MOST_PATHS = 10_000  # that are kept
_ATTEMPTS = 2_000


@dataclass(frozen=True, eq=False)
class Variant:
    """What is done at one place of a path, for one state. The same parts at the same place are the same object."""

    name: str
    parts: tuple[Part, ...]
    label: str


@dataclass(frozen=True, eq=False)
class _Unit:
    """A variant in a trace: what it gives in the two worlds, and the attributes that it sets."""

    variant: Variant
    worlds: Worlds
    effects: tuple[tuple[str, str, Any], ...]
    __name__: ClassVar[str] = "unit"

    def __call__(self, *_: Any) -> Any:
        raise AssertionError("a unit is not executed")


PathTrace: TypeAlias = tuple[tuple[Key, Variant], ...]


class _Again(Exception):
    """Something was found out that the trace has to begin again with."""


class _NeedsClosing(Untraceable):
    """The forward of a module cannot be traced: it has to be called as a whole."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


class Units:
    """Traces of the paths of a supernet.

    Attributes:
        choosing: for each module the attributes that change with the path.
        unset: whether these hold nothing when a path is set, so that what they held before cannot matter.
    """

    def __init__(self, supernet: Supernet, selection: Selection, channels: int) -> None:
        self.supernet, self._selection, self._channels = supernet, selection, channels
        self.choosing: dict[str, set[str]] = {}
        self.unset = False
        self.times_forgotten = 0
        self.expanded: set[str] = {""}
        self.closed: dict[str, str] = {}  # with the reason
        self.known: dict[Hashable, _Unit] = {}
        self._decided: set[str] = set()
        self._variants: dict[tuple[str, tuple[Part, ...]], Variant] = {}
        self._paths: dict[tuple[int, ...], PathTrace] = {}

    def forget(self) -> None:
        """Traces anew from now on."""
        self.times_forgotten += 1
        self.known.clear()
        self._paths.clear()

    def path(self, path: tuple[int, ...]) -> PathTrace:
        """What runs for a path of option indices, one after the other.

        Raises:
            Untraceable: saying why.
        """
        if path not in self._paths:
            if len(self._paths) >= _MOST_PATHS:
                self._paths.clear()
            self._paths[path] = self._named(without_chance(lambda: self._traced(path)))
        return self._paths[path]

    def alone(self, path: tuple[int, ...]) -> PathTrace:
        """The same, with nothing known of other paths."""
        known, self.known = self.known, {}
        found = self._named(without_chance(lambda: self._traced(path)))
        self.known.update(known)
        return found

    def _traced(self, path: tuple[int, ...]) -> tuple[Part, ...]:
        for _ in range(_ATTEMPTS):
            try:
                return self._trace(path)
            except _Again:
                self._paths.clear()
            except ReadUnset:
                if not self.unset:
                    raise
                self.unset = False
                self.forget()
            except _NeedsClosing as error:
                if self.chooses_in(error.name):
                    raise
                self.closed[error.name] = error.reason
                self._paths.clear()
        raise Untraceable("forward does something else each time")

    def _trace(self, path: tuple[int, ...]) -> tuple[Part, ...]:
        tracer = WorldsTracer()
        shadows = _UnitShadows(self, tracer)
        parameters = (p for module in self.supernet.modules.values() for p in module._parameters.values())
        dtypes = (p.dtype for p in parameters if p is not None and p.is_floating_point())
        images = tracer.input(images_of(self._channels, next(dtypes, torch.float32)))
        with WorldsRecorder(tracer):
            try:
                with reasons():
                    root = shadows.of(self.supernet.module, "")
                    output = self.supernet.pick(self._selection.run(root, images, path))
            except Untraceable as error:
                if isinstance(error.__cause__, _Again):
                    raise error.__cause__ from None
                raise
        self._check(shadows)
        for unit in self.known.values():
            self._decide(unit.variant)
        return finished(tracer, output)

    def _check(self, shadows: _UnitShadows) -> None:
        """Sees to it that each attribute that a path sets is known to be such."""
        shadows.check_structure()
        grown = False
        for name, attribute in shadows.changed():
            known = self.choosing.setdefault(name, set())
            grown |= attribute not in known
            known.add(attribute)
        for name, reason in self.closed.items():
            if self.chooses_in(name):
                raise Untraceable(f"{name}: {reason}")
        if grown:
            self.forget()
            raise _Again

    def chooses_in(self, name: str) -> bool:
        """Whether a path sets attributes of the module or of those in it."""
        return any(attributes and _is_in(each, name) for each, attributes in self.choosing.items())

    def variant(self, name: str, parts: tuple[Part, ...], label: str) -> Variant:
        """The one of these parts."""
        return self._variants.setdefault((name, parts), Variant(name, parts, label))

    def _decide(self, variant: Variant) -> None:
        """A module is a unit if it computes an operation. Raises _Again where it turns out to be none."""
        name = variant.name
        if name in self._decided or name in self.expanded:
            return
        if isinstance(recognise_operation(module_of(joined(variant.parts), self.supernet), None), Unrecognised):
            self.expanded.add(name)
            raise _Again
        self._decided.add(name)

    def _named(self, parts: Sequence[Part]) -> PathTrace:
        found: list[tuple[Key, Variant]] = []
        times: Counter[str] = Counter()
        name, after = "", 0
        for part in parts:
            own = _name_of(part)
            if own is None:
                after += 1
            else:
                name, after = own, 0
                times[name] += 1
            whole = part[0].target
            if len(part) == 1 and isinstance(whole, _Unit):
                variant = whole.variant
            else:
                labels = [call.target.variant.label for call in part if isinstance(call.target, _Unit)]
                variant = self.variant(own or "", (_spread(part),), ", ".join(filter(None, labels)))
            found.append(((name, times[name], after), variant))
        return tuple(found)


class _UnitShadows(Shadows):
    """Shadows that run their own forward, but for torch's modules and units that are known."""

    def __init__(self, units: Units, tracer: WorldsTracer) -> None:
        super().__init__(units.supernet, tracer, frozenset())
        self._units, self._worlds = units, tracer
        self._names: dict[int, str] = {}  # of shadows, by id
        self._shadows: dict[str, nn.Module] = {}
        self._initial: dict[str, tuple[dict[str, Hashable], dict[str, Any]]] = {}
        self._later: dict[str, dict[str, Any]] = {}  # attributes of shadows that are not made yet
        self._in_unit = False

    def of(self, module: nn.Module, reached_as: str) -> nn.Module:
        """The shadow of `module`; a shadow is its own."""
        shadow = super().of(module, reached_as)
        made = shadow is not module and "_modules" in vars(shadow)  # else it is itself, or being made
        if made and id(shadow) not in self._names:
            name = self.supernet.names[id(module)]
            self._names[id(shadow)], self._shadows[name] = name, shadow
            now = vars(shadow)
            initial = {key: frozen(now[key], self._names) for key in now if key not in OF_ANY_MODULE}
            fixed = {key: value for key, value in now.items() if not isinstance(value, list | dict | set)}
            self._initial[name] = initial, fixed
            now.update(self._later.pop(name, {}))
        return shadow

    def changed(self, within: str = "") -> Iterator[tuple[str, str]]:
        """(module, attribute) for each attribute that is not as it was at first."""
        for name, shadow in self._shadows.items():
            if not _is_in(name, within):
                continue
            (initial, fixed), now = self._initial[name], vars(shadow)
            for key, value in now.items():
                if key in OF_ANY_MODULE or fixed.get(key, self) is value:
                    continue
                if key not in initial or frozen(value, self._names) != initial[key]:
                    yield name, key
            for key in initial:
                if key not in now:
                    raise Untraceable(f"{name}: its attribute {key} is deleted")

    def check_structure(self) -> None:
        """Raises Untraceable where a parameter, a buffer or a child was put in the place of another."""
        for module, shadow in self._pairs:
            name = self.supernet.names[id(module)] or "the supernet"
            if list(dict.items(shadow._modules)) != list(module._modules.items()):
                raise Untraceable(f"{name}: modules in it are replaced")
            for mine, own in ((shadow._parameters, module._parameters), (shadow._buffers, module._buffers)):
                if list(mine) != list(own) or any(
                    t is not None and id(t) not in self._worlds.tensors for t in mine.values()
                ):
                    raise Untraceable(f"{name}: tensors in it are replaced")

    def _attributes(self, module: nn.Module, name: str) -> dict[str, Any]:
        attributes = super()._attributes(module, name)
        if self._units.unset:
            for key in self._units.choosing.get(name, ()):
                if key in attributes:
                    attributes[key] = unset_like(attributes[key])
        return attributes

    def _forward(self, module: nn.Module, name: str) -> Callable[..., Any] | None:
        if type(module).forward is nn.Module.forward:
            return None
        reason = self._units.closed.get(name)
        if reason is None and not (_is_torchs(module) and not self._units.choosing.get(name)):
            try:
                self._check_open(module, name)
            except Untraceable as error:
                if name == "" or self._units.chooses_in(name):
                    raise
                self._units.closed[name] = str(error)
            else:
                return functools.partial(self._run, module, name)
        if reason is None and _is_torchs(module):
            shadow = self._made[id(module)]
            forward = leaf_forward(module, shadow)
            if forward is not None:
                self._worlds.forwards[name] = forward
        return self._recorded(name)

    def _run(self, module: nn.Module, name: str, *args: Any, **kwargs: Any) -> Any:
        worlds = worlds_of(args[0]) if len(args) == 1 and not kwargs else None
        if self._in_unit or name in self._units.expanded or worlds is None or not isinstance(worlds[0], Tensor):
            return self._own_forward(module, name, args, kwargs)
        with torch._C.DisableTorchFunction():  # past the recorder
            shapes = tuple((each.shape, each.dtype) for each in worlds)
        state = self._state(name)
        unit = self._units.known.get((name, shapes, state))
        if unit is None:
            unit = self._units.known[name, shapes, state] = self._unit(module, name, worlds, state)
        else:
            for each, key, value in unit.effects:
                later = self._later.setdefault(each, {})
                (vars(self._shadows[each]) if each in self._shadows else later)[key] = copied(value)
        return self._worlds.symbol("call_function", unit, args, {}, unit.worlds)

    def _own_forward(self, module: nn.Module, name: str, args: Any, kwargs: Any) -> Any:
        try:
            return type(module).forward(self._made[id(module)], *args, **kwargs)
        except (_Again, _NeedsClosing, ReadUnset):
            raise
        except Exception as error:
            if name == "":
                raise
            depends = isinstance(error, TraceError)
            reason = "forward depends on data" if depends else str(error) if isinstance(error, Untraceable) else None
            raise _NeedsClosing(name, reason or f"forward: {first_line(error)}") from error

    def _state(self, name: str) -> tuple[tuple[str, str, Hashable], ...]:
        """What the path has set in the module and those in it."""
        return tuple(
            (each, key, frozen(vars(self._shadows[each])[key], self._names)) for each, key in self.changed(name)
        )

    def _unit(self, module: nn.Module, name: str, worlds: Worlds, state: Sequence[tuple[str, str, Any]]) -> _Unit:
        """Traces the forward of a module in a graph of its own."""
        before = {(each, key): value for each, key, value in state}
        outer, self._worlds.graph = self._worlds.graph, fx.Graph()
        self._in_unit = True
        try:
            output = self._own_forward(module, name, (self._worlds.input(worlds),), {})
            given = worlds_of(output)
            if given is None or not isinstance(given[0], Tensor):
                self._units.expanded.add(name)
                raise _Again
            self._worlds.create_node("output", "output", (output.node,), {})
            parts = parts_of(self._worlds.graph)
        finally:
            self._in_unit, self._worlds.graph = False, outer
        effects = []
        for each, key in self.changed(name):
            value = vars(self._shadows[each])[key]
            if before.get((each, key)) != frozen(value, self._names):
                if not is_plain(value) and value is not UNSET:
                    raise Untraceable(f"{name}: forward sets {key} to a {type(value).__name__}")
                effects.append((each, key, value))
        label = ", ".join(f"{key} {value[1]}" for _, key, value in state if is_plain(value[1]))
        return _Unit(self._units.variant(name, parts, label), given, tuple(effects))


def _is_in(name: str, outer: str) -> bool:
    return outer == "" or name == outer or name.startswith(f"{outer}.")


def _is_torchs(module: nn.Module) -> bool:
    """Whether it is one of torch's own modules, without others in it."""
    return type(module).__module__.startswith("torch.nn.") and not module._modules


def _name_of(part: Part) -> str | None:
    """The first module that a part names."""
    for call in part:
        if isinstance(call.target, _Unit):
            return call.target.variant.name
        if call.kind == "module":
            return str(call.target)
        if call.kind == "tensor":
            return str(call.target[0])
    return None


def _spread(part: Part) -> Part:
    """The part with the calls of units in their place."""
    calls: list[Any] = []
    numbers = {0: 0}
    for number, call in enumerate(part, 1):
        if not isinstance(call.target, _Unit):
            calls.append(renumbered(call, numbers.__getitem__))
            numbers[number] = len(calls)
            continue
        source, first = numbers[call.args[0][1]], len(calls)
        inner = joined(call.target.variant.parts)
        calls += [renumbered(each, lambda v, f=first, s=source: s if v == 0 else f + v) for each in inner]  # type: ignore[misc]
        numbers[number] = len(calls) if inner else source
    return tuple(calls)


def samples(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Paths in which each option of each column comes."""
    return [tuple((number + column) % size for column, size in enumerate(sizes)) for number in range(max(sizes))]


def state_of(units: Units, left_out: bool) -> ModuleState:
    """The state that traces depend on, with or without what the path sets."""
    return ModuleState(units.supernet.modules, units.choosing if left_out else {})
