"""Cuts a supernet's forward into a chain: what each layer's options change, and what stands between."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from greedynas_ext.adapt_find import Traces
from greedynas_ext.adapt_parts import Part
from greedynas_ext.adapt_select import Selection

_RANDOM_PATHS = 24


class NotAChain(Exception):
    """A supernet that cannot be cut; the message says why."""


@dataclass(frozen=True)
class Layer:
    """What the options of one layer do, and what is done after it whatever is chosen.

    Attributes:
        number: of the layer among the supernet's.
        options: for each option the parts that it runs.
        after: parts between this layer and the next.
    """

    number: int
    options: tuple[tuple[Part, ...], ...]
    after: tuple[Part, ...]


@dataclass(frozen=True)
class Cut:
    """The parts before the first layer, and the layers in order of execution; those without effect are left out."""

    before: tuple[Part, ...]
    layers: tuple[Layer, ...]

    def parts(self, path: Sequence[int]) -> tuple[Part, ...]:
        """What runs for a path of option indices."""
        parts = list(self.before)
        for layer in self.layers:
            parts += [*layer.options[path[layer.number]], *layer.after]
        return tuple(parts)


@dataclass
class _Region:
    """Where in the parts of the base path a layer's options differ, and what they put there."""

    number: int
    start: int
    stop: int
    whole: list[tuple[Part, ...]]  # the parts of the path that takes the option


def cut(selection: Selection, traces: Traces) -> Cut:
    """Traces each option of each layer, then some random paths, which the cut has to foretell.

    Raises:
        NotAChain: saying which layers are entangled, or which path does something else.
        Untraceable: where an option's forward cannot be traced.
    """
    base_path = [0] * len(selection.sizes)
    found = _cut_from(base_path, selection, traces)
    # Where an option of the base runs nothing, its place among others is not sure.
    thin = [layer for layer in found.layers if not layer.options[base_path[layer.number]]]
    if thin:
        for layer in thin:
            lengths = list(map(len, layer.options))
            base_path[layer.number] = lengths.index(max(lengths))
        found = _cut_from(base_path, selection, traces)
    for path in _paths(selection.sizes):
        if traces.of(selection.of(path)) != found.parts(path):
            raise NotAChain(f"on path {path} forward does something else than the layers' options do on their own")
    return found


def _cut_from(base_path: Sequence[int], selection: Selection, traces: Traces) -> Cut:
    base = traces.of(selection.of(base_path))
    regions = []
    for number, size in enumerate(selection.sizes):
        whole = []
        for option in range(size):
            path = [*base_path]
            path[number] = option
            whole.append(base if option == base_path[number] else traces.of(selection.of(path)))
        if all(parts == base for parts in whole):
            continue
        start = min(_common(base, parts) for parts in whole)
        end = min(min(_common(base[::-1], parts[::-1]), len(parts) - start) for parts in whole)
        regions.append(_Region(number, start, len(base) - end, whole))
    if not regions:
        raise NotAChain("no choice changes what forward does")
    regions.sort(key=lambda region: (region.start, region.stop, region.number))
    layers = []
    for region, following in zip(regions, [*regions[1:], None], strict=True):
        stop = len(base) if following is None else following.start
        if region.stop > stop:
            assert following is not None
            raise NotAChain(
                f"layers {min(region.number, following.number)} and {max(region.number, following.number)} are not one "
                f"after the other: between them more than one tensor is needed"
            )
        options = tuple(parts[region.start : len(parts) - (len(base) - region.stop)] for parts in region.whole)
        layers.append(Layer(region.number, options, base[region.stop : stop]))
    return Cut(base[: regions[0].start], tuple(layers))


def _common(one: Sequence[Part], other: Sequence[Part]) -> int:
    """How many parts agree, from the front."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


def _paths(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Paths in which many layers differ from the base at once; always the same."""
    for option in range(max(sizes)):
        yield [(option + number) % size for number, size in enumerate(sizes)]
    generator = random.Random(0)
    for _ in range(_RANDOM_PATHS):
        yield [generator.randrange(size) for size in sizes]
