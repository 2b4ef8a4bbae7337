"""Measuring ways against each other, interleaved, and saying on what machine."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")
_VARIABLES = ("OMP_", "GREEDYNAS_", "MALLOC_", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "LD_PRELOAD")


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a number of measurements."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Raises ValueError for less than two values."""
        if len(values) < 2:
            raise ValueError(f"values: expected at least two for a spread, got {len(values)}")
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.lower:.2f} to {self.upper:.2f})"


@dataclass(frozen=True)
class Times:
    """Seconds of every way in every round: `seconds[way][round]`."""

    seconds: dict[str, list[float]]

    def spread(self, way: str) -> Spread:
        """Seconds of a way over the rounds."""
        return Spread.of(self.seconds[way])

    def ratio(self, slow: str, fast: str) -> Spread:
        """How many times as long `slow` took as `fast`: taken within each round, then over the rounds.

        Both halves of a ratio are from the same moments, so that a machine that is slower for a while changes it less
        than it changes the times.
        """
        return Spread.of([a / b for a, b in zip(self.seconds[slow], self.seconds[fast], strict=True)])

    def fastest(self, ways: list[str]) -> str:
        """The way with the lowest median."""
        return min(ways, key=lambda way: statistics.median(self.seconds[way]))


def interleave(ways: Mapping[str, Callable[[], object]], rounds: int) -> Times:
    """Times each way once a round, in an order that rotates; every way has to be warm.

    Raises:
        ValueError: less than two rounds.
    """
    if rounds < 2:
        raise ValueError(f"rounds: expected at least 2, got {rounds}")
    names = list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            seconds[name].append(time_once(ways[name]))
    return Times(seconds)


def time_once(way: Callable[[], object]) -> float:
    """Seconds of one call."""
    since = time.perf_counter()
    way()
    return time.perf_counter() - since


def machine() -> dict[str, Any]:
    """On what a measurement ran: processor, versions, threads, environment, date, commit."""
    info = _cpu_info()
    return {
        "cpu": info.get("model name", platform.processor()),
        "flags": [flag for flag in _FLAGS if flag in info.get("flags", "").split()],
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(_VARIABLES)},
        "nice": os.nice(0),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": list(os.getloadavg()),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
    }


def _cpu_info() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _commit() -> str | None:
    """The commit of this checkout, with "+" where files differ from it; None outside one."""
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parent)]
    try:
        # An installed package may lie inside a checkout of something else.
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changed.strip() else "")
