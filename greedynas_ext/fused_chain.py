"""A chain whose parts are all recognised, as the fused engine evaluates it: descriptions, sizes and costs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, is_dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from greedynas_ext.arguments import Chain
from greedynas_ext.packing import (
    BatchNormWeights,
    ConvBNWeights,
    IdentityWeights,
    OperationWeights,
)
from greedynas_ext.plan import STEM, Trie
from greedynas_ext.recognise import (
    HeadWeights,
    StemWeights,
    Unrecognised,
    recognise_head,
    recognise_operation,
    recognise_stem,
)

Size: TypeAlias = tuple[int, int]  # height, width


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
        stem = recognise_stem(chain.stem)
        if isinstance(stem, Unrecognised):
            return f"supernet.stem: {stem.reason}"
        channels = stem.blocks[-1].project.shape[0] if stem.blocks else stem.conv.shape[0]
        widths = [int(channels)] + [0] * trie.num_layers
        operations: dict[tuple[int, int], OperationWeights] = {}
        for layer, op in sorted({(node.layer, node.op) for node in trie.nodes}):
            place = chain.place(layer, op)
            operation = recognise_operation(chain.choices[layer][op], widths[layer])
            if isinstance(operation, Unrecognised):
                return f"{place}: {operation.reason}"
            into, out, _ = operation_shape(operation)
            if into != widths[layer]:
                return f"{place}: takes {into} channels where there are {widths[layer]}"
            if widths[layer + 1] not in (0, out):
                return f"{place}: gives {out} channels where another operation gives {widths[layer + 1]}"
            widths[layer + 1] = out
            operations[layer, op] = operation
        head = recognise_head(chain.head)
        if isinstance(head, Unrecognised):
            return f"supernet.head: {head.reason}"
        if head.conv.shape[1] != widths[-1]:
            return f"supernet.head: takes {head.conv.shape[1]} channels where there are {widths[-1]}"
        strides = {(layer, operation_shape(operation)[2]) for (layer, _), operation in operations.items()}
        if len(strides) != trie.num_layers:
            return "supernet.choices: a layer's operations differ in their stride"
        parts: dict[str, object] = {"supernet.stem": stem, "supernet.head": head}
        parts.update({chain.place(layer, op): part for (layer, op), part in operations.items()})
        for place, part in parts.items():
            tensor = next(_tensors(part), None)  # a module's are all on one device, or it is not recognised
            if tensor is not None and tensor.device != device:
                return f"{place}: weights on {tensor.device} in a supernet on {device}"
        return cls(stem, operations, head, chain)

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
        stem = [_after(resolution, self.stem.stride)]
        for block in self.stem.blocks:
            stem.append(_after(stem[-1], block.stride))
        nodes: list[Size] = []
        for node in trie.nodes:
            into = stem[-1] if node.parent == STEM else nodes[node.parent]
            nodes.append(_after(into, operation_shape(self.operations[node.layer, node.op])[2]))
        return stem, nodes

    def macs(self, trie: Trie, resolution: Size) -> tuple[int, list[int], int]:
        """Multiply-accumulates of one image: the stem, each node of `trie`, a head."""
        stem_sizes, sizes = self.sizes(trie, resolution)
        stem = _area(stem_sizes[0]) * self.stem.conv.numel()
        for block, into in zip(self.stem.blocks, stem_sizes, strict=False):
            stem += operation_macs(block, into)
        nodes = []
        for node in trie.nodes:
            operation = self.operations[node.layer, node.op]
            nodes.append(operation_macs(operation, stem_sizes[-1] if node.parent == STEM else sizes[node.parent]))
        # The last node ends a path: nodes stand in order of their layers.
        return stem, nodes, _area(sizes[-1]) * self.head.conv.numel() + self.head.weight.numel()

    def check_single_values(self, argument: str, trie: Trie, count: int, resolution: Size) -> None:
        """Raises ValueError, as torch does, where `count` images give a batch normalisation one value per channel."""

        def check(place: str, size: Size, channels: int) -> None:
            if count * _area(size) == 1:
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


def operation_shape(operation: OperationWeights) -> tuple[int, int, int]:
    """Channels in, channels out, stride."""
    if isinstance(operation, IdentityWeights):
        return operation.channels, operation.channels, 1
    if isinstance(operation, ConvBNWeights):
        return operation.weight.shape[1], operation.weight.shape[0], operation.stride
    first = operation.depthwise if operation.expand is None else operation.expand
    into = first.shape[0] if operation.expand is None else first.shape[1]
    return into, operation.project.shape[0], operation.stride


def operation_norms(
    operation: OperationWeights,
) -> tuple[BatchNormWeights | None, BatchNormWeights | None, BatchNormWeights | None]:
    """After expand, depthwise and project."""
    if isinstance(operation, IdentityWeights):
        return None, None, None
    if isinstance(operation, ConvBNWeights):
        return None, None, operation.bn
    return operation.expand_bn, operation.depthwise_bn, operation.project_bn


def _after(size: Size, stride: int) -> Size:
    return -(-size[0] // stride), -(-size[1] // stride)


def _area(size: Size) -> int:
    return size[0] * size[1]


def operation_macs(block: OperationWeights, into: Size) -> int:
    """Multiply-accumulates of an operation on one image of size `into`."""
    if isinstance(block, IdentityWeights):
        return 0
    if isinstance(block, ConvBNWeights):
        return int(_area(_after(into, block.stride)) * block.weight.numel())
    macs = _area(_after(into, block.stride)) * (block.depthwise.numel() + block.project.numel())
    if block.expand is not None:
        macs += _area(into) * block.expand.numel()
    if block.squeeze_excitation is not None:
        macs += block.squeeze_excitation.reduce_weight.numel() + block.squeeze_excitation.expand_weight.numel()
    return int(macs)
