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


def unsupported(unit: UnitWeights, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run a unit on `device` for maps of `dtype`; None where they can."""
    if len(unit.branches) > _MOST_BRANCHES:
        return f"{len(unit.branches)} branches (the CUDA kernels take {_MOST_BRANCHES})"
    most, _ = ops_cuda.most_inputs(device, ops_cuda.PRECISIONS[dtype])
    return next(filter(None, (_unsupported(operation, most) for operation in unit.operations())), None)


def _unsupported(operation: UnitOperation, most_inputs: int) -> str | None:
    into, _, stride = operation_shape(operation)
    if isinstance(operation, ConvBNWeights):
        kernel = operation.weight.shape[2]
        if kernel > 1 and into * kernel**2 > MOST_DENSE:
            return f"{kernel}x{kernel} of {into} channels (the CUDA kernels take {MOST_DENSE // kernel**2})"
    if isinstance(operation, InvertedBottleneckWeights):
        if (kernel := operation.depthwise.shape[2]) not in ops_cuda.DEPTHWISE_KERNELS:
            return f"depthwise {kernel}x{kernel} (the CUDA kernels have 3x3, 5x5 and 7x7)"
        if stride not in ops_cuda.DEPTHWISE_STRIDES:
            return f"stride {stride} (the CUDA kernels have 1 and 2)"
        if into > most_inputs:
            return f"{into} input channels (on this GPU the CUDA kernels take {most_inputs})"
    return None


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
