"""Units by the CUDA kernels: launched on the current stream, and nothing waits for them (csrc/cuda/unit.h)."""

from __future__ import annotations

import torch
from torch import Tensor

from greedynas_ext import _library, ops_cuda
from greedynas_ext.operations import UnitOperation, operation_shape
from greedynas_ext.packing import ConvBNWeights, InvertedBottleneckWeights
from greedynas_ext.rows import Rows, branch_rows
from greedynas_ext.unit import UnitWeights

MOST_DENSE = 1792
"""Inputs of an output of a dense convolution larger than 1x1 whose places fit the shared memory of every device."""

_MOST_BRANCHES = 16  # csrc/cuda/kernels.h: kMaxSources


def takes(unit: UnitWeights, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are kernels for all of a unit, for maps of `dtype`."""
    most, _ = ops_cuda.most_inputs(device, ops_cuda.PRECISIONS[dtype])
    return len(unit.branches) <= _MOST_BRANCHES and all(_takes(each, most) for each in unit.operations())


def _takes(operation: UnitOperation, most_inputs: int) -> bool:
    into, _, stride = operation_shape(operation)
    if isinstance(operation, ConvBNWeights):
        kernel = operation.weight.shape[2]
        return kernel == 1 or into * kernel**2 <= MOST_DENSE
    if isinstance(operation, InvertedBottleneckWeights):
        there_is = operation.depthwise.shape[2] in ops_cuda.DEPTHWISE_KERNELS and stride in ops_cuda.DEPTHWISE_STRIDES
        return there_is and into <= most_inputs
    return True


class CudaUnit:
    """The kernels of a unit that they take, for maps of `dtype`. Weights are packed when it first runs."""

    def __init__(self, unit: UnitWeights, dtype: torch.dtype) -> None:
        self._unit, self._dtype = unit, dtype
        self._statistics = _library.require_cuda().Statistics
        self._rows = Rows(torch.float32)
        for operation in unit.operations():
            self._rows.add(operation)
        self._evaluation = _library.require_cuda().UnitEvaluation(
            *self._rows.arrays(),
            branch_rows(unit),
            unit.in_channels,
            unit.out_channels,
            ops_cuda.PRECISIONS[dtype],
        )
        self._packed: Tensor | None = None

    def run(self, x: Tensor, policy: str, kept: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The output for [N, C, H, W], channels last, and with the policy "capture" the statistics that were used.

        `kept`: what an earlier run has returned, with "constants".
        """
        images, _, height, width = x.shape
        maps = x.to(self._dtype).permute(0, 2, 3, 1).contiguous()
        if maps.data_ptr() % ops_cuda.ALIGNMENT:
            maps = maps.clone()
        output = maps.new_empty(images, *self._unit.size_after((height, width)), self._unit.out_channels)
        if policy == "capture":
            kept = maps.new_empty(self._evaluation.statistics_size, dtype=torch.float32)
        statistics = getattr(self._statistics, policy.upper())
        memory = _bytes(maps, self._evaluation.needed_bytes(images, height, width, statistics))
        stream = ops_cuda.stream_of(maps)
        with torch.cuda.device(maps.device):
            if self._packed is None:
                self._packed = _bytes(maps, self._evaluation.packed_bytes)
                self._evaluation.pack(self._packed.data_ptr(), stream)
            self._evaluation.run(
                maps.data_ptr(),
                (images, height, width),
                output.data_ptr(),
                0 if kept is None else kept.data_ptr(),
                statistics,
                memory.data_ptr(),
                stream,
            )
        return output.permute(0, 3, 1, 2), kept

    def working_memory(self, x: Tensor) -> Tensor:
        """As much as a run for [N, C, H, W] needs beside input and output."""
        images, _, height, width = x.shape
        return _bytes(x, self._evaluation.needed_bytes(images, height, width, self._statistics.BATCH))


def _bytes(like: Tensor, size: int) -> Tensor:
    return like.new_empty(max(1, size), dtype=torch.uint8)
