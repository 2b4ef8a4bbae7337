"""Notices that a supernet is no longer what it was when it was adapted."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from torch import nn

from greedynas_ext.adapt_cut import Cut
from greedynas_ext.adapt_find import Traces
from greedynas_ext.adapt_parts import Part
from greedynas_ext.adapt_select import ByAttribute, ByAttributes, ByFunction, Selection, kept_attributes
from greedynas_ext.adapt_trace import Supernet, is_plain
from greedynas_ext.fx_trace import Untraceable

_MOST_PATHS = 16  # that are traced where an attribute has changed
_NO_ATTRIBUTES = frozenset(("training", "_parameters", "_buffers", "_modules"))


class Watch:
    """Compares what decides which modules a forward calls: their places, and attributes of those that call others.

    Weights may change, and what is inside candidates. What a forward reads elsewhere, as in global variables, is not
    seen.
    """

    def __init__(
        self,
        supernet: Supernet,
        selection: Selection,
        traces: Traces,
        found: Cut | None,
        inlined: dict[str, tuple[Part, ...]],
    ) -> None:
        self._supernet, self._selection, self._traces = supernet, selection, traces
        self._found, self._inlined = found, inlined
        self._children = {
            name: dict(supernet.modules[name]._modules) for name in _what_holds_candidates(supernet, traces.opened)
        }
        self._choosing: set[tuple[str, str]] = set()  # attributes that change with the path
        if isinstance(selection, ByAttributes):
            self._choosing = set(zip(selection.modules, selection.attributes, strict=True))
        elif isinstance(selection, ByAttribute):
            self._choosing = {("", selection.attribute)}
        self._seen = self._attributes()

    def check(self, paths: Sequence[Sequence[int]]) -> None:
        """Raises RuntimeError where the structure, or what forward does for one of `paths`, has changed."""
        for name, children in self._children.items():
            if self._supernet.modules[name]._modules != children:
                raise RuntimeError(
                    f"supernet: expected the modules that it had when it was adapted, but in {name or 'it'!r} some "
                    f"were added, removed or replaced; call adapt again"
                )
        now = self._attributes()
        if self._found is None or now == self._seen:
            return
        try:
            for name, parts in self._inlined.items():
                if self._supernet.inside(name) != parts:
                    raise RuntimeError(
                        f"supernet: {name}'s forward does something else than when it was adapted; call adapt again"
                    )
            # A function that selects may reach what it is not given.
            by_function = isinstance(self._selection, ByFunction)
            for path in paths[:_MOST_PATHS]:
                with kept_attributes(self._supernet.module) if by_function else contextlib.nullcontext():
                    parts = self._traces.of(self._selection.of(path))
                if parts != self._found.parts(path):
                    raise RuntimeError(
                        f"supernet: on path {list(path)} forward does something else than when it was adapted; call "
                        f"adapt again"
                    )
        except Untraceable as error:
            raise RuntimeError(f"supernet: its forward has changed since it was adapted: {error}") from error
        self._seen = now

    def _attributes(self) -> list[Any]:
        """Of the modules whose forward was traced: plain values, and which objects the others are."""
        found: list[Any] = []
        for name in (*self._traces.opened, *self._inlined):
            module = self._supernet.modules[name]
            found.append((tuple(module._forward_hooks), tuple(module._forward_pre_hooks)))
            for key, value in vars(module).items():
                if key not in _NO_ATTRIBUTES and (name, key) not in self._choosing:
                    found.append((key, _copied(value) if is_plain(value) else id(value)))
        return found


def _copied(value: Any) -> Any:
    if type(value) in (list, tuple, set):
        return type(value)(map(_copied, value))
    return {key: _copied(each) for key, each in value.items()} if type(value) is dict else value


def _what_holds_candidates(supernet: Supernet, opened: frozenset[str]) -> set[str]:
    """Names of opened modules, and of the lists and dictionaries of modules in them."""
    found, pending = set(opened), list(opened)
    for name in pending:
        for key, child in supernet.modules[name]._modules.items():
            inner = f"{name}.{key}" if name else key
            container = child is not None and type(child).forward is nn.Module.forward
            if container and inner in supernet.modules and inner not in found:
                found.add(inner)
                pending.append(inner)
    return found
