"""Schedules of the exploit probability: how often a path is drawn from the candidate pool."""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from greedynas_ext.checks import check_count, check_probability

ScheduleKind = Literal["linear", "cosine"]


@dataclass(frozen=True, kw_only=True)
class ExploitSchedule:
    """The exploit probability ε of each optimizer step, counted from 0 (GreedyNAS, exploration and exploitation).

    ε is 0 through the warm-up, where paths are drawn uniformly and nothing is evaluated. The first step after it has
    exactly `start`, the last one (`total_steps - 1`) and every later one exactly `end`, and ε never falls in between.
    Where only one step follows the warm-up, that step has `end`. The horizon is `total_steps` whether or not training
    stops early.

    Args:
        kind: "linear", or "cosine" (slow at both ends: start + (end - start) (1 - cos πt) / 2).
        start: ε of the first step after the warm-up, in [0, end].
        end: ε of the last step, in [start, 1].
        warmup_steps: steps of warm-up, 0 to `total_steps`.
        total_steps: steps in all, at least 1.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of its range.
    """

    kind: ScheduleKind = field(default="linear", kw_only=False)
    start: float = 0.0
    end: float = 0.8
    warmup_steps: int
    total_steps: int

    def __post_init__(self) -> None:
        if self.kind not in get_args(ScheduleKind):
            raise ValueError(f"kind: expected one of {', '.join(get_args(ScheduleKind))}, got {self.kind!r}")
        start = check_probability("start", self.start)
        end = check_probability("end", self.end)
        if start > end:
            raise ValueError(f"start: expected at most end = {end!r} (the schedule never falls), got {start!r}")
        total = check_count("total_steps", self.total_steps, 1)
        warmup = check_count("warmup_steps", self.warmup_steps, 0)
        if warmup > total:
            raise ValueError(f"warmup_steps: expected at most total_steps = {total}, got {warmup}")

    def in_warmup(self, step: int) -> bool:
        """Whether optimizer step `step` (from 0) belongs to the warm-up."""
        return check_count("step", step, 0) < self.warmup_steps

    def __call__(self, step: int) -> float:
        """The exploit probability of optimizer step `step`, counted from 0."""
        if self.in_warmup(step):
            return 0.0
        last = self.total_steps - 1
        if step >= last:
            return float(self.end)
        progress = (step - self.warmup_steps) / (last - self.warmup_steps)
        if self.kind == "cosine":
            progress = math.sin(0.5 * math.pi * progress) ** 2  # = (1 - cos πt) / 2, without its cancellation at 0
        # start + (end - start) may round to just above end
        return min(self.start + (self.end - self.start) * progress, float(self.end))
