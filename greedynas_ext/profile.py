"""What the stages of an evaluation took."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StageProfile:
    """What one stage ("stem", "layer 0", ..., "head", "loss") took, summed over batches.

    Attributes:
        seconds: wall time; on a GPU the device is synchronised around each operation for it.
        calls: operations run.
        macs: multiply-accumulates of convolutions, linear layers and matrix products.
        bytes: of the outputs that the stage's operations returned.
    """

    stage: str
    seconds: float
    calls: int
    macs: int
    bytes: int


class Profile:
    """Adds up `StageProfile`s in order of first appearance; does nothing unless `enabled`."""

    def __init__(self, enabled: bool, device: torch.device) -> None:
        self.enabled = enabled
        self._device = device
        self._totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0, 0, 0])

    def now(self) -> float:
        """Seconds on a monotonic clock, the device's work done."""
        if self.enabled and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def add(self, stage: str, since: float, macs: int, output_bytes: int) -> None:
        """One operation of `stage` has run since the time `since`."""
        if self.enabled:
            for slot, value in enumerate((self.now() - since, 1, macs, output_bytes)):
                self._totals[stage][slot] += value

    def stages(self) -> tuple[StageProfile, ...]:
        """The sums so far: stem, layers, head, loss."""
        return tuple(
            StageProfile(stage, seconds, int(calls), int(macs), int(size))
            for stage, (seconds, calls, macs, size) in self._totals.items()
        )
