"""Makes a chain of a supernet that was cut: a stem, layers, fixed blocks between them, and a head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import nn

from greedynas_ext.adapt_cut import Cut
from greedynas_ext.adapt_parts import Part, joined
from greedynas_ext.adapt_segment import module_of
from greedynas_ext.adapt_select import Selection
from greedynas_ext.adapt_trace import Supernet
from greedynas_ext.arguments import Chain
from greedynas_ext.fx_trace import Untraceable
from greedynas_ext.packing import IdentityWeights
from greedynas_ext.recognise import Unrecognised, recognise_head, recognise_operation, recognise_stem
from greedynas_ext.recognise_unit import recognise_unit

_NOTHING = (Unrecognised, IdentityWeights)
_LONGEST = 12  # parts of a fixed block that is recognised


def chain_of(found: Cut, selection: Selection, supernet: Supernet) -> tuple[Chain, dict[str, tuple[Part, ...]]]:
    """The chain that does what `found` says, for paths of the selection's columns, and `Builder.inlined`."""
    builder = Builder(supernet)
    stem, fixed = builder.stem(found.before)
    choices: list[tuple[nn.Module, ...]] = [(block,) for block in fixed]
    columns: list[int | None] = [None] * len(fixed)
    for position, layer in enumerate(found.layers):
        choices.append(tuple(module_of(joined(option), supernet) for option in layer.options))
        columns.append(layer.number)
        if position + 1 < len(found.layers):
            fixed = builder.fixed(layer.after)
        else:
            fixed, head = builder.head(layer.after)
        choices += [(block,) for block in fixed]
        columns += [None] * len(fixed)
    chain = Chain(stem, tuple(choices), head, tuple(columns), selection.sizes, partly_fused=True)
    return chain, builder.inlined


class Builder:
    """Groups what does not depend on choices so that as much of it as may be is recognised.

    Attributes:
        inlined: modules in whose place stands what their forward does.
    """

    def __init__(self, supernet: Supernet) -> None:
        self._supernet = supernet
        self.inlined: dict[str, tuple[Part, ...]] = {}

    def stem(self, parts: Sequence[Part]) -> tuple[nn.Module, list[nn.Module]]:
        """The stem, and fixed blocks after it."""
        for candidates in self._as_it_is_and_spread(parts):
            for count in range(len(candidates), 0, -1):
                stem = self._module(candidates[:count])
                if not isinstance(recognise_stem(stem), Unrecognised):
                    return stem, self.fixed(candidates[count:])
        blocks = self.fixed(parts)
        return (blocks[0], blocks[1:]) if blocks else (nn.Identity(), [])

    def head(self, parts: Sequence[Part]) -> tuple[list[nn.Module], nn.Module]:
        """Fixed blocks, and the head after them."""
        for candidates in self._as_it_is_and_spread(parts):
            for start in range(len(candidates)):
                head = self._module(candidates[start:])
                if not isinstance(recognise_head(head), Unrecognised):
                    return self.fixed(candidates[:start]), head
        runs = self._runs(parts)
        fused = [number for number, (_, weights) in enumerate(runs) if not isinstance(weights, _NOTHING)]
        last = fused[-1] + 1 if fused else 0
        rest = [part for run, _ in runs[last:] for part in run]
        return [self._module(run) for run, _ in runs[:last]], self._module(rest)

    def fixed(self, parts: Sequence[Part]) -> list[nn.Module]:
        """The longest runs of parts that are recognised as an operation, units that branch, and what is between."""
        return [self._module(run) for run, _ in self._runs(parts)]

    def _runs(self, parts: Sequence[Part]) -> list[tuple[Sequence[Part], object]]:
        """The same as parts, each with what it is recognised as."""
        runs: list[tuple[Sequence[Part], object]] = []
        spread = self._spread(parts)
        start = 0
        while start < len(spread):
            for stop in range(min(len(spread), start + _LONGEST), start, -1):
                weights = _described(self._module(spread[start:stop]), branching=stop == start + 1)
                if not isinstance(weights, Unrecognised):
                    runs.append((spread[start:stop], weights))
                    start = stop
                    break
            else:
                if runs and isinstance(runs[-1][1], Unrecognised):
                    runs[-1] = [*runs[-1][0], spread[start]], weights
                else:
                    runs.append(([spread[start]], weights))
                start += 1
        return runs

    def _as_it_is_and_spread(self, parts: Sequence[Part]) -> Iterator[Sequence[Part]]:
        yield parts
        yield self._spread(parts)

    def _module(self, parts: Sequence[Part]) -> nn.Module:
        return module_of(joined(list(parts)), self._supernet)

    def _spread(self, parts: Sequence[Part]) -> list[Part]:
        """Calls of a module that is not recognised as calls of what is in it."""
        spread: list[Part] = []
        for part in parts:
            inner = self._inside(part[0].target) if _calls_one_module(part) else None
            spread += [part] if inner is None else self._spread(inner)
        return spread

    def _inside(self, name: str) -> tuple[Part, ...] | None:
        module = self._supernet.modules[name]
        if not module._modules or not isinstance(_described(module), Unrecognised):
            return None
        try:
            inner = self._supernet.inside(name)
        except Untraceable:
            return None
        self.inlined[name] = inner
        return inner


def _described(module: nn.Module, branching: bool = True) -> object:
    """As an operation, or, if `branching`, a unit of branches; one of a single branch is operations in a row."""
    operation = recognise_operation(module, None)
    if not isinstance(operation, Unrecognised) or not branching:
        return operation
    unit = recognise_unit(module, None)
    return operation if isinstance(unit, Unrecognised) or len(unit.branches) == 1 else unit


def _calls_one_module(part: Part) -> bool:
    call = part[0]
    return len(part) == 1 and call.kind == "module" and call.args == (("value", 0),) and not call.kwargs


def folded(chain: Chain, layers: int) -> tuple[nn.Module, tuple[tuple[nn.Module, ...], ...], nn.Module]:
    """The chain as stem, choices and head alone: fixed blocks go with what is before them."""
    assert chain.columns is not None
    stem, found = [chain.stem], {}
    last: int | None = None
    for column, operations in zip(chain.columns, chain.choices, strict=True):
        if column is not None:
            found[column], last = [[operation] for operation in operations], column
        elif last is None:
            stem.append(operations[0])
        else:
            for each in found[last]:
                each.append(operations[0])
    choices = tuple(
        tuple(_in_a_row(each) for each in found[column])
        if column in found
        else tuple(nn.Identity() for _ in range(chain.options[column]))
        for column in range(layers)
    )
    return _in_a_row(stem), choices, chain.head  # type: ignore[return-value]


def _in_a_row(operations: Sequence[Callable[..., object]]) -> nn.Module:
    modules = [operation for operation in operations if isinstance(operation, nn.Module)]
    assert len(modules) == len(operations)
    return modules[0] if len(modules) == 1 else nn.Sequential(*modules)
