"""A chain whose parts are all recognised, as the fused engine evaluates it: descriptions, sizes and costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, is_dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from greedynas_ext.arguments import Chain
from greedynas_ext.operations import (
    Size,
    area,
    operation_macs,
    operation_norms,
    operation_numbers,
    operation_shape,
    size_after,
)
from greedynas_ext.packing import IdentityWeights, OperationWeights
from greedynas_ext.plan import STEM, Trie
from greedynas_ext.recognise import (
    HeadWeights,
    StemWeights,
    Unrecognised,
    recognise_head,
    recognise_operation,
    recognise_stem,
)

Part: TypeAlias = tuple[int, int] | str  # an operation (layer, op), "stem", "head", or "choices" for all of them


@dataclass(frozen=True)
class FusedChain:
    """The parts of a chain that a set of paths uses, described; `operations` by (layer, operation)."""

    stem: StemWeights
    operations: dict[tuple[int, int], OperationWeights]
    head: HeadWeights
    chain: Chain

    @classmethod
    def of(cls, chain: Chain, trie: Trie, device: torch.device) -> FusedChain | str:
        """The description, or why there is none; all weights have to be on `device`."""
        description = Description(chain, trie, device)
        for _, problem in description.problems():
            return problem
        assert isinstance(description.stem, StemWeights)
        assert isinstance(description.head, HeadWeights)
        return cls(description.stem, description.operations, description.head, chain)

    def lacks_running_statistics(self) -> bool:
        """Whether a batch normalisation stores none."""
        blocks = [*self.stem.blocks, *self.operations.values()]
        norms = [
            self.stem.bn,
            self.head.bn,
            *(norm for block in blocks for norm in operation_norms(block) if norm is not None),
        ]
        return any(norm.running_mean is None or norm.running_var is None for norm in norms)

    def pools_otherwise(self, trie: Trie, resolutions: Iterable[Size]) -> str | None:
        """Why the head takes no mean over the image, where it pools a given size; None where it does."""
        side = self.head.side
        for resolution in resolutions if side else ():
            _, sizes = self.sizes(trie, resolution)
            if sizes[-1] != (side, side):
                return f"supernet.head: pools {side}x{side} of {sizes[-1][0]}x{sizes[-1][1]}"
        return None

    def sizes(self, trie: Trie, resolution: Size) -> tuple[list[Size], list[Size]]:
        """Height and width of the outputs of the stem's convolution and blocks, and of each node of `trie`."""
        stem = [size_after(resolution, self.stem.stride)]
        for block in self.stem.blocks:
            stem.append(size_after(stem[-1], block.stride))
        nodes: list[Size] = []
        for node in trie.nodes:
            into = stem[-1] if node.parent == STEM else nodes[node.parent]
            nodes.append(size_after(into, operation_shape(self.operations[node.layer, node.op])[2]))
        return stem, nodes

    def macs(self, trie: Trie, resolution: Size) -> tuple[int, list[int], int]:
        """Multiply-accumulates of one image: the stem, each node of `trie`, a head."""
        stem_sizes, sizes = self.sizes(trie, resolution)
        stem = area(stem_sizes[0]) * self.stem.conv.numel()
        for block, into in zip(self.stem.blocks, stem_sizes, strict=False):
            stem += operation_macs(block, into)
        nodes = []
        for node in trie.nodes:
            operation = self.operations[node.layer, node.op]
            nodes.append(operation_macs(operation, stem_sizes[-1] if node.parent == STEM else sizes[node.parent]))
        # The last node ends a path: nodes stand in order of their layers.
        return stem, nodes, area(sizes[-1]) * self.head.conv.numel() + self.head.weight.numel()

    def numbers(self, trie: Trie, resolution: Size, of_batch: bool) -> tuple[int, list[int], int]:
        """Numbers written to maps for one image: by the stem, each node of `trie`, a head (its logits)."""
        stem_sizes, sizes = self.sizes(trie, resolution)
        stem = (1 + of_batch) * area(stem_sizes[0]) * self.stem.conv.shape[0]
        for block, into in zip(self.stem.blocks, stem_sizes, strict=False):
            stem += operation_numbers(block, into, of_batch)
        nodes = []
        for node in trie.nodes:
            into = stem_sizes[-1] if node.parent == STEM else sizes[node.parent]
            nodes.append(operation_numbers(self.operations[node.layer, node.op], into, of_batch))
        return int(stem), nodes, int(self.head.weight.shape[0])

    def output_numbers(self, trie: Trie, resolution: Size) -> tuple[int, list[int], int]:
        """Numbers in the outputs for one image: of the stem, each node of `trie`, a head."""
        stem_sizes, sizes = self.sizes(trie, resolution)
        channels = self.stem.blocks[-1].project.shape[0] if self.stem.blocks else self.stem.conv.shape[0]
        nodes = []
        for node, size in zip(trie.nodes, sizes, strict=True):
            nodes.append(area(size) * operation_shape(self.operations[node.layer, node.op])[1])
        return area(stem_sizes[-1]) * channels, nodes, int(self.head.weight.shape[0])

    def check_single_values(self, argument: str, trie: Trie, count: int, resolution: Size) -> None:
        """Raises ValueError, as torch does, where `count` images give a batch normalisation one value per channel."""

        def check(place: str, size: Size, channels: int) -> None:
            if count * area(size) == 1:
                raise ValueError(
                    f"{argument}: a batch normalisation in {place} sees a single value per channel (its input is "
                    f"{[1, channels, 1, 1]}), whose variance is no statistic; expected more images or a larger "
                    f"resolution, or bn='running'"
                )

        stem_sizes, sizes = self.sizes(trie, resolution)
        channels = [self.stem.conv.shape[0], *(block.project.shape[0] for block in self.stem.blocks)]
        for size, width in zip(stem_sizes, channels, strict=True):
            check("supernet.stem", size, width)
        for node, size in zip(trie.nodes, sizes, strict=True):
            operation = self.operations[node.layer, node.op]
            if not isinstance(operation, IdentityWeights):
                check(self.chain.place(node.layer, node.op), size, operation_shape(operation)[1])
        check("supernet.head", sizes[-1], self.head.conv.shape[0])


