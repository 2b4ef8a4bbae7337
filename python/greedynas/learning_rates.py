"""Learning rates as functions of the optimizer step, which start at the first step and end at the last."""

from __future__ import annotations

import math


def cosine(step: int, total_steps: int, start: float, end: float) -> float:
    """Half a cosine from `start` at step 0 to `end` at step `total_steps` - 1 and after."""
    progress = min(1.0, step / max(1, total_steps - 1))
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * progress))


def with_warmup(step: int, warmup_steps: int, rate: float) -> float:
    """`rate`, risen linearly over the first `warmup_steps` steps; the first of them is not 0."""
    return rate * min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else rate


def exponential(epoch: float, start: float, *, factor: float = 0.97, every: float = 2.4) -> float:
    """`start` times `factor` for each whole `every` epochs that have passed."""
    return float(start * factor ** math.floor(epoch / every))
