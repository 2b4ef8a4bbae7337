"""The package installs into another environment, from a wheel, and works there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
USE = """
import torch, greedynas, greedynas_ext
from greedynas_ext import evaluate_paths
assert "site-packages" in greedynas.__file__ and "site-packages" in greedynas_ext.__file__, greedynas.__file__
supernet = greedynas.Supernet(greedynas.get_space("mini-16"))
paths = torch.tensor([[0] * 8, [6] * 8])
print(evaluate_paths(supernet, paths, torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]), k=1).top_k)
"""


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_wheel_in_another_environment(tmp_path):
    # A copy, as a clone has it: built files of this checkout must not slip into the wheel.
    source = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", str(tmp_path / "dist"), str(source))
    (wheel,) = (tmp_path / "dist").glob("greedynas_ext-*.whl")
    run(sys.executable, "-m", "venv", str(tmp_path / "venv"))
    python = str(tmp_path / "venv/bin/python")
    run(python, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", str(wheel))
    # The dependencies are those of this environment: a file of paths lends them without its editable install.
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    assert "tensor(" in run(python, "-c", USE, PYTHONPATH="")
    assert "left out" in run(python, "-m", "greedynas_ext.info", PYTHONPATH="")
    assert "name=mbv2-7-pool-bf16" in run(python, "-m", "greedynas_ext.bench", "--list", PYTHONPATH="")
    assert "train" in run(str(tmp_path / "venv/bin/greedynas"), "--help", PYTHONPATH="")
