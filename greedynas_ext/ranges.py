"""Names of what runs: ranges that torch.profiler shows, and NVTX ranges for Nsight on a GPU."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.profiler import record_function

_NOTHING: AbstractContextManager[Any] = contextlib.nullcontext()


def profiling() -> bool:
    """Whether a profiler of torch's records this thread."""
    return torch._C._autograd._profiler_enabled()


def named(name: str, device: torch.device | None = None) -> AbstractContextManager[Any]:
    """The range "greedynas: `name`" around a body; where nobody records, next to nothing.

    For a `device` that is a GPU an NVTX range is pushed where no profiler of torch's records.
    """
    if profiling():
        return record_function(f"greedynas: {name}")
    if device is not None and device.type == "cuda":
        return torch.cuda.nvtx.range(f"greedynas: {name}")
    return _NOTHING
