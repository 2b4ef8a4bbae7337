"""Single operations under pytest-benchmark, each beside the same in plain torch: `make bench-kernels`.

    python -m pytest bench/kernels --benchmark-only --benchmark-group-by=group
    python -m pytest bench/kernels --benchmark-only -k mixed_op --benchmark-autosave --benchmark-compare

A group is one size, with a line for the kernel ("ops") and one for plain torch ("torch"). Every benchmark checks what
was computed, with or without the clock (--benchmark-disable). Stages inside a block: bench/stages.py.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded

from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    """As evaluations run."""
    with torch.no_grad():
        yield


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Times a function on arguments in the group that is named after the test and its size; returns what it gives."""

    def run(function: Callable[..., Any], *arguments: Any, group: str) -> Any:
        benchmark.group = f"{request.function.__name__.removeprefix('test_')}, {group}"
        return benchmark(function, *arguments)

    return run


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
