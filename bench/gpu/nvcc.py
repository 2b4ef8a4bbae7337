"""Compiles the CUDA kernels with nvcc, as setup.py has them compiled, and reads what ptxas says of each."""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc/cuda"
# Those that take longest come first, so that two compilers end together.
_SLOWEST = ("conv_bn", "expand_depthwise", "finish_map", "project")


def _setup_py() -> ModuleType:
    """setup.py, the one place that knows how kernels are compiled, and for what."""
    spec = importlib.util.spec_from_file_location("greedynas_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


SETUP = _setup_py()
# Compute capabilities as in TORCH_CUDA_ARCH_LIST.
BUILT_FOR: tuple[str, ...] = tuple(SETUP.ARCHITECTURES.split(";"))


@dataclass(frozen=True)
class Resources:
    """What an instantiation of a kernel takes on an architecture.

    Attributes:
        kernel: its name without namespaces and parameters, `project_kernel<PointwiseTile<16, 32, 1>, true>`.
        symbol: the mangled one.
        source: stem of its file.
        architecture: compute capability, "9.0".
        registers: of a thread.
        static_shared: bytes of a block.
        stack: bytes of a thread, spills included.
        threads: of a block, at most.
        least_blocks: of a multiprocessor, as its launch bounds promise; 1 where they say nothing.
    """

    kernel: str
    symbol: str
    source: str
    architecture: str
    registers: int
    static_shared: int
    stack: int
    threads: int
    least_blocks: int


@dataclass(frozen=True)
class Compiled:
    """All kernels.

    Attributes:
        folder: with, for each source, an object `<stem>.o` and a folder `<stem>` of what came on the way.
        resources: of every instantiation on every architecture.
        seconds: of a compiler by source and architecture; "host" for what is compiled once.
    """

    folder: Path
    resources: list[Resources]
    seconds: dict[tuple[str, str], float]

    def cubin(self, source: str, architecture: str) -> Path:
        digits = architecture.replace(".", "")
        found = sorted((self.folder / source).glob(f"*_{digits}.cubin"))
        return found[0] if found else self.folder / source / f"{source}.cubin"


def sources() -> list[Path]:
    """Every CUDA file, those first that take longest."""
    return sorted(KERNELS.glob("**/*.cu"), key=lambda path: (path.stem not in _SLOWEST, path.stem))


def compile_kernels(architectures: Sequence[str], folder: Path, *, jobs: int = 2) -> Compiled:
    """Compiles every kernel for `architectures`; raises RuntimeError with what nvcc says of the first that fails."""
    nvcc = SETUP.find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc: expected on PATH or under CUDA_HOME/bin, found none")
    command = [nvcc, *SETUP.NVCC_FLAGS, "-Xptxas", "-v", "-I", str(ROOT / "csrc"), "-I", str(KERNELS)]
    command += SETUP.gencode(architectures)

    def compile_one(source: Path) -> tuple[list[Resources], dict[tuple[str, str], float]]:
        kept = folder / source.stem
        kept.mkdir(parents=True, exist_ok=True)
        target = folder / f"{source.stem}.o"
        times = kept / "times.csv"
        times.unlink(missing_ok=True)  # nvcc appends
        options = ["--keep", "--keep-dir", str(kept), "--time", str(times), "-c", str(source), "-o", str(target)]
        done = subprocess.run([*command, *options], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{source.name}: nvcc failed:\n{complaints(done.stdout + done.stderr)}")
        bounds: dict[tuple[str, str], tuple[int, int]] = {}
        for ptx in kept.glob("*.ptx"):
            bounds |= launch_bounds(ptx.read_text(), architectures)
        return read_ptxas(done.stderr, source.stem, bounds), read_times(times.read_text(), source.stem)

    resources: list[Resources] = []
    seconds: dict[tuple[str, str], float] = {}
    with ThreadPoolExecutor(jobs) as pool:
        for found, times in pool.map(compile_one, sources()):
            resources += found
            seconds |= times
    return Compiled(folder, resources, seconds)


def complaints(said: str) -> str:
    """What nvcc says without what `ptxas -v` does, but for kernels with a stack."""
    kept, function = [], ""
    for line in said.splitlines():
        if "Function properties for" in line:
            function = line.split()[-1]
        elif "bytes stack frame" in line:
            if not line.strip().startswith("0 bytes stack frame"):
                kept.append(f"{demangled([function])[0]}: {line.strip()}")
        elif not line.startswith("ptxas info"):
            kept.append(line)
    return "\n".join(kept)


def read_ptxas(said: str, source: str, bounds: dict[tuple[str, str], tuple[int, int]]) -> list[Resources]:
    """Of `ptxas -v`; `bounds` are those of launch_bounds(), by symbol and digits of the architecture."""
    found = []
    for part in re.split(r"Compiling entry function ", said)[1:]:
        head = re.match(r"'(\w+)' for 'sm_(\d+)\w*'", part)
        stack = re.search(r"(\d+) bytes stack frame", part)
        used = re.search(r"Used (\d+) registers", part)
        if head is None or stack is None or used is None:
            raise ValueError(f"ptxas: expected registers and stack of a kernel, got {part[:300]!r}")
        shared = re.search(r"(\d+) bytes smem", part)
        symbol, digits = head.groups()
        threads, least = bounds[symbol, digits]
        found.append(
            Resources(
                kernel=symbol,
                symbol=symbol,
                source=source,
                architecture=f"{digits[:-1]}.{digits[-1]}",
                registers=int(used[1]),
                static_shared=int(shared[1]) if shared else 0,
                stack=int(stack[1]),
                threads=threads,
                least_blocks=least,
            )
        )
    names = demangled([entry.symbol for entry in found])
    return [Resources(**{**vars(entry), "kernel": name}) for entry, name in zip(found, names, strict=True)]


def launch_bounds(ptx: str, architectures: Sequence[str]) -> dict[tuple[str, str], tuple[int, int]]:
    """Threads of a block and blocks of a multiprocessor of the kernels in PTX.

    By symbol and digits of the architecture, for all of `architectures` that are compiled from it.
    """
    target = re.search(r"^\.target sm_(\d+)", ptx, re.MULTILINE)
    if target is None:
        raise ValueError("ptx: expected a target, found none")
    served = [
        architecture.removesuffix("+PTX").replace(".", "")
        for architecture in architectures
        if SETUP.ptx_of(architecture, architectures).replace(".", "") == target[1]
    ]
    found: dict[tuple[str, str], tuple[int, int]] = {}
    for symbol, header in re.findall(r"\.entry\s+(\w+)\s*\((?:[^{]*?)\)([^{]*)\{", ptx):
        threads = re.search(r"\.maxntid\s+([\d, ]+)", header)
        least = re.search(r"\.minnctapersm\s+(\d+)", header)
        if threads is None:
            raise ValueError(f"{symbol}: expected __launch_bounds__, found none")
        count = 1
        for extent in threads[1].replace(",", " ").split():
            count *= int(extent)
        found |= {(symbol, digits): (count, int(least[1]) if least else 1) for digits in served}
    return found


def read_times(table: str, source: str) -> dict[tuple[str, str], float]:
    """Seconds by source and architecture, of what `nvcc --time` wrote."""
    rows = list(csv.reader(line for line in table.splitlines() if line.strip()))
    columns = [name.strip() for name in rows[0]]
    seconds: dict[tuple[str, str], float] = {}
    for row in rows[1:]:
        entry = dict(zip(columns, (value.strip() for value in row), strict=False))
        digits = re.search(r"\d+", entry["arch"])
        where = f"{digits[0][:-1]}.{digits[0][-1]}" if digits else "host"
        scale = {"ms": 1e-3, "s": 1.0, "us": 1e-6}[entry["unit"]]
        seconds[source, where] = seconds.get((source, where), 0.0) + float(entry["metric"]) * scale
    return seconds


def demangled(symbols: Sequence[str]) -> list[str]:
    """Names of kernels without namespaces and parameters."""
    if not symbols:
        return []
    filter_ = os.environ.get("CXXFILT", "c++filt")
    lines = subprocess.run([filter_], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    return [short_name(line) for line in lines.splitlines()]


def short_name(name: str) -> str:
    """Without namespaces, return type and parameters."""
    for prefix in ("(anonymous namespace)::", "greedynas::cuda::", "expand::"):
        name = name.replace(prefix, "")
    name = name.removeprefix("void ")
    depth = 0
    for at, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            return name[:at]
    return name
