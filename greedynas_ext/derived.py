"""Weights that are computed of parameters and buffers: slices, products with small matrices, and the like.

A forward may give functions such as F.conv2d weights of this kind. To recognise what it computes, modules stand in for
these functions (`stand_in_of`), with weights that have a shape and no memory; in what is recognised of them the derived
weights, computed of their sources as these are now, then take the place of those (`resolved`). Nothing is kept between
one look and the next but how to compute them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greedynas_ext.adapt_parts import Argument, Call, Part, decoded, executed, of_image, renumbered, values_in

_Description = TypeVar("_Description")

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_LINEAR = ("input", "weight", "bias")
_TENSORS = ("weight", "bias", "running_mean", "running_var")
_ORIGIN = "_greedynas_origin"


@dataclass(frozen=True)
class Derived:
    """How a weight is computed.

    Attributes:
        calls: with the numbers of sources as targets of those of kind "tensor"; value 0 is nothing.
        readers: each gives a source as it is now.
        name: of the first source.
    """

    calls: Part
    readers: tuple[Callable[[], Tensor], ...]
    name: str

    def kinds(self) -> tuple[Any, ...]:
        """Of the sources all but their values."""
        return tuple((type(t), t.shape, t.dtype, t.device) for t in (read() for read in self.readers))

    def of(self, sources: Sequence[Tensor]) -> Tensor:
        """The weight that these sources give."""
        device = sources[0].device.type
        cast = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()
        with torch.no_grad(), cast:
            value: Tensor = executed(self.calls, [None], _no_module, sources.__getitem__)
        return value

    def now(self) -> Tensor:
        """The weight, computed now; a view of a source where it can be one."""
        sources = [read() for read in self.readers]
        value = self.of(sources)
        memory = {source.untyped_storage().data_ptr() for source in sources}
        if value.untyped_storage().data_ptr() not in memory:
            setattr(value, _ORIGIN, Origin(self, tuple(source.detach() for source in sources)))
        return value


@dataclass(frozen=True)
class Origin:
    """What a tensor was computed of."""

    derived: Derived
    sources: tuple[Tensor, ...]

    def again(self) -> Tensor:
        """The values that the memory of the sources gives now."""
        return self.derived.of(self.sources)

    def where(self) -> tuple[Any, ...]:
        """How it is computed, and of which memory."""
        places = [(source.data_ptr(), source.dtype, source.shape, source.stride()) for source in self.sources]
        return self.derived.calls, *places


def origin_of(tensor: Tensor) -> Origin | None:
    """Where the values of a derived weight come from; None for a tensor that is read where it lies."""
    return getattr(tensor, _ORIGIN, None)


@dataclass(frozen=True)
class StandIn:
    """A module to be recognised in the place of another.

    Attributes:
        module: has modules where the other calls functions.
        weights: by the id of a tensor of theirs what it stands for.
        kinds: of the sources, for which it was made.
    """

    module: nn.Module
    weights: dict[int, Derived]
    kinds: tuple[Any, ...]

    def is_current(self) -> bool:
        """Whether the sources still are of these kinds."""
        return _kinds(self.weights) == self.kinds


class WithDerivedWeights(nn.Module):
    """A module that may have a stand-in."""

    def stand_in(self) -> StandIn | None:
        """What is recognised in its place; None: itself."""
        raise NotImplementedError


def stand_in_of(part: Part, modules: Mapping[str, nn.Module], build: Callable[..., nn.Module]) -> StandIn | None:
    """The stand-in for what `build(part, modules)` gives, or None where another use is made of a derived weight."""
    maker = _Maker(part, modules)
    found = maker.part()
    if found is None or not maker.weights:
        return None
    return StandIn(build(found, maker.modules), maker.weights, _kinds(maker.weights))


def resolved(description: _Description, weights: Mapping[int, Derived]) -> _Description:
    """A description in which the weights that stand for derived ones are these, as they are now."""
    known: dict[int, Tensor] = {}

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            derived = weights.get(id(value))
            if derived is None:
                return value
            if id(value) not in known:
                known[id(value)] = derived.now()
            return known[id(value)]
        if isinstance(value, tuple):
            return tuple(map(of, value))
        if is_dataclass(value) and not isinstance(value, type):
            return type(value)(**{field.name: of(getattr(value, field.name)) for field in fields(value)})
        return value

    found: _Description = of(description)
    return found


class _Maker:
    """Puts modules in the place of functions that are given derived weights.

    Attributes:
        modules: those of the supernet, and the new ones.
        weights: see StandIn.
    """

    def __init__(self, part: Part, modules: Mapping[str, nn.Module]) -> None:
        self._part, self._given = part, modules
        self.modules: dict[str, nn.Module] = dict(modules)
        self.weights: dict[int, Derived] = {}

    def part(self) -> Part | None:
        depends = of_image(self._part)
        numbers = {0: 0}
        calls: list[Call] = []
        for number, call in enumerate(self._part, 1):
            if not depends[number]:
                if _writes(call):
                    return None
                continue
            if not all(depends[value] for value in values_in(call)):
                replaced = self._module(call, depends)
                if replaced is None:
                    return None
                call = replaced
            calls.append(renumbered(call, numbers.__getitem__))
            numbers[number] = len(calls)
        return tuple(calls)

    def _module(self, call: Call, depends: Sequence[bool]) -> Call | None:
        """The call of a module that does what a function is called for."""
        make: Any
        names: tuple[str, ...]
        if call.target is F.conv2d:
            names, make = _CONV, _convolution
        elif call.target is F.batch_norm:
            names, make = _NORM, _normalisation
        elif call.target is F.linear:
            names, make = _LINEAR, _linear
        else:
            return None
        given = {**dict(zip(names, call.args, strict=False)), **dict(call.kwargs)}
        source = given.pop("input", ("constant", None))
        if source[0] != "value" or not depends[source[1]]:
            return None
        derived: dict[str, Derived | None] = {}
        for name in _TENSORS:
            kind, content = given.pop(name, ("constant", None))
            if kind == "value" and not depends[content]:
                derived[name] = self._derived(content)
            elif (kind, content) == ("constant", None):
                derived[name] = None
            else:
                return None
        if any(_reads(argument) for argument in given.values()):
            return None
        tensors = {name: None if each is None else each.now() for name, each in derived.items()}
        module: nn.Module | None = make(tensors, **{name: decoded(argument, ()) for name, argument in given.items()})
        if module is None:
            return None
        stores: tuple[dict[str, Any], ...] = module._parameters, module._buffers
        for store in stores:
            store.update(dict.fromkeys(store))
        for name, tensor in tensors.items():
            if tensor is not None:
                store = stores[name.startswith("running")]
                shape_only = torch.empty(1, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
                store[name] = shape_only if store is stores[1] else nn.Parameter(shape_only, requires_grad=False)
                self.weights[id(store[name])] = derived[name]  # type: ignore[assignment]
        named = next(each.name for each in derived.values() if each is not None)
        key = named
        while key in self.modules:
            key += "'"
        self.modules[key] = module
        return Call("module", key, (source,), ())

    def _derived(self, value: int) -> Derived:
        needed, pending = {value}, [value]
        while pending:
            for each in values_in(self._part[pending.pop() - 1]):
                if each not in needed:
                    needed.add(each)
                    pending.append(each)
        numbers = {0: 0}
        calls: list[Call] = []
        readers: list[Callable[[], Any]] = []
        names: list[str] = []
        for number in sorted(needed):
            call = renumbered(self._part[number - 1], numbers.__getitem__)
            if call.kind == "tensor":
                owner, name = call.target
                call = call._replace(target=len(readers))
                readers.append(reader(self._given[owner], name))
                names.append(owner)
            calls.append(call)
            numbers[number] = len(calls)
        return Derived(tuple(calls), tuple(readers), names[0])


def reader(module: nn.Module, name: str) -> Callable[[], Any]:
    """Reads a tensor of the supernet's when it is needed: training may have put another in its place."""
    return lambda: getattr(module, name)


