"""Measuring in a fresh process: time, and the most memory that it ever held."""

from __future__ import annotations

import ctypes
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Cost:
    """What some calls of a function took.

    Attributes:
        seconds: of each call.
        peak_bytes: most memory that the process held meanwhile (resident set), libraries and inputs included.
        growth_bytes: by how much that was more than just before the first call.
    """

    seconds: list[float]
    peak_bytes: int
    growth_bytes: int


def cost_of(function: Callable[[], object], calls: int) -> Cost:
    """Calls a function and says what it took; for a process of its own, where freed memory of others is no help.

    The first call is the first one: where first calls are slower, take the lowest of several.
    """
    ctypes.CDLL(None).malloc_trim(0)  # else memory that building the inputs freed would hide growth
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    seconds = []
    for _ in range(calls):
        since = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - since)
    peak = _status("VmHWM")
    return Cost(seconds, peak, peak - before)


def in_child(function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
    """Runs a function of a module in a new process, with the same environment, and returns what it returns.

    Raises:
        BrokenProcessPool: the process was killed, for want of memory for instance.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *args, **kwargs).result()


def _status(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024
