"""Builds greedynas_ext._cuda for the host: the sources that nvcc compiles, with the emulation in place of CUDA."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pybind11

FOLDER = Path(__file__).parent
CSRC = FOLDER.parents[1] / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
COMMAND = [str(COMPILER), "-std=c++20", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
COMMAND += [f"-I{path}" for path in (CSRC, CSRC / "cuda", FOLDER)]

# Of a tracing build (trace/trace.cpp): the compiler has to leave accesses apart and in their order.
TRACE = ["-DEMULATION_TRACE", "-fsanitize=thread", "-Wno-tsan", "-g1"]
TRACE += [
    f"-fno-{pass_}"
    for pass_ in (
        *("tree-vectorize", "tree-loop-distribute-patterns", "store-merging"),
        *("reorder-blocks", "reorder-blocks-and-partition", "crossjumping", "tree-tail-merge"),
    )
]


def compile_tracer(folder: Path) -> Path:
    """What a tracing build is linked with in place of the thread sanitizer."""
    target = folder / "trace.o"
    source = FOLDER / "trace" / "trace.cpp"
    subprocess.run([*COMMAND, "-DEMULATION_TRACE", "-O2", "-c", str(source), "-o", str(target)], check=True)
    return target


def build_traced(folder: Path, max_units: int) -> Path:
    """A tracing build. `max_units`: kMaxUnits (pointwise.cuh)."""
    return build(folder, [*TRACE, f"-DGREEDYNAS_MAX_UNITS={max_units}"], compile_tracer(folder))


def build(folder: Path, flags: list[str], tracer: Path | None = None) -> Path:
    """`folder` with the module in it; two compilers run at a time, the longest files first."""
    command = [*COMMAND, *flags, f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        # Bindings and launches need no speed.
        optimised = "-O2" if source.suffix == ".cu" else "-O0"
        subprocess.run([*command, optimised, "-x", "c++", "-c", str(source), "-o", str(target)], check=True)
        return target

    kernels = sorted((CSRC / "cuda").glob("*.cu"), key=lambda path: path.name != "expand_depthwise.cu")
    sources = [*kernels, *sorted((CSRC / "cuda").glob("*.cpp"))]
    with ThreadPoolExecutor(2) as pool:
        objects = [str(path) for path in pool.map(compile_one, sources)]
    module = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    linked = command if tracer is None else [*COMMAND, str(tracer)]  # without a sanitizer
    subprocess.run([*linked, "-shared", *objects, "-o", str(module)], check=True)
    return folder


def load(folder: Path) -> ModuleType:
    """The module that a build has left in `folder`.

    Raises:
        FileNotFoundError: there is none.
    """
    path = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    # Of modules of one name pybind11 gives the one that was loaded first, from wherever the second one is.
    package = re.sub(r"\W", "_", str(folder.resolve()))
    spec = importlib.util.spec_from_file_location(f"{package}._cuda", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"folder: expected a build in {folder}, got none")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
