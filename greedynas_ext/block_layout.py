"""The layout of a packed choice block, as csrc/choice_block.h describes it (a test compares the two)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

LANES = 16
"""Rows of channels are padded with zeros to a multiple of this many."""

SECTION_ALIGNMENT = 32
"""Sections of the weights begin at a multiple of this many elements."""

KINDS = {"identity": 0, "conv_bn": 1, "inverted_bottleneck": 2}
ACTIVATIONS = {"linear": 0, "relu": 1, "relu6": 2, "hswish": 3, "silu": 4}
GATES = {"hsigmoid": 0, "sigmoid": 1}
STAGES = ("expand", "depthwise", "project")
"""The stages of an operation that end in a BatchNorm."""

FIELDS = (
    "kind",
    "in_channels",
    "hidden_channels",
    "out_channels",
    "kernel",
    "stride",
    "activation",
    "depthwise_activation",
    "project_activation",
    "se_channels",
    "se_gate",
    "residual",
    "expand_weight",
    "expand_bn",
    "expand_statistics",
    "depthwise_weight",
    "depthwise_bn",
    "depthwise_statistics",
    "se_reduce_weight",
    "se_reduce_bias",
    "se_expand_weight",
    "se_expand_bias",
    "project_weight",
    "project_bn",
    "project_statistics",
)
"""The columns of `PackedBlock.op_table`."""


def padded(channels: int) -> int:
    """`channels` rounded up to whole `LANES`."""
    return -(-channels // LANES) * LANES


@dataclass(frozen=True)
class PackedBlock:
    """A packed choice block of O operations, with the same input channels, output channels and stride.

    Attributes:
        weights: float32 or float64 [size], all operations' weights one after the other.
        op_table: O rows of `FIELDS`, one after the other; offsets count elements of `weights`, -1 where absent.
        bn_eps: 3 for each operation: after expand, depthwise and project.
    """

    weights: Tensor
    op_table: tuple[int, ...]
    bn_eps: tuple[float, ...]

    @property
    def num_operations(self) -> int:
        """O."""
        return len(self.op_table) // len(FIELDS)

    @property
    def in_channels(self) -> int:
        """Channels of the inputs."""
        return self.operation(0)["in_channels"]

    @property
    def out_channels(self) -> int:
        """Channels of the outputs."""
        return self.operation(0)["out_channels"]

    @property
    def stride(self) -> int:
        """Input pixels per output pixel, in height and in width."""
        return self.operation(0)["stride"]

    @property
    def statistics_width(self) -> int:
        """S: columns of a row of BatchNorm statistics, enough for the operation that needs most."""
        return statistics_width(self.op_table)

    def operation(self, index: int) -> dict[str, int]:
        """Row `index` of the table, by the names in `FIELDS`."""
        return dict(zip(FIELDS, self.op_table[index * len(FIELDS) : (index + 1) * len(FIELDS)], strict=True))


def stage_channels(operation: dict[str, int]) -> dict[str, int]:
    """Channels of each BatchNorm that a row of the table has, by its stage."""
    widths = (operation["hidden_channels"], operation["hidden_channels"], operation["out_channels"])
    return {stage: c for stage, c in zip(STAGES, widths, strict=True) if operation[f"{stage}_bn"] >= 0}


def statistics_width(op_table: Sequence[int]) -> int:
    """S of a flat table; 0 where no operation has a BatchNorm."""
    width = 0
    for start in range(0, len(op_table), len(FIELDS)):
        operation = dict(zip(FIELDS, op_table[start : start + len(FIELDS)], strict=True))
        for stage, channels in stage_channels(operation).items():
            width = max(width, operation[f"{stage}_statistics"] + 2 * padded(channels))
    return width


def unpack_statistics(block: PackedBlock, op: int, row: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance [C] of each BatchNorm of operation `op`, by stage, from a row [S] of statistics."""
    entry = block.operation(op)
    result = {}
    for stage, channels in stage_channels(entry).items():
        start = entry[f"{stage}_statistics"]
        result[stage] = (
            row[start : start + channels],
            row[start + padded(channels) : start + padded(channels) + channels],
        )
    return result
