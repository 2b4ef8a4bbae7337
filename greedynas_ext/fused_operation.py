"""Parts of a chain by fused kernels, where the chain as a whole has some that are not recognised."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greedynas_ext import _library, ops_cuda, unit_cuda
from greedynas_ext.arguments import Chain, Operation
from greedynas_ext.intercept import Interceptor
from greedynas_ext.recognise import HeadWeights, Unrecognised, recognise_head, recognise_stem
from greedynas_ext.recognise_unit import recognise_unit, unit_of_head, unit_of_stem
from greedynas_ext.rows import Rows, branch_rows
from greedynas_ext.unit import UnitWeights
from greedynas_ext.unit_cuda import CudaUnit

_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class FusedUnit:
    """Runs an operation that is a unit by fused kernels, by the interceptor's policy; else by the operation itself.

    It only reads its input. Weights are packed when it first runs, so it is made anew for each evaluation.
    """

    def __init__(self, operation: Operation, unit: UnitWeights, precision: str, interceptor: Interceptor) -> None:
        """`precision`: "fp64", "fp32", "bf16" or "fp16", of what comes and goes; the last on a GPU."""
        self.operation = operation
        self._unit, self._interceptor = unit, interceptor
        self._dtype = _DTYPES[precision]
        halves = precision == "bf16" and _library.require_chain().bf16_kernels() != ""
        self._precision = precision if halves or precision != "bf16" else "fp32"
        self._has_running = all(norm.running_mean is not None and norm.running_var is not None for norm in unit.norms())
        self._made: Any = None
        self._rows: Rows | None = None
        self._made_cuda: CudaUnit | None = None

    def runs(self, x: Tensor) -> bool:
        """Whether the kernels run for this input, and not the operation itself."""
        policy = self._interceptor.normalisation
        return self._takes(x) and policy != "probe" and (policy != "running" or self._has_running)

    def __call__(self, x: Tensor) -> Tensor:
        """The operation's output for [N, C, H, W]."""
        if not self.runs(x):
            if self._interceptor.normalisation == "probe" and self._takes(x):
                self._working_memory(x)
            return self.operation(x.clone(memory_format=torch.contiguous_format))
        macs = len(x) * self._unit.macs((x.shape[2], x.shape[3]))
        output = self._by_cuda_unit(x) if self._by_cuda(x) else self._by_unit(x)
        self._interceptor.macs += macs
        self._interceptor.macs_fused += macs
        self._interceptor.by_kernels = True
        return output.to(self._dtype)

    def _by_unit(self, x: Tensor) -> Tensor:
        policy = self._interceptor.normalisation
        evaluation, count = self._evaluation(), len(x)
        if self._precision != "bf16":
            x = x.to(torch.float64 if self._precision == "fp64" else torch.float32)
        shape = (count, self._unit.out_channels, *self._unit.size_after((x.shape[2], x.shape[3])))
        dtype = torch.bfloat16 if self._precision == "bf16" else x.dtype
        output = torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
        values = self._statistics(x)
        evaluation.run(
            x.data_ptr(),
            x.dtype != torch.bfloat16,
            [count, x.shape[2], x.shape[3]],
            list(x.stride()),
            output.data_ptr(),
            0 if values is None else values.data_ptr(),
            getattr(_library.require_chain().Statistics, policy.upper()),
        )
        if policy == "capture":
            assert values is not None
            self._interceptor.statistics.append((values, values))
        return output

    def _by_cuda_unit(self, x: Tensor) -> Tensor:
        policy = self._interceptor.normalisation
        output, kept = self._cuda_unit().run(x, policy, self._kept() if policy == "constants" else None)
        if policy == "capture":
            assert kept is not None
            self._interceptor.statistics.append((kept, kept))
        return output

    def _takes(self, x: Tensor) -> bool:
        if x.dim() != 4 or x.shape[1] != self._unit.in_channels or x.numel() == 0:
            return False
        if self._by_cuda(x):
            elsewhere = self._unit.device not in (None, x.device)  # which the operation itself says
            if elsewhere or unit_cuda.unsupported(self._unit, x.device, self._dtype) is not None:
                return False
        elif not x.is_cpu:
            return False
        if x.dtype != self._dtype and (x.dtype != torch.float32 or self._dtype not in (torch.bfloat16, torch.float16)):
            return False
        # Of one value batch normalisation has no statistics: the operation itself says so.
        height, width = self._unit.size_after((x.shape[2], x.shape[3]))
        return len(x) * height * width > 1

    def _by_cuda(self, x: Tensor) -> bool:
        return ops_cuda.computes(self._dtype, x.device)

    def _evaluation(self) -> Any:
        if self._made is None:
            unit = self._unit
            self._rows = Rows(torch.float64 if self._precision == "fp64" else torch.float32)
            for operation in unit.operations():
                self._rows.add(operation)
            self._made = _library.require_chain().UnitEvaluation(
                *self._rows.arrays(),
                branch_rows(unit),
                unit.in_channels,
                unit.out_channels,
                self._precision,
            )
            self._made.pack()
        return self._made

    def _cuda_unit(self) -> CudaUnit:
        if self._made_cuda is None:
            self._made_cuda = CudaUnit(self._unit, self._dtype)
        return self._made_cuda

    def _statistics(self, x: Tensor) -> Tensor | None:
        """Where statistics are written that are to be kept, or those that were kept."""
        policy = self._interceptor.normalisation
        if policy == "capture":
            dtype = torch.float64 if self._precision == "fp64" else torch.float32
            return x.new_empty(self._evaluation().statistics_size, dtype=dtype)
        return self._kept() if policy == "constants" else None

    def _kept(self) -> Tensor:
        if not self._interceptor.statistics:
            raise RuntimeError(f"{self._interceptor.place} normalised more often than on the calibration images")
        return self._interceptor.statistics.pop(0)[0]

    def _working_memory(self, x: Tensor) -> Tensor:
        """As much as the kernels need, so that who watches allocations sees it."""
        if self._by_cuda(x):
            return self._cuda_unit().working_memory(x)
        batch = _library.require_chain().Statistics.BATCH
        wide = x.dtype != torch.bfloat16
        size = self._evaluation().needed_bytes(len(x), x.shape[2], x.shape[3], wide, batch)
        return x.new_empty(size, dtype=torch.uint8)

    def written(self, x: Tensor, of_batch: bool) -> int:
        """Bytes that the kernels write to maps for [N, C, H, W]."""
        return len(x) * self._unit.numbers((x.shape[2], x.shape[3]), of_batch) * self._dtype.itemsize


