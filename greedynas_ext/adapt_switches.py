"""Finds the modules in a supernet that choose by an attribute of their own, or that `select=` switches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from greedynas_ext.adapt_find import NotFound, Traces, called
from greedynas_ext.adapt_select import ByAttributes, ByFunction, Selection
from greedynas_ext.adapt_told import ToldLayer, containers_in
from greedynas_ext.adapt_trace import Supernet
from greedynas_ext.fx_trace import Untraceable

_OF_ANY_MODULE = frozenset(vars(nn.Module()))


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
    opened = _with_ancestors(module_name for module_name, _, _ in chosen)
    modules, attributes_, options = zip(*chosen, strict=True)
    return ByAttributes(options, modules, attributes_), Traces(supernet, opened)


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
            names_called = called(supernet.trace(run, opened, module))
        except Untraceable:
            return False
        if {name for name in names_called if name in names or name.startswith(prefix)} != {names[position]}:
            return False
    return True


def by_function(supernet: Supernet, told: Sequence[ToldLayer], select: Any) -> tuple[Selection, Traces]:
    """The selection that `select` makes; what it switches is opened."""
    selection = ByFunction(tuple(layer.options for layer in told), select)
    most = max(selection.sizes)
    paths = [[min(option, size - 1) for size in selection.sizes] for option in range(most)]
    switched = supernet.switched([lambda module, path=path: select(module, _values(selection, path)) for path in paths])  # type: ignore[misc]
    opened = _with_ancestors(switched)
    return selection, Traces(supernet, opened)


def _with_ancestors(names: Iterable[str]) -> frozenset[str]:
    opened = {""}
    for name in names:
        pieces = name.split(".")
        opened |= {".".join(pieces[:count]) for count in range(1, len(pieces) + 1)}
    return frozenset(opened)


def _values(selection: Selection, path: Sequence[int]) -> list[Any]:
    return [options[op] for options, op in zip(selection.options, path, strict=True)]
