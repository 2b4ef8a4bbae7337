"""Builds the native parts of greedynas_ext; what they are made of is in pyproject.toml's neighbour, csrc/.

`greedynas_ext._ops`: the operations, registered with torch through its stable ABI, and the evaluation of chains, which
is no operation on tensors and bound with pybind11.
`greedynas_ext._plan`: the path plan, bound with pybind11.
`greedynas_ext._cuda`: evaluation of chains on a GPU, bound with pybind11; built where a GPU is, or on request.

FORCE_CUDA=1 builds the CUDA part without a GPU at hand (and fails without nvcc), FORCE_CUDA=0 never builds it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent

# Where no GPU says for which: all that the kernels can run on.
ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0;10.0+PTX;12.0"
# Kernels tell these from the older one nowhere: PTX, which takes two thirds of the time, is written once for all.
SAME_PTX = {"8.6": "8.0", "8.9": "8.0", "12.0": "10.0"}
NVCC_FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Werror", "all-warnings", "-Xptxas", "-warn-spills"]


@dataclass(frozen=True)
class CudaDecision:
    """Whether the CUDA part is built, and why."""

    build: bool
    reason: str


def decide_cuda(environment: Mapping[str, str], *, nvcc: str | None, torch_has_cuda: bool, gpu: bool):
    """The one place that decides; raises SystemExit where FORCE_CUDA=1 asks for the impossible."""
    force = environment.get("FORCE_CUDA", "")
    if force not in ("", "0", "1"):
        raise SystemExit(f"FORCE_CUDA: expected 0 or 1, got {force!r}")
    if force == "0":
        return CudaDecision(False, "FORCE_CUDA=0")
    if force == "1":
        if nvcc is None:
            raise SystemExit("FORCE_CUDA=1: expected nvcc on PATH or under CUDA_HOME/bin, found none")
        if not torch_has_cuda:
            raise SystemExit("FORCE_CUDA=1: expected a CUDA build of torch, got a CPU build")
    if force == "1":
        return CudaDecision(True, "FORCE_CUDA=1")
    if nvcc is None:
        return CudaDecision(False, "no nvcc found")
    if not torch_has_cuda:
        return CudaDecision(False, "torch is a CPU build")
    if not gpu:
        return CudaDecision(False, "no GPU found; FORCE_CUDA=1 builds without one")
    return CudaDecision(True, f"{nvcc} and a GPU found")


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    if home and (Path(home) / "bin/nvcc").exists():
        return str(Path(home) / "bin/nvcc")
    return shutil.which("nvcc")


def cuda_home(nvcc: str) -> str:
    """The folder that holds include/cuda_runtime.h; where nvcc lies may be a link or a wrapper elsewhere."""
    lines = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    tops = [line.split("TOP=")[1].strip() for line in lines.splitlines() if "TOP=" in line]
    for candidate in [*tops, Path(nvcc).resolve().parent.parent, "/usr/local/cuda"]:
        if (Path(candidate) / "include/cuda_runtime.h").exists():
            return str(Path(candidate).resolve())
    raise SystemExit(f"CUDA_HOME: expected the folder that holds include/cuda_runtime.h beside {nvcc}, found none")


def ptx_of(architecture: str, architectures: Sequence[str]) -> str:
    """The compute capability for which nvcc writes the PTX of `architecture`, one of those to be built."""
    built = [element.removesuffix("+PTX") for element in architectures]
    same = SAME_PTX.get(architecture)  # where PTX itself is asked for, it is its own
    return same if same in built else architecture.removesuffix("+PTX")


def gencode(architectures: Sequence[str]) -> list[str]:
    """Options of nvcc for `architectures`, written as in TORCH_CUDA_ARCH_LIST."""
    codes: dict[str, list[str]] = {}
    for architecture in architectures:
        digits = architecture.removesuffix("+PTX").replace(".", "")
        wanted = codes.setdefault(ptx_of(architecture, architectures).replace(".", ""), [])
        wanted += [f"sm_{digits}", f"compute_{digits}"] if architecture.endswith("+PTX") else [f"sm_{digits}"]
    options = [f"arch=compute_{ptx},code=[{','.join(wanted)}]" for ptx, wanted in codes.items()]
    return [part for option in options for part in ("-gencode", option)]


def main() -> None:
    import pybind11
    import torch
    from setuptools import Extension, setup

    decision = decide_cuda(
        os.environ,
        nvcc=find_nvcc(),
        torch_has_cuda=torch.version.cuda is not None,
        gpu=torch.cuda.is_available(),
    )
    print(f"greedynas_ext: CUDA part {'built' if decision.build else 'left out'}: {decision.reason}", flush=True)

    flags = ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra", "-Werror"]
    if decision.build:  # torch looks at it when its module is imported
        os.environ.setdefault("CUDA_HOME", cuda_home(find_nvcc()))
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension, include_paths

    # Warnings in torch's own headers are not ours to mend.
    system_headers = [flag for path in include_paths() for flag in ("-isystem", path)]

    def sources(*patterns: str) -> list[str]:
        return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))

    headers = sources("csrc/*.h", "csrc/cpu/*.h", "csrc/cpu/kernels/**/*.h")
    ops = CppExtension(
        "greedynas_ext._ops",
        sources("csrc/registration.cpp", "csrc/checks.cpp", "csrc/cpu/*.cpp"),
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        depends=headers,
        extra_compile_args={"cxx": [*flags, *system_headers, "-DTORCH_TARGET_VERSION=0x020d000000000000"]},
    )
    plan = Extension(
        "greedynas_ext._plan",
        sources("csrc/path_plan.cpp", "csrc/python_module.cpp"),
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        depends=headers,
        extra_compile_args={"cxx": flags},
        language="c++",
    )

    modules = [ops, plan]
    if decision.build:
        chosen = torch.cuda.is_available() or "TORCH_CUDA_ARCH_LIST" in os.environ
        nvcc_flags = NVCC_FLAGS + ([] if chosen else gencode(ARCHITECTURES.split(";")))
        modules.append(
            CUDAExtension(
                "greedynas_ext._cuda",
                sources("csrc/cuda/*.cu", "csrc/cuda/*.cpp"),
                include_dirs=[str(ROOT / "csrc"), str(ROOT / "csrc/cuda"), pybind11.get_include()],
                depends=[*headers, *sources("csrc/cuda/*.h", "csrc/cuda/*.cuh")],
                extra_compile_args={"cxx": flags, "nvcc": nvcc_flags},
            )
        )

    class Build(BuildExtension):
        """Keeps what was decided beside the modules, for `python -m greedynas_ext.info`."""

        def run(self) -> None:
            super().run()
            info = {"torch": torch.__version__, "cuda": asdict(decision), "flags": flags}
            folder = ROOT / "greedynas_ext" if self.inplace else Path(self.build_lib) / "greedynas_ext"
            (folder / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")

    setup(ext_modules=modules, cmdclass={"build_ext": Build})


if __name__ == "__main__":
    main()