class FusedHead:
    """A head whose convolution fused kernels run; the mean and the linear layer are torch's."""

    def __init__(self, head: Operation, weights: HeadWeights, precision: str, interceptor: Interceptor) -> None:
        self.head = head
        self._weights = weights
        self._convolution = FusedUnit(head, unit_of_head(weights), precision, interceptor)

    def __call__(self, x: Tensor) -> Tensor:
        """Logits [N, classes]."""
        side = self._weights.side
        if not self._convolution.runs(x) or (side and x.shape[2:] != (side, side)):
            return self.head(x.clone(memory_format=torch.contiguous_format))
        features = self._convolution(x).mean((2, 3))
        return F.linear(features, self._weights.weight, self._weights.bias)

    def written(self, x: Tensor, of_batch: bool) -> int:
        """Bytes written to maps for [N, C, H, W], and logits."""
        return self._convolution.written(x, of_batch) + len(x) * len(self._weights.weight) * x.element_size()


Fused = FusedUnit | FusedHead


def with_fused_parts(
    chain: Chain, used: Iterable[tuple[int, int]], precision: str, interceptor: Interceptor
) -> tuple[Chain, dict[str, str] | None]:
    """The chain with stem, head and those of the operations `used` that are recognised replaced.

    Beside it why others are not, by their places, identities aside; None where none is replaced.
    """
    replaced = False
    reasons: dict[str, str] = {}

    def fused(place: str, part: Operation, described: UnitWeights | HeadWeights | Unrecognised) -> Operation:
        nonlocal replaced
        if isinstance(described, UnitWeights):
            described = _taken(described, _DTYPES[precision])
        if isinstance(described, Unrecognised):
            if not hands_on(part):
                reasons[place] = described.reason
            return part
        replaced = True
        make = FusedHead if isinstance(described, HeadWeights) else FusedUnit
        return make(part, described, precision, interceptor)  # type: ignore[arg-type]

    as_stem = recognise_stem(chain.stem)
    as_unit = recognise_unit(chain.stem, None) if isinstance(as_stem, Unrecognised) else unit_of_stem(as_stem)
    stem = fused("supernet.stem", chain.stem, as_unit)
    choices = [list(layer) for layer in chain.choices]
    widths = {0: None if isinstance(as_unit, Unrecognised) else as_unit.out_channels}
    for layer, op in sorted(used):
        part = choices[layer][op]
        unit = recognise_unit(part, None)
        if isinstance(unit, Unrecognised) and widths.get(layer):
            unit = recognise_unit(part, widths[layer])  # pooling does not say of how many channels
        if isinstance(unit, UnitWeights):
            widths[layer + 1] = unit.out_channels
        choices[layer][op] = fused(chain.place(layer, op), part, unit)
    head = fused("supernet.head", chain.head, recognise_head(chain.head))
    return replace(chain, stem=stem, choices=tuple(map(tuple, choices)), head=head), reasons if replaced else None


def _taken(unit: UnitWeights, dtype: torch.dtype) -> UnitWeights | Unrecognised:
    """The unit, where there are kernels for it on the device that its weights are on."""
    device = unit.device
    why = unit_cuda.unsupported(unit, device, dtype) if device and ops_cuda.computes(dtype, device) else None
    return unit if why is None else Unrecognised(why)


def hands_on(operation: Operation) -> bool:
    """Whether it is an identity, or a sequence of such."""
    if type(operation) is nn.Sequential:
        return all(map(hands_on, operation))
    return type(operation) is nn.Identity
