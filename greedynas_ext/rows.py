"""Descriptions as the native evaluations read them: arrays of numbers and addresses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from greedynas_ext.block_layout import ACTIVATIONS, GATES, KINDS
from greedynas_ext.derived import Origin, origin_of
from greedynas_ext.fused_chain import FusedChain
from greedynas_ext.operations import (
    POOLINGS,
    Described,
    PoolWeights,
    SeparableWeights,
    operation_norms,
    operation_shape,
)
from greedynas_ext.packing import (
    BatchNormWeights,
    ConvBNWeights,
    IdentityWeights,
    InvertedBottleneckWeights,
)
from greedynas_ext.unit import UnitWeights

_SHAPE_COLUMNS = 14  # of a row, before the addresses
_POOL = 3  # csrc/operation_source.h: beside KINDS
_NO_DEPTHWISE_NORM, _NO_NORM = 2, 4  # bits of its `unnormalised`


class Rows:
    """Descriptions as csrc/chain_rows.h reads them, and the tensors whose addresses stand in them.

    Attributes:
        kept: the tensors.
        weight: address of the classifier's weight.
        bias: of its bias, or 0.
    """

    weight: int
    bias: int

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.kept: list[Tensor] = []
        self._sources: list[Any] = []  # where each tensor's values come from
        self._converted: list[tuple[Tensor, Tensor]] = []
        self._means: list[tuple[BatchNormWeights, Tensor]] = []
        self._derived: list[tuple[Origin, Tensor]] = []
        self._rows: list[list[int]] = []
        self._eps: list[tuple[float, ...]] = []

    @classmethod
    def of(cls, fused: FusedChain, dtype: torch.dtype) -> Rows:
        """Stem, head, the stem's blocks and the operations; then the classifier's addresses, `weight` and `bias`."""
        rows = cls(dtype)
        rows._convolution(fused.stem.conv, fused.stem.stride, fused.stem.activation, fused.stem.bn)
        rows._convolution(fused.head.conv, 1, fused.head.activation, fused.head.bn)
        for operation in (*fused.stem.blocks, *fused.operations.values()):
            rows.add(operation)
        rows.weight, rows.bias = rows._address(fused.head.weight), rows._address(fused.head.bias)
        return rows

    def arrays(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """int64 [operations, columns], and eps float64 [operations, 3]."""
        return np.array(self._rows, dtype=np.int64), np.array(self._eps, dtype=np.float64)

    def hold(self) -> None:
        """Keeps the memory that is read now, whatever becomes of the parameters' .data."""
        self.kept = [tensor.detach() for tensor in self.kept]

    def refresh(self) -> None:
        """Computes once more what is not read where it lies."""
        with torch.no_grad():
            for origin, derived in self._derived:
                derived.copy_(origin.again())
            for source, converted in self._converted:
                converted.copy_(source)
            for norm, mean in self._means:
                mean.copy_(self._mean_without_bias(norm))

    def reads_what(self, other: Rows) -> bool:
        """Whether both are of the same operations on the same memory."""
        shapes = [[row[:_SHAPE_COLUMNS] for row in rows._rows] for rows in (self, other)]
        return shapes[0] == shapes[1] and (self._eps, self._sources) == (other._eps, other._sources)

    def _address(self, tensor: Tensor | None) -> int:
        """Of the tensor's values, contiguous and of the dtype that the kernels read; 0 for None."""
        if tensor is None:
            return 0
        where = self._where(tensor)
        if tensor.dtype != self._dtype or not tensor.is_contiguous():
            source = tensor.detach()
            tensor = source.to(self._dtype, memory_format=torch.contiguous_format, copy=True)
            self._converted.append((source, tensor))
            self._sources.append((where, source.dtype, source.stride()))
        else:
            self._sources.append(where)
        self.kept.append(tensor)
        return tensor.data_ptr()

    def _where(self, tensor: Tensor) -> Any:
        """The memory that the tensor's values come from."""
        origin = origin_of(tensor)
        if origin is None:
            return tensor.data_ptr()
        self._derived.append((origin, tensor))
        return origin.where()

    def _convolution(self, weight: Tensor, stride: int, activation: str, bn: BatchNormWeights) -> None:
        """A dense convolution with BatchNorm."""
        out, into, kernel = weight.shape[0], weight.shape[1], weight.shape[2] if weight.dim() == 4 else 1
        shape = [KINDS["conv_bn"], into, 0, out, kernel, stride, ACTIVATIONS[activation]]
        self._add(shape, [None] * 6 + [weight], (None, None, bn))

    def add(self, operation: Described) -> None:
        """A row more, of an operation."""
        into, out, stride = operation_shape(operation)
        if isinstance(operation, IdentityWeights):
            self._add([KINDS["identity"], into, 0, out, 1, 1], [None] * 7, (None, None, None))
        elif isinstance(operation, ConvBNWeights):
            self._convolution(operation.weight, stride, operation.activation, operation.bn)
        elif isinstance(operation, PoolWeights):
            shape = [_POOL, into, 0, out, operation.kernel, stride, ACTIVATIONS[operation.activation], 0, 0, 0, 0, 0]
            shape += [POOLINGS[operation.pooling], _NO_NORM if operation.bn is None else 0]
            self._add(shape, [None] * 7, operation_norms(operation))
        elif isinstance(operation, SeparableWeights):
            shape = [KINDS["inverted_bottleneck"], into, into, out, operation.depthwise.shape[2], stride]
            shape += [0, 0, ACTIVATIONS[operation.activation], 0, 0, 0, 0, _NO_DEPTHWISE_NORM]
            weights = [None, operation.depthwise, *[None] * 4, operation.project]
            self._add(shape, weights, operation_norms(operation))
        else:
            self._bottleneck(operation)

    def _bottleneck(self, block: InvertedBottleneckWeights) -> None:
        into, out, stride = operation_shape(block)
        hidden, kernel = block.depthwise.shape[0], block.depthwise.shape[2]
        se = block.squeeze_excitation
        squeezed, gate = (0, 0) if se is None else (se.reduce_weight.shape[0], GATES[se.gate])
        activations = [ACTIVATIONS[activation] for activation in block.activations]
        shape = [KINDS["inverted_bottleneck"], into, hidden, out, kernel, stride, *activations]
        excitation: list[Tensor | None] = [None] * 4
        if se is not None:
            excitation = [se.reduce_weight, se.reduce_bias, se.expand_weight, se.expand_bias]
        weights = [block.expand, block.depthwise, *excitation, block.project]
        self._add([*shape, squeezed, gate, int(block.residual)], weights, operation_norms(block))

    def _add(
        self, shape: list[int], weights: Sequence[Tensor | None], norms: Sequence[BatchNormWeights | None]
    ) -> None:
        """A row; columns of its shape that are left out at its end are 0."""
        row = [*shape, *[0] * (_SHAPE_COLUMNS - len(shape)), *map(self._address, weights)]
        for norm in norms:
            row += (0,) * 4 if norm is None else self._norm(norm)
        self._rows.append(row)
        self._eps.append(tuple(0.0 if norm is None else norm.eps for norm in norms))

    def _norm(self, norm: BatchNormWeights) -> list[int]:
        """Addresses of gamma, beta, mean and variance."""
        return [*map(self._address, (norm.weight, norm.bias)), self._mean(norm), self._address(norm.running_var)]

    def _mean(self, norm: BatchNormWeights) -> int:
        if norm.running_mean is None or norm.conv_bias is None:
            return self._address(norm.running_mean)
        mean = self._mean_without_bias(norm)
        self._means.append((norm, mean))
        self._sources += [(self._where(tensor), tensor.dtype) for tensor in (norm.running_mean, norm.conv_bias)]
        self.kept.append(mean)
        return mean.data_ptr()

    def _mean_without_bias(self, norm: BatchNormWeights) -> Tensor:
        mean = norm.mean_without_bias
        assert mean is not None
        return mean.to(self._dtype).contiguous()


def branch_rows(unit: UnitWeights) -> np.ndarray[Any, Any]:
    """int64 [branches, 8], of operations that stand in a Rows in the order of the branches."""
    rows = []
    for branch in unit.branches:
        channels = (*_progression(branch.reads), *_progression(branch.writes))
        rows.append([len(branch.operations), *channels, ACTIVATIONS[branch.activation]])
    return np.array(rows, dtype=np.int64)


def _progression(channels: range) -> tuple[int, int, int]:
    return channels.start, channels.step, len(channels)
