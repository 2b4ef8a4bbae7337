"""What `choices=` says about a supernet's layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from greedynas_ext.adapt_trace import Supernet


@dataclass(frozen=True)
class ToldLayer:
    """One layer.

    Attributes:
        container: the name of the module whose children the candidates are, where it was told.
        options: what stands for the candidates: keys of an nn.ModuleDict, else positions; or the values given.
        candidates: their names, where modules were told; else empty.
    """

    container: str | None
    options: tuple[Any, ...]
    candidates: tuple[str, ...]


def told_layers(choices: Any, supernet: Supernet) -> tuple[ToldLayer, ...] | None:
    """Reads `choices`.

    Raises:
        TypeError, ValueError: for what is none of its forms, or names no module.
    """
    if choices is None:
        return None
    if callable(choices):
        layers = _from_function(choices, supernet)
    elif isinstance(choices, Sequence) and not isinstance(choices, str):
        layers = tuple(_layer(each, number, supernet) for number, each in enumerate(choices))
    else:
        raise TypeError(
            f"choices: expected names, layers of candidates or values, or a function, got {type(choices).__name__}"
        )
    if not layers:
        raise ValueError("choices: expected at least one layer, got none")
    return layers


def _from_function(choices: Callable[..., Any], supernet: Supernet) -> tuple[ToldLayer, ...]:
    parameters = inspect.signature(choices).parameters
    if len(parameters) == 2:
        names = [name for name, module in list(supernet.modules.items()) if choices(name, module)]
        return tuple(_container(name, f"choices({name!r}, ...)", supernet) for name in names)
    if len(parameters) == 1:
        return tuple(_layer(each, number, supernet) for number, each in enumerate(choices(supernet.module)))
    raise TypeError(
        "choices: expected a function of (name, module), true for what holds candidates, or of (supernet) that returns "
        f"the layers, got one of {len(parameters)} arguments"
    )


def _layer(layer: Any, number: int, supernet: Supernet) -> ToldLayer:
    place = f"choices[{number}]"
    if isinstance(layer, str):
        return _container(layer, place, supernet)
    if isinstance(layer, int) and not isinstance(layer, bool):
        if layer < 1:
            raise ValueError(f"{place}: expected at least 1 option, got {layer}")
        return ToldLayer(None, tuple(range(layer)), ())
    if isinstance(layer, nn.Module):
        if id(layer) not in supernet.names:
            raise ValueError(f"{place}: expected a module of the supernet, got another {type(layer).__name__}")
        return _container(supernet.names[id(layer)], place, supernet)
    if not isinstance(layer, Sequence) or not layer:
        raise TypeError(f"{place}: expected a name, a number of options, or candidates, got {layer!r}")
    if not all(isinstance(each, nn.Module) for each in layer):
        return ToldLayer(None, tuple(layer), ())
    for position, each in enumerate(layer):
        if id(each) not in supernet.names:
            raise ValueError(
                f"{place}[{position}]: expected a module of the supernet, got another {type(each).__name__}"
            )
    return ToldLayer(None, tuple(range(len(layer))), tuple(supernet.names[id(each)] for each in layer))


def _container(name: str, place: str, supernet: Supernet) -> ToldLayer:
    module = supernet.modules.get(name)
    if module is None:
        raise ValueError(f"{place}: expected the name of a module of the supernet, got {name!r}")
    return ToldLayer(name, *options_in(module, name))


def options_in(module: nn.Module, name: str) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """What stands for the candidates that `module` holds, and their names.

    A module that is no container itself may hold one, an nn.ModuleList or nn.ModuleDict; else its children are meant.
    """
    inner = containers_in(module, name)
    if len(inner) == 1:
        name, module = inner[0]
    keys = [key for key, child in module._modules.items() if child is not None]
    names = tuple(f"{name}.{key}" if name else key for key in keys)
    return tuple(keys) if isinstance(module, nn.ModuleDict) else tuple(range(len(keys))), names


def containers_in(module: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """The lists and dictionaries of modules that `module` has as attributes; none for one that is such itself."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        return []
    prefix = f"{name}." if name else ""
    return [
        (prefix + key, child)
        for key, child in module._modules.items()
        if isinstance(child, nn.ModuleList | nn.ModuleDict) and len(child) > 0
    ]
