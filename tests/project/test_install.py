"""The package is built from its sdist, installs into other environments, and works there; with an older torch too.

WHEEL=file takes a wheel that was built before.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
USE = """
import torch, greedynas, greedynas_ext
from greedynas_ext import evaluate_paths
assert {place!r} in greedynas.__file__ and {place!r} in greedynas_ext.__file__, greedynas.__file__
supernet = greedynas.Supernet(greedynas.get_space("mini-16"))
paths = torch.tensor([[0] * 8, [6] * 8])
result = evaluate_paths(supernet, paths, torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]), k=1)
print(result.top_k, result.plan.kernels)
"""
OLDER_TORCH = "2.13.0"
# The operations, the plan, evaluation with all policies, fused chains, supernets that exist.
TESTS = ("ops_contract", "ops_modes", "ops_mixed_op", "ops_path_cross_entropy", "ops_select_top_k", "path_plan")
TESTS += ("evaluate_arguments", "evaluate_policies", "fused_plan", "fused_spaces", "adapt", "adapt_told", "path_filter")
# Building takes some minutes of two cores, and far more beside other work.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


def run(*command: str, folder: Path | str = "/", **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def unpacked_sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of a copy of this checkout, as a clone has it: files that were built here must not slip in."""
    folder = tmp_path_factory.mktemp("sdist")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "source" / name)
    (folder / "source/greedynas_ext/_build_info.json").write_text("{}")  # of an older build in place
    run(sys.executable, "setup.py", "-q", "sdist", "-d", str(folder), folder=folder / "source")
    (archive,) = folder.glob("greedynas_ext-*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


@pytest.fixture(scope="module")
def wheel(request: pytest.FixtureRequest) -> Path:
    """Built from the sdist."""
    if "WHEEL" in os.environ:
        return Path(os.environ["WHEEL"]).resolve()
    unpacked_sdist = request.getfixturevalue("unpacked_sdist")
    dist = unpacked_sdist.parent / "dist"
    run(*PIP, "wheel", "--no-build-isolation", "--no-deps", "-w", str(dist), str(unpacked_sdist))
    (built,) = dist.glob("greedynas_ext-*.whl")
    return built


def test_the_sdist_has_the_sources_and_nothing_that_was_built(unpacked_sdist: Path):
    names = {str(path.relative_to(unpacked_sdist)) for path in unpacked_sdist.rglob("*") if path.is_file()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    wanted = [name for name in tracked if name.startswith(("csrc/", "greedynas_ext/", "python/"))]
    assert set(wanted) <= names
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"} <= names
    assert [name for name in names if name.endswith((".so", ".o", "_build_info.json"))] == []


def test_wheel_in_another_environment(wheel: Path, tmp_path: Path):
    run(sys.executable, "-m", "venv", str(tmp_path / "venv"))
    python = str(tmp_path / "venv/bin/python")
    run(python, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps", str(wheel))
    # The dependencies are those of this environment: a file of paths lends them without its editable install.
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    assert "tensor(" in run(python, "-c", USE.format(place="site-packages"), PYTHONPATH="")
    assert "left out" in run(python, "-m", "greedynas_ext.info", PYTHONPATH="")
    assert "name=mbv2-7-pool-bf16" in run(python, "-m", "greedynas_ext.bench", "--list", PYTHONPATH="")
    assert "train" in run(str(tmp_path / "venv/bin/greedynas"), "--help", PYTHONPATH="")


def test_wheel_from_an_empty_folder(wheel: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    target = str(tmp_path / "target")
    run(*PIP, "install", "-q", "--no-deps", "--target", target, str(wheel))
    printed = run(sys.executable, "-c", USE.format(place=target), folder=tmp_path / "empty", PYTHONPATH=target)
    assert "fused, " in printed


def test_the_same_wheel_with_an_older_torch(wheel: Path, tmp_path: Path):
    """A CPU build of it, without torchvision and what else greedynas needs, and greedynas_ext's own tests."""
    run(sys.executable, "-m", "venv", str(tmp_path / "venv"))
    python = str(tmp_path / "venv/bin/python")
    requirements = [f"torch=={OLDER_TORCH}", "numpy", "sortedcontainers", "hypothesis", "pytest", "pytest-timeout"]
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    installed = subprocess.run([*pip, *requirements], capture_output=True, text=True, cwd="/")
    if installed.returncode:
        pytest.skip(f"torch {OLDER_TORCH} could not be installed: {installed.stderr.strip().splitlines()[-1]}")
    run(*pip, "--no-deps", str(wheel))
    shutil.copytree(ROOT / "tests/ext", tmp_path / "tests/ext", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    info = run(python, "-m", "greedynas_ext.info", PYTHONPATH="")
    assert re.search(rf"^torch +{re.escape(OLDER_TORCH)}", info, flags=re.MULTILINE), info
    assert re.search(r"^operations +loaded$", info, flags=re.MULTILINE), info
    files = [f"tests/ext/test_{name}.py" for name in TESTS]
    printed = run(python, "-m", "pytest", "-m", "not slow", *files, folder=tmp_path, PYTHONPATH="")
    assert re.search(r"\b\d{3,} passed", printed), printed
