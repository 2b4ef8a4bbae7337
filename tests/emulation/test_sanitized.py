"""All CUDA kernels, and the chain that drives them, emulated under the sanitizers; and whether it is all of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from emulation_build import COMPILER, FOLDER, build
from launches import covering

OF_THE_EMULATION = ("test_emulator", "test_sanitized", "test_trace")
ALL = sorted(path.name for path in FOLDER.glob("test_*.py") if path.stem not in OF_THE_EMULATION)
# What hosts never launch there: maps in bfloat16, and what takes more than 64 KB of shared memory (pointwise_tile.cuh,
# finish_map.cuh).
NOT_BEFORE_SM80 = (
    r"BFloat16",
    r"PointwiseTile<(64|80|96), 64, 1>|PointwiseTile<192, 32, 2>",
    r"moments_kernel<Half, (9|10|11|12), \(Pass\)[12]>|moments_kernel<Half, 14, ",
)
# Of branches that few tests take: warps that write one word at once.
TOGETHER = "test_path_cross_entropy.py::test_targets_out_of_range[-100-300]"
ADDRESS = ["-g1", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
THREAD = ["-g1", "-w", "-fsanitize=thread"]


def library(name: str) -> str:
    return subprocess.run(
        [str(COMPILER), f"-print-file-name={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()


def run_tests(folder: Path, preloaded: list[str], options: dict[str, str], arguments: list[str]) -> str:
    """Runs tests with the module in `folder`; Python itself knows nothing of sanitizers, so they come before it."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", *arguments]
    # The thread sanitizer knows fewer address layouts than kernels do.
    fixed_layout = ["setarch", "-R"]
    if shutil.which("setarch") and subprocess.run([*fixed_layout, "true"], capture_output=True).returncode == 0:
        command = [*fixed_layout, *command]
    environment = {name: value for name, value in os.environ.items() if name != "GREEDYNAS_TEST_CUDA"}
    # Torch's own threads are of no interest, and nobody told the sanitizers how they wait for each other.
    environment |= {"CUDA_KERNELS": str(folder), "LD_PRELOAD": " ".join(preloaded), "OMP_NUM_THREADS": "1", **options}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=FOLDER)
    if "unexpected memory mapping" in result.stderr:
        pytest.skip(
            "this kernel's address layout is not one that the thread sanitizer knows (unexpected memory mapping)"
        )
    assert result.returncode == 0, result.stdout[-10000:] + result.stderr[-10000:]
    return result.stdout


@pytest.fixture(scope="module")
def launched(built: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Which kernels the tests of `make test` launch (launches.Record)."""
    assert built.__file__
    target = tmp_path_factory.mktemp("launched") / "launches.json"
    run_tests(Path(built.__file__).parent, [], {"EMULATION_LAUNCHES": str(target)}, ["-m", "not slow", *ALL])
    return json.loads(target.read_text())


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_every_instantiation_is_executed(launched: Any) -> None:
    executed = {tuple(kernel) for test in launched["tests"].values() for kernel in test["kernels"]}
    assert launched["kernels"]
    assert [name for name in launched["kernels"] if (name, 800) not in executed] == []
    older = [name for name in launched["kernels"] if not any(re.search(part, name) for part in NOT_BEFORE_SM80)]
    assert [name for name in older if (name, 750) not in executed] == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    build(tmp_path, ADDRESS)
    # Elsewhere threads run forward; the thread sanitizer does not depend on their order.
    options = {"ASAN_OPTIONS": "detect_leaks=0", "EMULATION_ORDER": "random"}
    out = run_tests(tmp_path, [library("libasan.so"), library("libstdc++.so")], options, ["-m", "not slow", *ALL])
    assert " passed" in out


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_under_thread_sanitizer(launched: Any, tmp_path: Path) -> None:
    build(tmp_path, THREAD)
    options = {"TSAN_OPTIONS": "halt_on_error=1 history_size=4 ignore_noninstrumented_modules=1"}
    # Every instantiation; fibers are expensive for the thread sanitizer.
    names = [name.removeprefix("tests/emulation/") for name in covering(launched["tests"])]  # they run in this folder
    tests = sorted({*names, TOGETHER})
    out = run_tests(tmp_path, [library("libtsan.so"), library("libstdc++.so")], options, tests)
    assert f"{len(tests)} passed" in out
