"""Units: branches that each read some channels, run operations one after the other, and write some channels.

The units of ShuffleNetV2 are such, and any single operation is one of a single branch. Splits, shuffles and
concatenations take no work of their own: they say which channels a branch reads and writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from greedynas_ext.operations import (
    PoolWeights,
    Size,
    UnitOperation,
    operation_macs,
    operation_norms,
    operation_numbers,
    operation_shape,
)
from greedynas_ext.packing import BatchNormWeights, ConvBNWeights


@dataclass(frozen=True)
class BranchWeights:
    """An activation and operations on some channels of a unit's input; without operations these are handed on."""

    reads: range  # channels of the input
    writes: range  # channels of the output
    operations: tuple[UnitOperation, ...]
    activation: str = "linear"  # of ACTIVATIONS, before the first operation

    @property
    def stride(self) -> int:
        """Input pixels for each output pixel, in height and in width."""
        stride = 1
        for operation in self.operations:
            stride *= operation.stride
        return stride


@dataclass(frozen=True)
class UnitWeights:
    """Branches whose outputs are, together, the channels of the output; of one stride."""

    in_channels: int
    branches: tuple[BranchWeights, ...]

    @classmethod
    def of(cls, *operations: UnitOperation) -> UnitWeights:
        """At least one operation, on all channels."""
        into, out = operation_shape(operations[0])[0], operation_shape(operations[-1])[1]
        return cls(into, (BranchWeights(range(into), range(out), operations),))

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return sum(len(branch.writes) for branch in self.branches)

    def operations(self) -> Iterator[UnitOperation]:
        """Those of all branches, in their order."""
        for branch in self.branches:
            yield from branch.operations

    @property
    def device(self) -> torch.device | None:
        """Of a convolution's weights; None without any."""
        for operation in self.operations():
            if not isinstance(operation, PoolWeights):
                return (operation.weight if isinstance(operation, ConvBNWeights) else operation.project).device
        return None

    def norms(self) -> list[BatchNormWeights]:
        """In the order in which their statistics are kept."""
        return [norm for operation in self.operations() for norm in operation_norms(operation) if norm is not None]

    def size_after(self, size: Size) -> Size:
        """Height and width of the output."""
        stride = self.branches[0].stride
        return -(-size[0] // stride), -(-size[1] // stride)

    def macs(self, size: Size) -> int:
        """Multiply-accumulates of one image of that height and width."""
        total = 0
        for branch in self.branches:
            height, width = size
            for operation in branch.operations:
                total += operation_macs(operation, (height, width))
                height, width = -(-height // operation.stride), -(-width // operation.stride)
        return total

    def numbers(self, size: Size, of_batch: bool) -> int:
        """Numbers that the kernels write to maps, for one image: `operation_numbers`, and channels handed on."""
        total = 0
        for branch in self.branches:
            height, width = size
            if not branch.operations:
                total += height * width * len(branch.writes)
            for operation in branch.operations:
                total += operation_numbers(operation, (height, width), of_batch)
                height, width = -(-height // operation.stride), -(-width // operation.stride)
        return total
