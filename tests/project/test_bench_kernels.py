"""The benchmarks of single operations run, and check what they compute."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def pytest_of(*arguments):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    # Where these tests are run by pytest-xdist, pytest-benchmark would take the inner ones for its workers' too.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)


def test_each_runs_once():
    done = pytest_of("bench/kernels", "--benchmark-disable", "-rA", "-q")
    assert done.returncode == 0, done.stdout[-3000:]
    for name in ("test_path_cross_entropy", "test_select_top_k", "test_mixed_op", "test_packing", "test_chain"):
        for by in ("ops", "torch") if name != "test_chain" else ("prepared", "torch"):
            assert any(name in line and by in line for line in done.stdout.splitlines()), (name, by)


def test_a_group_holds_the_kernel_and_plain_torch():
    quick = ("--benchmark-only", "--benchmark-min-rounds=1", "--benchmark-max-time=0.01", "--benchmark-warmup=off")
    done = pytest_of("bench/kernels/test_losses.py", *quick, "--benchmark-group-by=group", "-k", "top_k and 1000-5")
    assert done.returncode == 0, done.stdout[-3000:]
    assert "benchmark 'select_top_k, 5 of 1000': 2 tests" in done.stdout
