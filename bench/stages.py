"""How near the kernels of an inverted bottleneck come to what one core can do, stage by stage.

Run: python bench/stages.py

Compiles stages.cpp with the kernels and measures, in one process, the ceilings (multiply-accumulates from registers in
float32, and where there are such instructions in half precision and by matrix tiles; bytes read from memory) and, for
shapes of `mbv2-7`, the three stages: expand_depthwise, project, finish (last BatchNorm, residual, moments).
Products of AVX512-BF16 are taken to be twice as many a second as float32's.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from pathlib import Path

CPU = Path(__file__).resolve().parents[1] / "csrc/cpu"


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    flags = Path("/proc/cpuinfo").read_text()
    width = 64 if "avx512f" in flags else 32 if "avx2" in flags else 16
    compiler = [os.environ.get("CXX", "g++"), "-O3", "-std=c++20", "-fno-math-errno", f"-I{CPU}", f"-I{CPU.parent}"]
    with tempfile.TemporaryDirectory() as folder:
        builds = []
        objects = []
        kernels = [*sorted(CPU.glob("kernels_*.cpp")), CPU / "capability.cpp"]
        ours = ["-march=native", f"-DGREEDYNAS_BENCH_VECTOR_BYTES={width}"]
        for source, extra in [*((kernel, []) for kernel in kernels), (Path(__file__).with_suffix(".cpp"), ours)]:
            objects.append(f"{folder}/{source.stem}.o")
            builds.append(subprocess.Popen([*compiler, *extra, "-c", str(source), "-o", objects[-1]]))
        for build in builds:
            if build.wait() != 0:
                raise SystemExit("the benchmark could not be compiled")
        program = f"{folder}/stages"
        subprocess.run([*compiler, *objects, "-o", program], check=True)
        subprocess.run([program], check=True)


if __name__ == "__main__":
    main()
