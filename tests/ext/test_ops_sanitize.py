"""The CPU kernels under the address, undefined-behaviour and thread sanitizers, in both instruction sets."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [Path(__file__).with_name("sanitize_main.cpp"), *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    "flags",
    [
        ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
        ["-O1", "-fsanitize=thread", "-DGREEDYNAS_BASELINE_ONLY"],
    ],
    ids=["address and undefined, AVX2", "thread, baseline"],
)
def test_kernels_under_sanitizers(flags: list[str], tmp_path: Path):
    sources = [str(source) for source in SOURCES if source.name != "binding.cpp"]
    command = [str(COMPILER), "-std=c++20", "-Wall", "-Wextra", "-Werror", "-DGREEDYNAS_POISON", "-pthread"]
    binary = tmp_path / "sanitize"
    subprocess.run([*command, *flags, f"-I{ROOT / 'csrc'}", *sources, "-o", str(binary)], check=True)
    run = subprocess.run([binary], capture_output=True, text=True, timeout=120)
    if "unexpected memory mapping" in run.stderr:
        pytest.skip("this kernel's address layout is not one that the thread sanitizer knows")
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "all as expected"
