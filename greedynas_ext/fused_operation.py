"""Single operations of a chain by fused kernels, where the chain as a whole has some that are not recognised."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from greedynas_ext import ops
from greedynas_ext.arguments import Chain, Operation
from greedynas_ext.block_layout import PackedBlock
from greedynas_ext.fused_chain import operation_macs, operation_norms, operation_numbers, operation_shape
from greedynas_ext.intercept import Interceptor
from greedynas_ext.packing import (
    ConvBNWeights,
    InvertedBottleneckWeights,
    pack_choice_block,
    running_statistics,
)
from greedynas_ext.recognise import recognise_operation


class FusedOperation:
    """Runs an operation by `ops.mixed_op`, by the interceptor's policy; what that cannot do, by the operation itself.

    It only reads its input. Weights are packed when it first runs, so it is made anew for each evaluation.
    """

    def __init__(
        self, operation: Operation, weights: InvertedBottleneckWeights | ConvBNWeights, interceptor: Interceptor
    ) -> None:
        self.operation = operation
        self._weights, self._interceptor = weights, interceptor
        self._block: PackedBlock | None = None
        self._running: Tensor | None = None
        self._index = torch.zeros(1, dtype=torch.int64)
        norms = [norm for norm in operation_norms(weights) if norm is not None]
        self._has_running = all(norm.running_mean is not None and norm.running_var is not None for norm in norms)

    def __call__(self, x: Tensor) -> Tensor:
        """The operation's output for [N, C, H, W]."""
        policy = self._interceptor.normalisation
        into, _, stride = operation_shape(self._weights)
        values = len(x) * -(-x.shape[2] // stride) * -(-x.shape[3] // stride) if x.dim() == 4 else 0
        fits = x.dim() == 4 and x.shape[1] == into and x.dtype in (torch.float32, torch.float64) and x.is_cpu
        if not fits or values < 2 or policy == "probe" or (policy == "running" and not self._has_running):
            return self.operation(x.clone())
        if self._block is None:
            self._block = pack_choice_block([self._weights], dtype=x.dtype)
            if policy == "running":
                self._running = running_statistics([self._weights], self._block)
        statistics = self._running
        if policy == "constants":
            if not self._interceptor.statistics:
                raise RuntimeError(f"{self._interceptor.place} normalised more often than on the calibration images")
            statistics = self._interceptor.statistics.pop(0)[0]
        output, used = ops.mixed_op(x.permute(0, 2, 3, 1)[None], self._index, self._index, self._block, statistics)
        if policy == "capture":
            self._interceptor.statistics.append((used, used))
        macs = len(x) * operation_macs(self._weights, (x.shape[2], x.shape[3]))
        self._interceptor.macs += macs
        self._interceptor.macs_fused += macs
        return output[0].permute(0, 3, 1, 2)

    def written(self, x: Tensor, of_batch: bool) -> int:
        """Bytes that the kernels write to maps for [N, C, H, W]."""
        numbers = operation_numbers(self._weights, (x.shape[2], x.shape[3]), of_batch)
        return len(x) * numbers * x.element_size()


def with_fused_operations(
    chain: Chain, used: Iterable[tuple[int, int]], interceptor: Interceptor
) -> tuple[Chain, set[tuple[int, int]]]:
    """The chain with those of the operations `used` that are recognised replaced, and which those are."""
    choices = [list(layer) for layer in chain.choices]
    replaced = set()
    for layer, op in used:
        weights = recognise_operation(choices[layer][op], None)
        if isinstance(weights, InvertedBottleneckWeights | ConvBNWeights):
            choices[layer][op] = FusedOperation(choices[layer][op], weights, interceptor)
            replaced.add((layer, op))
    return chain.with_choices(tuple(map(tuple, choices))), replaced
