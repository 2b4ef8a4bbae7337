"""How near the kernels of an inverted bottleneck come to what the processor can do, stage by stage.

Run: python bench/stages.py [--threads N ...] [--output FILE.json]

Compiles stages.cpp with the kernels and measures, in one process for each number of threads (default: all cores), the
ceilings (multiply-accumulates from registers in float32, and where there are such instructions in half precision and by
matrix tiles; bytes read from memory; all threads at once) and, for shapes of `mbv2-7`, three stages: expand_depthwise,
project, finish (last BatchNorm, residual, moments), their units shared among the threads as evaluations do it.
Products of AVX512-BF16 are taken to be twice as many a second as float32's.

A stage's multiplications, each kind at its ceiling's rate one after the other, and its maps, read and written once at
the rate of reading from memory, take that long at least: the longer of the two binds, and its share of the time is
printed, with its ceiling's name. Maps that stay in the cache come faster than memory gives them, so that a share of
memory can be more than 100%.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from greedynas_ext.bench.measure import machine
from greedynas_ext.strict_json import write_json

CPU = Path(__file__).resolve().parents[1] / "csrc/cpu"
CORES = len(os.sched_getaffinity(0))
MEMORY = "memory"  # the ceiling that is none of multiplications
UNITS = {MEMORY: "GB/s"}


def compile_program(folder: str) -> str:
    """The path of the compiled stages.cpp.

    Raises:
        SystemExit: it could not be compiled.
    """
    flags = Path("/proc/cpuinfo").read_text()
    width = 64 if "avx512f" in flags else 32 if "avx2" in flags else 16
    compiler = [os.environ.get("CXX", "g++"), "-O3", "-std=c++20", "-pthread", "-fno-math-errno"]
    compiler += [f"-I{CPU}", f"-I{CPU.parent}"]
    own = Path(__file__).with_suffix(".cpp")

    def build(source: Path) -> str:
        extra = ["-march=native", f"-DGREEDYNAS_BENCH_VECTOR_BYTES={width}"] if source == own else []
        target = f"{folder}/{source.stem}.o"
        if subprocess.run([*compiler, *extra, "-c", str(source), "-o", target]).returncode != 0:
            raise SystemExit("the benchmark could not be compiled")
        return target

    with ThreadPoolExecutor(CORES) as pool:
        objects = list(pool.map(build, [*sorted(CPU.glob("kernels_*.cpp")), CPU / "capability.cpp", own]))
    subprocess.run([*compiler, *objects, "-o", f"{folder}/stages"], check=True)
    return f"{folder}/stages"


def binding(stage: dict[str, Any]) -> tuple[str, float]:
    """The ceiling that binds a stage, and what share of the time it leaves no less than."""
    multiplications: dict[str, float] = {}
    memory = 0.0
    for ceiling, seconds in stage["floors"]:
        if ceiling == MEMORY:
            memory += seconds
        else:
            multiplications[ceiling] = multiplications.get(ceiling, 0.0) + seconds
    together = sum(multiplications.values())
    if memory > together:
        return MEMORY, memory / stage["seconds"]
    return max(multiplications, key=lambda name: multiplications[name]), together / stage["seconds"]


def measure(program: str, threads: int) -> dict[str, Any]:
    """Ceilings in 1e9 a second, and the stages of each kernels and block with what binds them."""
    done = subprocess.run([program, str(threads)], check=True, stdout=subprocess.PIPE, text=True)
    ceilings, *blocks = map(json.loads, done.stdout.splitlines())
    for block in blocks:
        for stage in block["stages"].values():
            stage["binding"], stage["share"] = binding(stage)
    return {"threads": threads, "ceilings": ceilings, "blocks": blocks}


def print_table(result: dict[str, Any]) -> None:
    """The ceilings, then a line for each kernels and block."""
    rates = (f"{rate:.4g} {UNITS.get(name, 'GMAC/s')} {name}" for name, rate in result["ceilings"].items())
    print(f"threads {result['threads']}: {', '.join(rates)}")
    names = [f"{name:<29}" for name in result["blocks"][0]["stages"]]
    print(f"{'kernels':<12} {'block':<35}{''.join(names)}".rstrip())
    for b in result["blocks"]:
        shape = f"{b['side']}x{b['side']} {b['in']}->{b['hidden']}->{b['out']} k{b['kernel']} s{b['stride']}"
        stages = [
            f"{1e3 * stage['seconds']:>7.2f} ms {stage['share']:>4.0%} {stage['binding']:<13}"
            for stage in b["stages"].values()
        ]
        print(f"{b['kernels']:<12} {b['images']:>2} of {shape:<29}{''.join(stages)}".rstrip(), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[CORES], metavar="N", help="default: all cores")
    parser.add_argument("--output", type=Path, help="JSON file of everything measured")
    options = parser.parse_args()
    if min(options.threads) < 1:
        parser.error(f"--threads: expected at least 1, got {min(options.threads)}")
    with tempfile.TemporaryDirectory() as folder:
        program = compile_program(folder)
        results = []
        for threads in options.threads:
            results.append(measure(program, threads))
            print_table(results[-1])
    if options.output is not None:
        write_json(options.output, {"command": sys.argv, "machine": machine(), "results": results})


if __name__ == "__main__":
    main()
