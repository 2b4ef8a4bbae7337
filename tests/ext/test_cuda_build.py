"""The extension with its CUDA part, built without a GPU at hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import torch
from greedynas_ext import _library, evaluate_paths
from greedynas import Supernet, get_space

assert _library.cuda_available()
module = _library.require_cuda()
assert module.kernels.bf16.pointwise_units(1000) > 0
supernet = Supernet(get_space("mini-16"))
images, targets = torch.randn(4, 1, 8, 8), torch.arange(4)
paths = torch.zeros(1, len(supernet.choices), dtype=torch.int64)
assert evaluate_paths(supernet, paths, images, targets, fused=True).losses.isfinite().all()
try:
    supernet.cuda()
except (RuntimeError, AssertionError) as error:
    print("torch:", str(error).splitlines()[0])
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_built_for_two_architectures_it_works_without_a_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0;9.0"}
    folders = ["--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")]
    built = subprocess.run(
        [sys.executable, "setup.py", "build_ext", *folders], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout[-4000:] + built.stderr[-4000:]
    package = tmp_path / "lib/greedynas_ext"
    assert any(path.name.startswith("_cuda") for path in package.iterdir())
    for source in (ROOT / "greedynas_ext").glob("*.py"):
        (package / source.name).write_bytes(source.read_bytes())
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "lib"), str(ROOT / "python")])
    ran = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("torch: ")
