"""Whether setup.py builds the CUDA part, and that it says why."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def setup_py() -> ModuleType:
    spec = importlib.util.spec_from_file_location("greedynas_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


FOUND = {"nvcc": "/cuda/bin/nvcc", "torch_has_cuda": True, "gpu": True}


@pytest.mark.parametrize(
    ("force", "changes", "build", "reason"),
    [
        (None, {}, True, "/cuda/bin/nvcc and a GPU found"),
        ("", {}, True, "/cuda/bin/nvcc and a GPU found"),
        ("1", {}, True, "FORCE_CUDA=1"),
        ("1", {"gpu": False}, True, "FORCE_CUDA=1"),
        ("0", {}, False, "FORCE_CUDA=0"),
        ("0", {"nvcc": None, "gpu": False}, False, "FORCE_CUDA=0"),
        (None, {"nvcc": None}, False, "no nvcc found"),
        (None, {"gpu": False}, False, "no GPU found; FORCE_CUDA=1 builds without one"),
        (None, {"torch_has_cuda": False}, False, "torch is a CPU build"),
    ],
)
def test_decision(
    setup_py: ModuleType, force: str | None, changes: dict[str, object], build: bool, reason: str
) -> None:
    environment = {} if force is None else {"FORCE_CUDA": force}
    decision = setup_py.decide_cuda(environment, **{**FOUND, **changes})
    assert (decision.build, decision.reason) == (build, reason)


@pytest.mark.parametrize(
    ("force", "changes", "message"),
    [
        ("1", {"nvcc": None}, "FORCE_CUDA=1: expected nvcc on PATH or under CUDA_HOME/bin, found none"),
        ("1", {"nvcc": None}, "FORCE_CUDA=1: expected nvcc"),
        ("1", {"torch_has_cuda": False}, "FORCE_CUDA=1: expected a CUDA build of torch, got a CPU build"),
        ("yes", {}, "FORCE_CUDA: expected 0 or 1, got 'yes'"),
    ],
)
def test_impossible_wishes(setup_py: ModuleType, force: str, changes: dict[str, object], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        setup_py.decide_cuda({"FORCE_CUDA": force}, **{**FOUND, **changes})


def test_nvcc_under_cuda_home_comes_first(
    setup_py: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for home in ("home", "path"):
        (tmp_path / home / "bin").mkdir(parents=True)
        nvcc = tmp_path / home / "bin/nvcc"
        nvcc.write_text("#!/bin/sh\n")
        nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path/bin"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert setup_py.find_nvcc() == str(tmp_path / "home/bin/nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "elsewhere"))
    assert setup_py.find_nvcc() == str(tmp_path / "path/bin/nvcc")
    monkeypatch.delenv("CUDA_HOME")
    assert setup_py.find_nvcc() == str(tmp_path / "path/bin/nvcc")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup_py.find_nvcc() is None


def test_cuda_home_is_where_the_headers_are(setup_py: ModuleType, tmp_path: Path) -> None:
    """nvcc may be a wrapper elsewhere: what it says about itself, and where it lies, are both followed."""
    home = tmp_path / "toolkit"
    (home / "include").mkdir(parents=True)
    (home / "include/cuda_runtime.h").touch()
    (home / "bin").mkdir()
    real = home / "bin/nvcc"
    real.write_text("#!/bin/sh\n")
    real.chmod(0o755)
    assert setup_py.cuda_home(str(real)) == str(home)
    link = tmp_path / "nvcc-link"
    link.symlink_to(real)
    assert setup_py.cuda_home(str(link)) == str(home)
    wrapper = tmp_path / "nvcc"
    wrapper.write_text(f"#!/bin/sh\necho '#$ TOP={home}' >&2\n")
    wrapper.chmod(0o755)
    assert setup_py.cuda_home(str(wrapper)) == str(home)


def test_cuda_home_without_headers(setup_py: ModuleType, tmp_path: Path) -> None:
    if Path("/usr/local/cuda/include/cuda_runtime.h").exists():
        pytest.skip("a toolkit is installed where everybody looks")
    lonely = tmp_path / "bin/nvcc"
    lonely.parent.mkdir()
    lonely.write_text("#!/bin/sh\n")
    lonely.chmod(0o755)
    with pytest.raises(SystemExit, match=r"CUDA_HOME: expected the folder that holds include/cuda_runtime\.h"):
        setup_py.cuda_home(str(lonely))


@pytest.mark.parametrize(
    ("architectures", "codes"),
    [
        (["8.6"], ["arch=compute_86,code=[sm_86]"]),
        (["9.0", "12.0+PTX"], ["arch=compute_90,code=[sm_90]", "arch=compute_120,code=[sm_120,compute_120]"]),
        (["8.0", "8.6", "8.9", "9.0"], ["arch=compute_80,code=[sm_80,sm_86,sm_89]", "arch=compute_90,code=[sm_90]"]),
        (["10.0+PTX", "12.0"], ["arch=compute_100,code=[sm_100,compute_100,sm_120]"]),
        (["8.0", "8.6+PTX"], ["arch=compute_80,code=[sm_80]", "arch=compute_86,code=[sm_86,compute_86]"]),
    ],
)
def test_options_of_nvcc(setup_py: ModuleType, architectures: list[str], codes: list[str]) -> None:
    options = setup_py.gencode(architectures)
    assert options[::2] == ["-gencode"] * len(codes)
    assert options[1::2] == codes
