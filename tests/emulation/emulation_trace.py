"""What kernels do with memory: a tracing build (emulation_build.build_traced), its device, and its counts by name."""

from __future__ import annotations

import ctypes
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

EMULATOR = ("tests/emulation/emulation/", "trace/trace.cpp", "/include/c++/")  # places that are no kernel's


class Config(ctypes.Structure):
    """emu::Config (emulation/configuration.h) of a built module."""

    _fields_ = [
        ("order", ctypes.c_int),
        ("seed", ctypes.c_uint),
        ("stop_at_error", ctypes.c_bool),
        ("static_bytes", ctypes.c_size_t),
        ("shared_bytes", ctypes.c_size_t),
        ("multiprocessors", ctypes.c_int),
    ]

    @classmethod
    def of(cls, module: str) -> Config:
        """Of the module in that file."""
        return cls.in_dll(ctypes.CDLL(module), "_ZN3emu3cfgE")


class Lines:
    """Source lines of the instructions of a module or program with debugging information."""

    def __init__(self, binary: Path) -> None:
        self._binary = binary
        self._known: dict[int, list[str]] = {}

    def look_up(self, pcs: set[int]) -> None:
        """Of many at once, which is much faster."""
        tool, missing = shutil.which("addr2line"), sorted(pcs - self._known.keys())
        if tool is None or not missing:
            return
        command = [tool, "-a", "-i", "-e", str(self._binary)]
        text = "\n".join(map(hex, missing))
        output = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
        for line in output.splitlines():
            if line.startswith("0x"):
                current = self._known.setdefault(int(line, 16), [])
            else:  # inlined functions: the innermost first
                current.append(re.sub(r" \(discriminator \d+\)", "", line))

    def __call__(self, pcs: list[int]) -> str:
        """The innermost one that is a kernel's, as file:line; pcs: an instruction and the calls that led to it."""
        self.look_up(set(pcs))
        for pc in pcs:
            for place in self._known.get(pc, []):
                if not any(part in place for part in EMULATOR) and not place.startswith("?"):
                    return place.rpartition("/")[2]
        return "?"


def named(launches: list[dict[str, Any]], lines: Lines) -> list[dict[str, Any]]:
    """Launches as the tracer writes them, requests of shared memory by source line and kind.

    Raises:
        RuntimeError: memory that has no name was accessed.
    """
    lines.look_up({pc for launch in launches for site in launch["shared"] for pc in site["pcs"]})
    for launch in launches:
        elsewhere = launch.pop("elsewhere")
        if elsewhere["accesses"]:
            raise RuntimeError(
                f"{launch['kernel']}: expected accesses to named memory alone, got {elsewhere['accesses']} to other, "
                f"the first at {lines(elsewhere['pcs'])}"
            )
        sites: dict[tuple[str, str, int], dict[str, Any]] = {}
        for site in launch["shared"]:
            line = lines(site.pop("pcs"))
            into = sites.setdefault((line, site["kind"], site["bytes"]), {"line": line, **dict.fromkeys(site, 0)})
            into |= {"kind": site["kind"], "bytes": site["bytes"]}
            for name in ("requests", "lane_bytes", "wavefronts", "ideal_wavefronts"):
                into[name] += site[name]
            by_ways = into["by_ways"] or [0] * len(site["by_ways"])
            into["by_ways"] = [a + b for a, b in zip(by_ways, site["by_ways"], strict=True)]
        launch["shared"] = [
            {**site, "by_ways": {ways: n for ways, n in enumerate(site["by_ways"]) if n}} for site in sites.values()
        ]
    return launches


class Trace:
    """Counts launches of a tracing build."""

    def __init__(self, module: str) -> None:
        self._library = ctypes.CDLL(module)
        self._library.emulation_trace_name.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t]
        self._library.emulation_trace_name.restype = ctypes.c_bool
        self._library.emulation_trace_stop.restype = ctypes.c_char_p
        self._lines = Lines(Path(module))

    def count(self, function: Callable[[], None], buffers: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """What the launches of `function` do; `buffers`: all that they access, contiguous, by name.

        Raises:
            ValueError: a buffer overlaps another one, or begins in the middle of 32 bytes.
            RuntimeError: as `named`.
        """
        self._library.emulation_trace_start()
        try:
            for name, tensor in buffers.items():
                if not self._library.emulation_trace_name(name.encode(), tensor.data_ptr(), tensor.nbytes):
                    raise ValueError(
                        f"buffers: expected memory of its own from a multiple of 32 bytes on, got {tensor.nbytes} "
                        f"bytes at {tensor.data_ptr():#x} for {name}"
                    )
            function()
        finally:
            text = self._library.emulation_trace_stop()
        return named(json.loads(text), self._lines)
