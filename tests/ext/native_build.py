"""Builds C++ programs of the sources that know no torch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
CSRC = FOLDER.parents[1] / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
WITH_TORCH = ("binding.cpp", "chain_module.cpp", "torch_threads.cpp")
LIBRARY = [
    CSRC / "path_plan.cpp",
    *(source for source in sorted((CSRC / "cpu").glob("*.cpp")) if source.name not in WITH_TORCH),
]


def build(folder: Path, flags: list[str], mains: list[str], compiler: str | None = COMPILER) -> list[Path]:
    """One program for each of `mains`, in `folder`, the objects beside them; two compilers run at a time."""
    warnings = ["-Wall", "-Wextra", "-Werror"]
    command = [str(compiler), "-std=c++20", "-pthread", *warnings, *flags, f"-I{CSRC}"]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)
        return target

    sources = [*LIBRARY, *(FOLDER / name for name in mains)]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = [str(path) for path in objects[: len(LIBRARY)]]
    programs = []
    for main in objects[len(LIBRARY) :]:
        programs.append(main.with_suffix(""))
        subprocess.run([*command, str(main), *library, "-o", str(programs[-1])], check=True)
    return programs


def run(program: Path, *arguments: str, capability: str | None = None, timeout: float = 300) -> list[str]:
    """The lines that the program prints; it has to succeed. `capability`: None, the machine's best."""
    environment = {name: value for name, value in os.environ.items() if name != "GREEDYNAS_CPU_CAPABILITY"}
    if capability is not None:
        environment["GREEDYNAS_CPU_CAPABILITY"] = capability
    result = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=timeout, env=environment)
    if "unexpected memory mapping" in result.stderr:
        pytest.skip("this kernel's address layout is not one that the thread sanitizer knows")
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return set(found[1].split()) if found else set()


AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
CAPABILITIES: dict[str, set[str]] = {
    "portable": set(),
    "avx2": {"avx2", "fma"},
    "avx512": AVX512,
    "amx": {*AVX512, "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16"},
}


def machine_capabilities() -> list[str]:
    """The values of GREEDYNAS_CPU_CAPABILITY that this machine can do, the best one last."""
    flags = cpu_flags()
    return [name for name, needed in CAPABILITIES.items() if needed <= flags]
