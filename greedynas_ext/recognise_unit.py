"""Describes modules that split, branch, concatenate and shuffle, and those of several operations in a row, as units."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from greedynas_ext.fx_cursor import matched
from greedynas_ext.fx_steps import Mismatch
from greedynas_ext.fx_trace import Untraceable, trace
from greedynas_ext.fx_units import Branch, likely_channels, read_branches
from greedynas_ext.operations import operation_shape
from greedynas_ext.packing import ConvBNWeights, InvertedBottleneckWeights
from greedynas_ext.recognise import (
    HeadWeights,
    StemWeights,
    Unrecognised,
    recognise,
    recognise_operation,
)
from greedynas_ext.recognise_row import activated_operations
from greedynas_ext.unit import BranchWeights, UnitWeights

_NO_CONVOLUTION = Unrecognised("output: expected a convolution on the way to it")


def recognise_unit(module: object, in_channels: int | None) -> UnitWeights | Unrecognised:
    """Describes `module` if it computes a unit on [N, in_channels, H, W], in evaluation mode. Never raises.

    Without `in_channels` they are those of the first convolution, or twice as many where that fits a split.
    """
    operation = recognise_operation(module, in_channels)
    if isinstance(operation, InvertedBottleneckWeights | ConvBNWeights):
        return UnitWeights.of(operation)
    found = recognise(module, "unit", in_channels, _described)
    return operation if found == _NO_CONVOLUTION and isinstance(operation, Unrecognised) else found


def unit_of_stem(stem: StemWeights) -> UnitWeights:
    """All of a stem."""
    return UnitWeights.of(ConvBNWeights(stem.conv, stem.bn, stem.stride, stem.activation), *stem.blocks)


def unit_of_head(head: HeadWeights) -> UnitWeights:
    """What a head does before it takes the mean over the image."""
    return UnitWeights.of(ConvBNWeights(head.conv, head.bn, 1, head.activation))


def _described(module: nn.Module, in_channels: int | None) -> UnitWeights | Unrecognised:
    reason = _NO_CONVOLUTION.reason
    try:
        traced = trace(module)
        for channels in likely_channels(traced) if in_channels is None else (in_channels,):
            try:
                found = read_branches(traced, channels)
            except Mismatch as error:
                reason = str(error)
            else:
                return _unit(found, channels)
    except (Untraceable, Mismatch) as error:
        reason = str(error)
    return Unrecognised(reason)


def _unit(found: Sequence[Branch], in_channels: int) -> UnitWeights:
    branches = tuple(map(_branch, found))
    if not any(branch.operations for branch in branches):
        raise Mismatch(_NO_CONVOLUTION.reason)
    if len({branch.stride for branch in branches}) != 1:
        raise Mismatch("output: expected branches of one stride")
    return UnitWeights(in_channels, branches)


def _branch(branch: Branch) -> BranchWeights:
    activation, operations = ("linear", ()) if branch.steps is None else matched(branch.steps, activated_operations)
    into, out = len(branch.reads), len(branch.writes)
    if operations and (operation_shape(operations[0])[0], operation_shape(operations[-1])[1]) != (into, out):
        raise Mismatch(f"output: expected a branch from {into} channels to {out}")
    return BranchWeights(branch.reads, branch.writes, operations, activation)
