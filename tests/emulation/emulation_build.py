"""Builds greedynas_ext._cuda for the host: the sources that nvcc compiles, with the emulation in place of CUDA."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

FOLDER = Path(__file__).parent
CSRC = FOLDER.parents[1] / "csrc"
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def build(folder: Path, flags: list[str]) -> Path:
    """`folder` with the module in it; two compilers run at a time, the longest files first."""
    includes = [CSRC, CSRC / "cuda", FOLDER, pybind11.get_include(), sysconfig.get_paths()["include"]]
    command = [str(COMPILER), "-std=c++20", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *flags]
    command += [f"-I{path}" for path in includes]

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
    subprocess.run([*command, "-shared", *objects, "-o", str(module)], check=True)
    return folder
