"""How a supernet is told which path to run, and that it is afterwards as before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from greedynas_ext.adapt_trace import Chosen, ChosenPath, Run
from greedynas_ext.fx_trace import named_modules


@dataclass(frozen=True)
class Selection:
    """Layers with the values that stand for their options.

    `run` works on the supernet as on a shadow of it, and leaves the choice set.
    """

    options: tuple[tuple[Any, ...], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many options each layer has."""
        return tuple(map(len, self.options))

    def path(self, path: Sequence[int]) -> ChosenPath:
        """The values of a path of option indices."""
        values = [options[op] for options, op in zip(self.options, path, strict=True)]
        return ChosenPath(Chosen(value) if type(value) is int else value for value in values)

    def run(self, module: nn.Module, images: Any, path: Sequence[int]) -> Any:
        """What the forward returns for `path`."""
        raise NotImplementedError

    def of(self, path: Sequence[int]) -> Run:
        """`run` for one path."""
        return lambda module, images: self.run(module, images, path)


@dataclass(frozen=True)
class ByArgument(Selection):
    """The path is an argument of forward."""

    parameter: str
    spread: bool = False  # one argument for each layer

    def run(self, module: nn.Module, images: Any, path: Sequence[int]) -> Any:
        """What the forward returns for `path`."""
        values = self.path(path)
        return module(images, *values) if self.spread else module(images, **{self.parameter: values})


@dataclass(frozen=True)
class ByAttribute(Selection):
    """The path is an attribute of the supernet."""

    attribute: str

    def run(self, module: nn.Module, images: Any, path: Sequence[int]) -> Any:
        """What the forward returns for `path`."""
        setattr(module, self.attribute, self.path(path))
        return module(images)


@dataclass(frozen=True)
class ByAttributes(Selection):
    """Each layer is a module with an attribute that says what it runs."""

    modules: tuple[str, ...]
    attributes: tuple[str, ...]

    def run(self, module: nn.Module, images: Any, path: Sequence[int]) -> Any:
        """What the forward returns for `path`."""
        for name, attribute, options, op in zip(self.modules, self.attributes, self.options, path, strict=True):
            value = options[op]
            setattr(module.get_submodule(name), attribute, list(value) if isinstance(value, list) else value)
        return module(images)


@dataclass(frozen=True)
class ByFunction(Selection):
    """A function sets the choice, or returns what forward is to be given beside the images."""

    select: Callable[[nn.Module, list[Any]], Any]

    def run(self, module: nn.Module, images: Any, path: Sequence[int]) -> Any:
        """What the forward returns for `path`."""
        further = self.select(module, [options[op] for options, op in zip(self.options, path, strict=True)])
        if further is None:
            return module(images)
        if isinstance(further, dict):
            return module(images, **further)
        if isinstance(further, tuple):
            return module(images, *further)
        raise TypeError(
            f"select: expected a function that returns None, a tuple or a dict of arguments for forward, got "
            f"{type(further).__name__}"
        )


@contextlib.contextmanager
def kept_attributes(module: nn.Module) -> Iterator[None]:
    """Puts the attributes of a module and of those in it back: what chooses among them.

    Lists, dictionaries and sets get their contents back; of tensors in attributes none is copied.
    """
    kept = [(each, dict(vars(each)), _contents(each)) for _, each in named_modules(module)]
    try:
        yield
    finally:
        for each, attributes, contents in kept:
            now = vars(each)
            for name in [name for name in now if name not in attributes]:
                del now[name]
            now.update((name, value) for name, value in attributes.items() if now.get(name, kept) is not value)
            for container, content in contents:
                _refill(container, content)


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    """Containers among a module's attributes, at any depth, each with a copy of what is in it."""
    found: list[tuple[Any, Any]] = []
    pending: list[Any] = [value for name, value in vars(module).items() if name not in ("_parameters", "_buffers")]
    while pending:
        value = pending.pop()
        if type(value) is list or (isinstance(value, dict) and type(value).__setitem__ is dict.__setitem__):
            found.append((value, value.copy()))
            pending.extend(value.values() if isinstance(value, dict) else value)
        elif type(value) is set:
            found.append((value, value.copy()))
        elif type(value) is tuple:
            pending.extend(value)
    return found


def _refill(container: Any, content: Any) -> None:
    if isinstance(container, list):
        if len(container) != len(content) or any(a is not b for a, b in zip(container, content, strict=True)):
            container[:] = content
    elif isinstance(container, dict):
        if list(container) != list(content) or any(container[key] is not value for key, value in content.items()):
            container.clear()
            container.update(content)
    elif container != content:
        container.clear()
        container.update(content)
