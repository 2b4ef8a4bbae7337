"""Which kernels an emulated module has, and which of them have been launched.

Every function of a module whose name ends in _kernel is an instantiation that nvcc builds too: the sources are the
same, and no kernel is called but by a launch.
"""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
from pathlib import Path
from typing import Any

_KERNEL = re.compile(r"([0-9a-f]+) [tTwW] (?:void )?(\w+_kernel(?:<.*>)?\(.*\))")
_KNOWN = "_ZN3emu3cfgE"  # a variable that every module has


def instantiations(module: str) -> dict[int, str]:
    """By address in the file: the names of all kernels, with their template arguments."""
    symbols = subprocess.run(["nm", "-C", "--defined-only", module], check=True, capture_output=True, text=True).stdout
    found = {}
    for line in symbols.splitlines():
        for name in ("greedynas::cuda::", "(anonymous namespace)::", "expand::"):
            line = line.replace(name, "")
        match = _KERNEL.fullmatch(line)
        if match:
            found[int(match[1], 16)] = match[2]
    return found


class Launches:
    """Of the emulated module in a file.

    Attributes:
        kernels: by address in the file, the names of all.
    """

    def __init__(self, module: str) -> None:
        self.kernels = instantiations(module)
        self._library = ctypes.CDLL(module)
        self._library.emulation_executed_kernel.restype = ctypes.c_void_p
        symbols = subprocess.run(["nm", "--defined-only", module], check=True, capture_output=True, text=True).stdout
        known = next(int(line.split()[0], 16) for line in symbols.splitlines() if line.endswith(f" {_KNOWN}"))
        self._base = ctypes.addressof(ctypes.c_char.in_dll(self._library, _KNOWN)) - known

    def forget(self) -> None:
        """What has been launched."""
        self._library.emulation_forget_executed()

    def executed(self) -> set[tuple[str, int]]:
        """Kernels launched since, each with the architecture that the device had (750, 800)."""
        arch = ctypes.c_int()
        found = set()
        for i in range(self._library.emulation_executed_count()):
            address = self._library.emulation_executed_kernel(ctypes.c_size_t(i), ctypes.byref(arch))
            found.add((self.kernels[address - self._base], arch.value))
        return found


class Record:
    """Of what each test launched, for a file.

    Attributes:
        launches: of the module that is tested.
    """

    def __init__(self, module: str) -> None:
        self.launches = Launches(module)
        self._of_tests: dict[str, dict[str, object]] = {}

    def add(self, test: str, seconds: float) -> None:
        """What has been launched since the last one."""
        executed = sorted(self.launches.executed())
        self.launches.forget()
        if executed:
            self._of_tests[test] = {"seconds": seconds, "kernels": executed}

    def write(self, target: Path) -> None:
        """All of it, and the names of all kernels."""
        content = {"kernels": sorted(set(self.launches.kernels.values())), "tests": self._of_tests}
        scratch = target.with_suffix(".tmp")
        scratch.write_text(json.dumps(content, indent=1))
        scratch.replace(target)


def covering(tests: dict[str, dict[str, Any]]) -> list[str]:
    """Of a record's tests some that launch every kernel that any launches, on each architecture, in little time."""
    left = {tuple(kernel) for test in tests.values() for kernel in test["kernels"]}
    chosen = []
    while left:

        def seconds_for_each(name: str, left: set[Any] = left) -> float:
            new = sum(tuple(kernel) in left for kernel in tests[name]["kernels"])
            return float(tests[name]["seconds"]) / new if new else float("inf")

        best = min(sorted(tests), key=seconds_for_each)
        chosen.append(best)
        left -= {tuple(kernel) for kernel in tests[best]["kernels"]}
    return chosen