class Description:
    """Describes the parts of a chain that a set of paths uses, and finds what the fused engine cannot evaluate.

    Attributes:
        stem: what is recognised of the stem.
        operations: those that are recognised, by (layer, operation).
        head: what is recognised of the head.
    """

    stem: StemWeights | Unrecognised
    head: HeadWeights | Unrecognised

    def __init__(self, chain: Chain, trie: Trie, device: torch.device) -> None:
        self._chain, self._trie, self._device = chain, trie, device
        self.operations: dict[tuple[int, int], OperationWeights] = {}

    def problems(self) -> Iterator[tuple[Part, str]]:
        """The parts that stand in the way, and why, the place named; nothing is looked at before it is asked for."""
        chain = self._chain
        self.stem = recognise_stem(chain.stem)
        widths: list[int | None] = [None] * (self._trie.num_layers + 1)
        if isinstance(self.stem, Unrecognised):
            yield "stem", f"supernet.stem: {self.stem.reason}"
        else:
            last = self.stem.blocks[-1].project if self.stem.blocks else self.stem.conv
            widths[0] = int(last.shape[0])
        for layer, op in sorted({(node.layer, node.op) for node in self._trie.nodes}):
            reason = self._operation(layer, op, widths)
            if reason is not None:
                yield (layer, op), f"{chain.place(layer, op)}: {reason}"
        self.head = recognise_head(chain.head)
        if isinstance(self.head, Unrecognised):
            yield "head", f"supernet.head: {self.head.reason}"
        elif widths[-1] not in (None, self.head.conv.shape[1]):
            yield "head", f"supernet.head: takes {self.head.conv.shape[1]} channels where there are {widths[-1]}"
        strides = {(layer, operation_shape(operation)[2]) for (layer, _), operation in self.operations.items()}
        if len(strides) > len({layer for layer, _ in strides}):
            yield "choices", "supernet.choices: a layer's operations differ in their stride"
        yield from self._elsewhere()

    def _operation(self, layer: int, op: int, widths: list[int | None]) -> str | None:
        """Describes an operation on `widths[layer]` channels, None where that is unknown; why it cannot be used."""
        width, module = widths[layer], self._chain.choices[layer][op]
        operation = recognise_operation(module, width)
        if width is None and isinstance(recognise_operation(module, 1), IdentityWeights):
            return None  # of however many
        if isinstance(operation, Unrecognised):
            return operation.reason
        into, out, _ = operation_shape(operation)
        if width is not None and into != width:
            return f"takes {into} channels where there are {width}"
        if widths[layer + 1] not in (None, out):
            return f"gives {out} channels where another operation gives {widths[layer + 1]}"
        widths[layer + 1] = out
        self.operations[layer, op] = operation
        return None

    def _elsewhere(self) -> Iterator[tuple[Part, str]]:
        """Parts whose weights are on another device."""
        parts: list[tuple[Part, str, object]] = [
            ("stem", "supernet.stem", self.stem),
            ("head", "supernet.head", self.head),
            *((key, self._chain.place(*key), operation) for key, operation in self.operations.items()),
        ]
        for key, place, part in parts:
            tensor = next(_tensors(part), None)  # a module's are all on one device, or it is not recognised
            if tensor is not None and tensor.device != self._device:
                yield key, f"{place}: weights on {tensor.device} in a supernet on {self._device}"


def _tensors(part: object) -> Iterator[Tensor]:
    """Of a description, at any depth."""
    if isinstance(part, Tensor):
        yield part
    elif is_dataclass(part):
        for value in vars(part).values():
            yield from _tensors(value)
    elif isinstance(part, tuple):
        for value in part:
            yield from _tensors(value)
