"""The sources that know no torch, compiled for 64-bit ARM and run by an emulator: the portable kernels alone."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from native_build import build, run

COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")


@pytest.mark.slow
@pytest.mark.skipif(
    COMPILER is None or EMULATOR is None,
    reason="needs aarch64-linux-gnu-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)",
)
def test_kernels_on_aarch64(tmp_path: Path):
    (program,) = build(tmp_path, ["-O2", "-fno-math-errno", "-static"], ["kernels_main.cpp"], COMPILER)
    *tables, chains, last = run(Path(str(EMULATOR)), str(program), "--quick", timeout=500)
    assert last == "all as expected"
    assert chains == "chains: portable, portable, portable"
    assert [re.sub(r": \d+ cases$", "", line) for line in tables] == ["portable, float", "portable, double"]
