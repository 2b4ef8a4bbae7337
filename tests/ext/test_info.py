"""`python -m greedynas_ext.info`, and what the first use of a missing native part says."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import greedynas_ext
from greedynas_ext import _library, info

BUILD = {"torch": "9.9", "cuda": {"build": False, "reason": "no nvcc found"}, "flags": ["-O3"]}


def with_build_info(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str | None) -> None:
    file = folder / "_build_info.json"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(info, "_BUILD_INFO", file)


def test_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_build_info(monkeypatch, tmp_path, json.dumps(BUILD))
    info.main([])
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    lines = {name.strip(): value.strip() for name, value in lines.items()}
    assert lines["greedynas_ext"] == greedynas_ext.__version__
    assert lines["torch"] == f"{torch.__version__} (built against 9.9)"
    assert lines["CUDA kernels"] == "left out: no nvcc found"
    assert lines["path plan"] == "loaded"
    assert lines["operations"] == "loaded"
    assert lines["threads"] == str(torch.get_num_threads())
    chain = _library.require_chain()
    bf16 = f"bf16 by {chain.bf16_kernels()}" if chain.bf16_kernels() else "bf16 computed in float32"
    assert lines["CPU kernels"] == f"{chain.used_capability()}, {bf16}: {chain.capability_reason()}"


def test_brief_report_says_what_was_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_build_info(monkeypatch, tmp_path, json.dumps(BUILD))
    info.main(["--brief"])
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "CPU kernels built" in out
    assert "CUDA kernels left out: no nvcc found" in out


def test_a_build_with_cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = json.dumps({**BUILD, "cuda": {"build": True, "reason": "FORCE_CUDA=1"}})
    with_build_info(monkeypatch, tmp_path, text)
    assert info.describe()["CUDA kernels"] == "built: FORCE_CUDA=1"


@pytest.mark.parametrize("text", [None, "{", "[]", "3", "{}"])
def test_without_build_information(text: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_build_info(monkeypatch, tmp_path, text)
    assert info.build_info() == {}
    assert info.describe()["CUDA kernels"] == "unknown: no build information"


def test_as_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["info"])
    monkeypatch.delitem(sys.modules, "greedynas_ext.info")
    runpy.run_module("greedynas_ext.info", run_name="__main__")
    assert "path plan" in capsys.readouterr().out


def test_missing_operations_are_reported_and_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "_find", lambda name: None)
    error = _library._load_ops()
    assert isinstance(error, FileNotFoundError)
    monkeypatch.setattr(_library, "_ops_error", error)
    assert not _library.ops_available()
    assert "could not be loaded" in info.describe()["operations"]
    with pytest.raises(
        ImportError, match=r"greedynas_ext\._ops could not be loaded: no _ops library .*; build it with"
    ):
        greedynas_ext.ops.select_top_k(torch.zeros(3), 1)


def test_a_damaged_library_keeps_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "_ops.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(_library, "_find", lambda name: broken)
    error = _library._load_ops()
    assert isinstance(error, OSError)
    monkeypatch.setattr(_library, "_ops_error", error)
    with pytest.raises(ImportError, match="_ops could not be loaded") as raised:
        _library.require_ops()
    assert raised.value.__cause__ is error


def test_a_missing_plan_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "greedynas_ext._plan", None)
    with pytest.raises(ImportError, match=r"greedynas_ext\._plan could not be loaded: .*build it with `pip install"):
        _library.require_plan()
    assert "could not be loaded" in info.describe()["path plan"]


def test_the_package_imports_without_native_parts(tmp_path: Path) -> None:
    """A checkout that nobody has built: importing works, the first use explains."""
    package = Path(greedynas_ext.__file__).parent
    copy = tmp_path / "greedynas_ext"
    copy.mkdir()
    for file in package.glob("*.py"):
        (copy / file.name).write_text(file.read_text())
    code = (
        "import sys\n"  # an editable installation would find the built parts elsewhere
        "sys.meta_path[:] = [finder for finder in sys.meta_path if 'ditable' not in repr(finder)]\n"
        "import greedynas_ext, torch\n"
        "from types import SimpleNamespace\n"
        "net = SimpleNamespace(stem=torch.relu, choices=[[torch.sin]], head=lambda x: x.flatten(1))\n"
        "try:\n"
        "    greedynas_ext.evaluate_paths(net, [[0]], torch.ones(1, 1, 2, 2), torch.zeros(1, dtype=torch.int64))\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(tmp_path)}
    )
    assert "greedynas_ext._plan could not be loaded" in done.stdout, done.stderr
    assert "build it with" in done.stdout
