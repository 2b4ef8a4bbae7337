"""What the stages of an evaluation took."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class StageProfile:
    """What one stage ("stem", "layer 0", ..., "head", "loss") took, summed over batches.

    Attributes:
        seconds: wall time; on a GPU the device is synchronised around each operation for it.
        calls: operations run.
        macs: multiply-accumulates of convolutions, linear layers and matrix products.
        bytes: of the outputs that the stage's operations returned.
        parts: what the seconds were spent on. Of fused kernels on a CPU by kernel: "statistics" (of the batch, and
            what BatchNorm makes of them), "expand and depthwise", "squeeze-excitation", "project", "finish" (the last
            BatchNorm, the residual, moments), "block" (all of it, where statistics are known), "convolution"; the rest
            is none of them. Of modules by operation. Empty on a GPU by fused kernels.
    """

    stage: str
    seconds: float
    calls: int
    macs: int
    bytes: int
    parts: Mapping[str, float] = field(default_factory=dict)


class Profile:
    """Adds up `StageProfile`s in order of first appearance; does nothing unless `enabled`."""

    def __init__(self, enabled: bool, device: torch.device) -> None:
        self.enabled = enabled
        self._device = device
        self._totals: dict[str, StageProfile] = {}

    def now(self) -> float:
        """Seconds on a monotonic clock, the device's work done."""
        if self.enabled and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def add(self, stage: str, since: float, macs: int, output_bytes: int, place: str) -> None:
        """One operation of `stage`, the one at `place`, has run since the time `since`."""
        if not self.enabled:
            return
        seconds = self.now() - since
        total = self._totals.get(stage, StageProfile(stage, 0.0, 0, 0, 0))
        self._totals[stage] = StageProfile(
            stage,
            total.seconds + seconds,
            total.calls + 1,
            total.macs + macs,
            total.bytes + output_bytes,
            {**total.parts, place: total.parts.get(place, 0.0) + seconds},
        )

    def stages(self) -> tuple[StageProfile, ...]:
        """The sums so far: stem, layers, head, loss."""
        return tuple(self._totals.values())
