"""What the machine can do at most, measured by torch: products of large matrices, and reading or copying memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_ROUNDS = 5


@dataclass(frozen=True)
class Ceilings:
    """The best of some measurements.

    Attributes:
        macs: multiply-accumulates a second of a product of square matrices.
        products: in what it was: "fp32" or "bf16".
        bytes: read, or read and written, a second.
        memory: by what: "sum" or "copy".
    """

    macs: float
    products: str
    bytes: float
    memory: str


def measure(device: torch.device, precision: str, side: int = 2048, numbers: int = 64 << 20) -> Ceilings:
    """Measures with all of torch's threads.

    torch.mm of [side, side] in float32 and, for "bf16", in bfloat16, whichever is faster; a sum of float32 `numbers`
    and a copy of them, likewise. What the kernels do is bound by these only where they multiply as torch.mm does:
    depthwise convolutions cannot use matrix tiles.
    """
    macs: dict[str, float] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        if name in ("fp32", precision):
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            seconds = _fastest(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device)  # type: ignore[misc]
            macs[name] = side**3 / seconds
    source = torch.ones(numbers, device=device)
    target = torch.empty_like(source)
    moved = {
        "sum": source.nbytes / _fastest(source.sum, device),
        "copy": 2 * source.nbytes / _fastest(lambda: target.copy_(source), device),
    }
    products, memory = (max(found, key=lambda name: found[name]) for found in (macs, moved))
    return Ceilings(macs[products], products, moved[memory], memory)


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest call."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for _ in range(_ROUNDS + 1):  # the first is to warm up
        since = time.perf_counter()
        work()
        finish()
        times.append(time.perf_counter() - since)
    return min(times[1:])