def _reads(argument: Argument) -> bool:
    return next(values_in(Call("", "", (argument,), ())), None) is not None


def _writes(call: Call) -> bool:
    name = call.target if isinstance(call.target, str) else getattr(call.target, "__name__", "")
    if call.kind == "tensor":
        return False
    flags = any(argument == ("constant", True) for key, argument in call.kwargs if key == "inplace")
    named = (name.endswith("_") and not name.endswith("__")) or name in ("setitem", "__setitem__", "iadd", "imul")
    return flags or named or any(key == "out" for key, _ in call.kwargs)


def _convolution(
    tensors: Mapping[str, Tensor | None],
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: Any = 1,
) -> nn.Module | None:
    weight = tensors["weight"]
    if weight is None or weight.dim() != 4:
        return None
    return nn.Conv2d(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),  # type: ignore[arg-type]
        stride,
        padding,
        dilation,
        groups,
        bias=tensors["bias"] is not None,
        device="meta",
    )


def _normalisation(
    tensors: Mapping[str, Tensor | None], training: Any = False, momentum: Any = 0.1, eps: Any = 1e-5
) -> nn.Module | None:
    sizes = [len(tensor) for tensor in tensors.values() if tensor is not None and tensor.dim() == 1]
    stored = tensors["running_mean"] is not None
    if not sizes or bool(training) is stored or (tensors["running_var"] is not None) != stored:
        return None
    affine = tensors["weight"] is not None
    return nn.BatchNorm2d(sizes[0], eps, momentum, affine=affine, track_running_stats=stored, device="meta")


def _linear(tensors: Mapping[str, Tensor | None]) -> nn.Module | None:
    weight = tensors["weight"]
    if weight is None or weight.dim() != 2:
        return None
    return nn.Linear(weight.shape[1], weight.shape[0], bias=tensors["bias"] is not None, device="meta")


def _kinds(weights: Mapping[int, Derived]) -> tuple[Any, ...]:
    return tuple(derived.kinds() for derived in weights.values())


def _no_module(target: Any) -> Callable[..., Any]:
    raise AssertionError(f"{target}: a module in the calls of a derived weight")
