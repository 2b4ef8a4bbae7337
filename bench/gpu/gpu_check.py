"""All that a GPU can tell about this build, in one file to send back: tests, compute-sanitizer, times.

Run: make gpu-check     (a quarter of an hour; python bench/gpu/gpu_check.py [--output FILE.json] [--quick] [--dry-run])

1. The tests of the kernels (tests/emulation, less those of the emulation itself) on the GPU.
2. The same under compute-sanitizer's memcheck, racecheck, synccheck and initcheck, to the first failure.
3. Each kernel by itself (gpu_kernels.py), and `evaluate_paths` against PyTorch's loops, eager and compiled per
   block (gpu.py): 10 paths, 1,000 images of 224x224.

--quick leaves out compute-sanitizer and torch.compile. --dry-run needs no GPU: it says what would be run, and runs the
tests under emulation.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from greedynas_ext import _library
from greedynas_ext.bench.measure import machine
from greedynas_ext.strict_json import write_json

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
_OF_THE_EMULATION = ("test_emulator.py", "test_sanitized.py", "test_trace.py")
_TESTS = [
    *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/emulation"),
    *(f"--ignore=tests/emulation/{name}" for name in _OF_THE_EMULATION),
]


@dataclass(frozen=True)
class Step:
    """A command, and where its JSON comes from.

    Attributes:
        name: of the step.
        command: its arguments.
        seconds: after which it is given up.
        result: a file that it writes.
        environment: beside this process's.
    """

    name: str
    command: list[str]
    seconds: int
    result: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)


def steps(folder: Path, quick: bool) -> list[Step]:
    """What is run on a GPU."""
    on_gpu = {"GREEDYNAS_TEST_CUDA": "1"}
    result = [Step("tests", _TESTS, 900, environment=on_gpu)]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is not None and not quick:
        result += [
            Step(tool, [sanitizer, "--tool", tool, "--error-exitcode", "9", *_TESTS, "-x"], 1200, environment=on_gpu)
            for tool in SANITIZERS
        ]
    python = sys.executable
    kernels, losses = folder / "kernels.json", folder / "losses.json"
    result.append(Step("kernels", [python, "bench/gpu/gpu_kernels.py", "--output", str(kernels)], 600, kernels))
    compiled = [] if quick else ["--compile"]
    command = [python, "bench/gpu/gpu.py", *compiled, "--output", str(losses)]
    result.append(Step("evaluate_paths", command, 3600, losses))
    return result


def run(step: Step) -> dict[str, Any]:
    """Exit status (None: given up), seconds, the end of what it printed, and its JSON."""
    print(f"== {step.name}: {' '.join(step.command)}", flush=True)
    since = time.perf_counter()
    try:
        done = subprocess.run(
            step.command,
            cwd=ROOT,
            env={**os.environ, **step.environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=step.seconds,
        )
        status, output = done.returncode, done.stdout
    except subprocess.TimeoutExpired as error:
        status, output = None, (error.stdout or b"").decode(errors="replace")
    print(output[-2000:], flush=True)
    content = None
    if step.result is not None and step.result.is_file():
        content = json.loads(step.result.read_text(encoding="utf-8"))
    return {
        "command": step.command,
        "status": status,
        "seconds": time.perf_counter() - since,
        "output": output[-20000:],
        "result": content,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu-check.json"), help="the file to send back")
    parser.add_argument("--quick", action="store_true", help="no compute-sanitizer, no torch.compile")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: what would be run; tests emulated")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        planned = steps(Path(folder), options.quick)
        if options.dry_run:
            for step in planned:
                print(f"{step.name}: {' '.join(step.command)}")
            planned = [Step("tests under emulation", _TESTS, 1800)]
        else:
            if not torch.cuda.is_available():
                parser.error("expected a GPU, found none (--dry-run needs none)")
            if not _library.cuda_available():
                parser.error(
                    "expected the CUDA part to be built; `pip install --no-build-isolation -e .` builds it where "
                    "nvcc is found"
                )
        results = {step.name: run(step) for step in planned}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    write_json(options.output, {"machine": {**machine(), "gpu": gpu, "cuda": torch.version.cuda}, "steps": results})
    failed = [name for name, result in results.items() if result["status"] != 0]
    print(f"{options.output}: {'all passed' if not failed else 'failed: ' + ', '.join(failed)}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
