"""Elastic networks as chains: what each path runs is aligned with what the others run.

Layers are the places where paths differ. A layer's operations are what the paths seen so far run there, and the
identity where some run nothing; later paths add to them. Which columns of a path decide in a layer need not be known.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from greedynas_ext.adapt_build import Builder
from greedynas_ext.adapt_cut import NotAChain
from greedynas_ext.adapt_parts import Part, joined
from greedynas_ext.adapt_segment import module_of
from greedynas_ext.adapt_select import Selection
from greedynas_ext.adapt_trace import Supernet
from greedynas_ext.adapt_units import Key, PathTrace, Units, Variant, samples, state_of
from greedynas_ext.arguments import Chain
from greedynas_ext.fx_trace import Untraceable
from greedynas_ext.isolation import held_interrupts

_GROUPS = 4  # of columns that are changed at once


@dataclass(frozen=True)
class ElasticChain(Chain):
    """The chain of an elastic network: operations of its layers are found as paths are planned.

    Attributes:
        elastic: plans paths.
        names: of the layers; those of fixed blocks are empty.
        labels: of their operations.
    """

    elastic: Elastic | None = None
    names: tuple[str, ...] = ()
    labels: tuple[tuple[str, ...], ...] = ()

    def planned(self, paths: Tensor) -> tuple[Chain, Tensor]:
        """What evaluates `paths` [m, columns], and for each path the operation of each of its layers."""
        assert self.elastic is not None
        return self.elastic.planned(paths)

    def nodes_per_column(self, nodes_per_layer: Sequence[int]) -> tuple[int, ...]:
        """Unique prefixes that end in each layer that is no fixed block: a column may decide in several."""
        return tuple(count for count, name in zip(nodes_per_layer, self.names, strict=True) if name)

    def stage(self, layer: int) -> str:
        """The name of a layer."""
        return self.names[layer] or f"fixed {self.names[:layer].count('')}"

    def place(self, layer: int, op: int) -> str:
        """The name of an operation, for reasons and errors."""
        label = self.labels[layer][op]
        return f"supernet, {self.stage(layer)}" + (f" with {label}" if label else "")


@dataclass
class _Place:
    """One layer.

    Attributes:
        operations: a module for each variant.
        numbers: of the variants; None: nothing runs.
    """

    name: str
    operations: list[nn.Module] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    numbers: dict[Variant | None, int] = field(default_factory=dict)


class Elastic:
    """Plans the paths of an elastic network. For any number of threads.

    Attributes:
        chain: what `evaluate_paths` is given.
    """

    def __init__(self, supernet: Supernet, selection: Selection, channels: int) -> None:
        """Raises NotAChain or Untraceable, saying why."""
        self._supernet, self._selection = supernet, selection
        self._units = Units(supernet, selection, channels)
        self._lock = threading.Lock()
        self._seen: list[tuple[int, ...]] = samples(selection.sizes)
        self._unverified: dict[tuple[Key, Variant | None], tuple[int, ...]] = {}
        self._verified: set[tuple[Key, Variant | None]] = set()
        before = state_of(self._units, left_out=False)
        self._find_what_chooses()
        self._trace_again()
        if not before.holds():
            raise Untraceable("select sets something else than what it is given")
        self._look_at_state()
        self._lay_out()
        self.chain = self._chain()

    def planned(self, paths: Tensor) -> tuple[ElasticChain, Tensor]:
        """The chain of these paths [m, columns], and for each the operation of each of its layers."""
        with held_interrupts(), self._lock:
            rows = [tuple(path) for path in paths.tolist()]
            sequences = [self._traced(path) for path in rows]
            strange = [path for path, found in zip(rows, sequences, strict=True) if not self._fits(found)]
            if strange:
                self._seen += strange
                self._lay_out()
            layers = [self._row(path, found) for path, found in zip(rows, sequences, strict=True)]
            if self._units.unset != self._state_unset:
                self._look_at_state()
            return self._chain(), torch.tensor(layers, dtype=torch.int64)

    def check(self) -> None:
        """Traces anew from now on where the supernet has changed. Raises RuntimeError where it has other modules."""
        with held_interrupts(), self._lock:
            if not self._state.has_children():
                raise RuntimeError(
                    "supernet: expected the modules that it had when it was adapted, but some were added, removed or "
                    "replaced; call adapt again"
                )
            if not self._state.holds():
                try:
                    self._units.forget()
                    self._verified.clear()
                    self._lay_out()
                except (NotAChain, Untraceable) as error:
                    raise RuntimeError(f"supernet: it has changed since it was adapted: {error}") from error
                self._look_at_state()

    def unverified(self) -> list[tuple[int, ...]]:
        """Paths with the operations that were planned and not yet compared."""
        with self._lock:
            return list(dict.fromkeys(self._unverified.values()))

    def verified(self, paths: Sequence[tuple[int, ...]]) -> None:
        """These paths of `unverified` have been compared."""
        with self._lock:
            compared = [place for place, path in self._unverified.items() if path in paths]
            self._verified.update(compared)
            for place in compared:
                del self._unverified[place]

    def _look_at_state(self) -> None:
        self._state_unset = self._units.unset
        self._state = state_of(self._units, left_out=self._state_unset)

    def _find_what_chooses(self) -> None:
        """Which attributes paths set, and whether all that a path needs is set by it."""
        found = self._sequences()
        self._units.unset = True
        self._units.forget()
        try:
            same = self._sequences() == found
        except Untraceable:
            same = False
        if not same:
            self._units.unset = False
            self._units.forget()

    def _trace_again(self) -> None:
        """Paths that differ from one seen in some columns, with what is known of their units and without.

        What does not depend on these columns is known then, and has to be what it is alone.
        """
        sizes, first = self._selection.sizes, self._seen[0]
        paths = [
            tuple(
                (op + (column % _GROUPS == group)) % size
                for column, (op, size) in enumerate(zip(first, sizes, strict=True))
            )
            for group in range(min(_GROUPS, len(sizes)))
        ]
        while True:
            times = self._units.times_forgotten
            self._sequences()
            found = [self._units.path(path) for path in paths]
            if times == self._units.times_forgotten:
                break
            self._units.forget()  # they have shown something new: the others come first
        for path, known in zip(paths, found, strict=True):
            if self._units.alone(path) != known:
                raise Untraceable(f"on path {list(path)} forward does something else after other paths")

    def _traced(self, path: tuple[int, ...]) -> PathTrace:
        try:
            return self._units.path(path)
        except Untraceable as error:
            raise RuntimeError(f"supernet: path {list(path)} cannot be traced as others were: {error}") from error

    def _sequences(self) -> list[PathTrace]:
        return [self._units.path(path) for path in self._seen]

    def _lay_out(self) -> None:
        """Finds what all paths seen so far have in common, and the places where they differ."""
        sequences = self._sequences()
        shortest = min(map(len, sequences))
        start = _common(sequences, range(shortest))
        stop = _common([sequence[::-1] for sequence in sequences], range(shortest - start))
        order: list[Key] = []
        for sequence in sequences:
            at = 0
            for key, _ in sequence[start : len(sequence) - stop]:
                if key in order:
                    if order.index(key) < at:
                        raise NotAChain(f"{key[0]} runs before what it runs after on other paths")
                    at = order.index(key) + 1
                else:
                    order.insert(at, key)
                    at += 1
        if not order:
            raise NotAChain("no choice changes what forward does")
        first = sequences[0]
        builder = Builder(self._supernet)
        self._before, self._after = first[:start], first[len(first) - stop :]
        self._stem, self._fixed_before = builder.stem(_parts(self._before))
        self._fixed_after, self._head = builder.head(_parts(self._after))
        self._places = {key: _Place(_stage(key)) for key in order}
        self._unverified.clear()
        for path, sequence in zip(self._seen, sequences, strict=True):
            self._row(path, sequence)

    def _fits(self, sequence: PathTrace) -> bool:
        start, stop = len(self._before), len(sequence) - len(self._after)
        if stop < start or _common([sequence, self._before], range(start)) < start:
            return False
        if _common([sequence[::-1], self._after[::-1]], range(len(self._after))) < len(self._after):
            return False
        keys = iter(self._places)
        return all(key in keys for key, _ in sequence[start:stop])  # in this order

    def _row(self, path: tuple[int, ...], sequence: PathTrace) -> list[int]:
        """The operation of each layer."""
        runs = dict(sequence[len(self._before) : len(sequence) - len(self._after)])
        operations = []
        for key, place in self._places.items():
            variant = runs.get(key)
            if variant not in place.numbers:
                place.numbers[variant] = len(place.operations)
                parts = () if variant is None else variant.parts
                place.operations.append(module_of(joined(parts), self._supernet))
                place.labels.append("" if variant is None else variant.label)
            if (key, variant) not in self._verified:
                self._unverified.setdefault((key, variant), path)
            operations.append(place.numbers[variant])
        return [0] * len(self._fixed_before) + operations + [0] * len(self._fixed_after)

    def _chain(self) -> ElasticChain:
        places = self._places.values()
        before, after = [[(block,) for block in fixed] for fixed in (self._fixed_before, self._fixed_after)]
        return ElasticChain(
            self._stem,
            (*before, *(tuple(place.operations) for place in places), *after),
            self._head,
            (),
            self._selection.sizes,
            True,
            self,
            (*("" for _ in before), *(place.name for place in places), *("" for _ in after)),
            (*(("",) for _ in before), *(tuple(place.labels) for place in places), *(("",) for _ in after)),
        )


def _common(sequences: Sequence[PathTrace], positions: range) -> int:
    """How many of these positions are the same in all sequences, from the front."""
    for position in positions:
        if any(sequence[position][1] is not sequences[0][position][1] for sequence in sequences):
            return position
    return len(positions)


def _parts(sequence: PathTrace) -> list[Part]:
    return [part for _, variant in sequence for part in variant.parts]


def _stage(key: Key) -> str:
    name, times, after = key
    again = f" ({times})" if times > 1 else ""
    return (name or "supernet") + again + (f", {after} on" if after else "")


def channels_of(supernet: Supernet, example: Any) -> int:
    """How many channels images have: those of `example`, or what the first convolution reads."""
    if isinstance(example, Tensor) and example.dim() == 4:
        return example.shape[1]
    convolutions = (module for module in supernet.modules.values() if isinstance(module, nn.Conv2d))
    return next((conv.in_channels for conv in convolutions), 3)
