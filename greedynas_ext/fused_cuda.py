"""The fused engine on a GPU: kernels (csrc/cuda) are launched on the current stream, and nothing waits for them.

Activations and half-precision depthwise outputs take torch's memory, through its caching allocator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from greedynas_ext import _library, arguments
from greedynas_ext.fused import FusedEngine
from greedynas_ext.fused_chain import FusedChain
from greedynas_ext.isolation import held_interrupts
from greedynas_ext.operations import operation_shape
from greedynas_ext.ops_cuda import most_inputs
from greedynas_ext.packing import InvertedBottleneckWeights
from greedynas_ext.profile import StageProfile
from greedynas_ext.ranges import named, profiling


def unsupported(fused: FusedChain, device: torch.device, precision: str) -> str | None:
    """Why the CUDA kernels cannot evaluate on `device` in `precision` what the CPU's can; None where they can."""
    parts: list[tuple[str, object]] = [("supernet.stem", block) for block in fused.stem.blocks]
    parts += [(fused.chain.place(layer, op), part) for (layer, op), part in fused.operations.items()]
    most, most_of_head = most_inputs(device, precision)
    if (into := fused.head.conv.shape[1]) > most_of_head:
        return f"supernet.head: {into} input channels (on this GPU the CUDA kernels take {most_of_head})"
    for place, part in parts:
        if isinstance(part, InvertedBottleneckWeights):
            into, _, stride = operation_shape(part)
            if stride > 2:
                return f"{place}: stride {stride} (the CUDA kernels have 1 and 2)"
            if into > most:
                return f"{place}: {into} input channels (on this GPU the CUDA kernels take {most})"
    return None


class CudaEngine(FusedEngine):
    """Evaluates the paths of `trie` on batches of images on a GPU."""

    def _module(self) -> Any:
        return _library.require_cuda()

    def _pack(self) -> None:
        # The kernels read the weights when the stream gets there; memory that is freed before stays the stream's.
        self._device = self._rows.kept[0].device
        self._packed = self._memory(self._evaluation.packed_bytes)
        with self._on_device():
            self._evaluation.pack(self._packed.data_ptr(), self._stream())
        self._status = torch.zeros(1, dtype=torch.int32, device=self._device)
        self._found: list[tuple[str, int, Tensor]] = []
        self._events: list[tuple[int, Any, Any]] = []

    def check_values(self, name: str, images: Tensor, targets: Tensor | None) -> None:
        """Nothing waits for the answer: check() reads it. Wrong targets are found by the loss kernel."""
        self._found.append((name, len(images), (~torch.isfinite(images.sum((1, 2, 3)))).sum()))

    def check(self) -> None:
        """Raises ValueError for images that are not finite, and for targets out of range."""
        *counts, status = torch.stack([*(count for _, _, count in self._found), self._status[0]]).tolist()
        for (name, images, _), count in zip(self._found, counts, strict=True):
            if count:
                raise arguments.not_finite(name, count, images)
        if status:
            classes = self._fused.head.weight.shape[0]
            raise ValueError(f"targets: expected classes in [0, {classes}) (the head's logits), got others")

    def _check_targets(self, targets: Tensor) -> None:
        pass  # the loss kernel does, and check() says so

    def _memory(self, size: int) -> Tensor:
        return torch.empty(max(1, size), dtype=torch.uint8, device=self._device)

    def _on_device(self) -> Any:
        return torch.cuda.device(self._device)

    def _stream(self) -> int:
        return int(torch.cuda.current_stream(self._device).cuda_stream)

    def _run(
        self, steps: np.ndarray[Any, Any], images: Tensor, targets: Tensor | None, statistics: Any
    ) -> tuple[Tensor, Tensor]:
        count = len(images)
        losses = torch.empty(len(self._leaves), count, dtype=torch.float32, device=self._device)
        correct = torch.empty(len(self._leaves), dtype=torch.int64, device=self._device)
        needed = self._evaluation.needed_bytes(steps, count, *self._resolution, statistics)
        memory = self._memory(needed)
        with self._on_device(), held_interrupts() as safe_point:
            self._evaluation.start(
                steps,
                images.data_ptr(),
                [count, *self._resolution],
                list(images.stride()),
                0 if targets is None else targets.data_ptr(),
                self._label_smoothing,
                losses.data_ptr(),
                correct.data_ptr(),
                self._status.data_ptr(),
                statistics,
                memory.data_ptr(),
                self._stream(),
            )
            before = self._event()
            while (stage := self._advance()) >= 0:
                after = self._event()
                if after is not None:
                    self._events.append((stage, before, after))
                before = after
                safe_point()
        return losses, correct

    def _advance(self) -> int:
        """Launches what comes next, under its name; its stage, or -1."""
        if self._device.type != "cuda" and not profiling():
            return int(self._evaluation.advance())
        stage = int(self._evaluation.next_stage())
        if stage < 0:
            return stage
        with named(self._stages[stage], self._device):
            return int(self._evaluation.advance())

    def _event(self) -> Any:
        if not self._profiled:
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def profile(self, images: int) -> tuple[StageProfile, ...]:
        """Time between events on the stream, operations and bytes by stage; `images` in all."""
        stem, nodes, classes = self._fused.output_numbers(self._trie, self._resolution)
        layers = [0] * self._trie.num_layers
        for node, numbers in zip(self._trie.nodes, nodes, strict=True):
            layers[node.layer] += numbers
        heads = (len(self._leaves) * classes * 4, len(self._leaves) * 4)
        sizes = [number * self._map_bytes for number in (stem, *layers)] + list(heads)
        return tuple(
            replace(stage, bytes=images * size) for stage, size in zip(super().profile(images), sizes, strict=True)
        )

    def _times(self) -> Sequence[tuple[float, int, int, dict[str, float]]]:
        torch.cuda.synchronize(self._device)
        seconds = [0.0] * (self._trie.num_layers + 3)
        calls = [0] * len(seconds)
        for stage, before, after in self._events:
            seconds[stage] += before.elapsed_time(after) / 1e3
            calls[stage] += 1
        return [(time, number, 0, {}) for time, number in zip(seconds, calls, strict=True)]

    def _free_memory(self) -> int:
        free, _ = torch.cuda.mem_get_info(self._device)
        reserved = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return (free + reserved) // 2
