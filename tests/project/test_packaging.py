"""What the built modules ask of torch, and what the package's metadata says of it: see docs/packaging.md."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import torch

from greedynas_ext import _library

ROOT = Path(__file__).parents[2]
STABLE = re.compile(r"(aoti_torch_|torch_)\w+")
CPP_OF_TORCH = re.compile(r"\b(at|c10|caffe2|torch)::")


def undefined(module: str) -> list[str]:
    """The symbols that a built module takes from elsewhere, demangled."""
    path = _library._find(module)
    assert path is not None
    command = ["nm", "-D", "--undefined-only", "--demangle", str(path)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line.split(maxsplit=1)[1] for line in lines]


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_of_torch_the_operations_take_c_functions_alone():
    symbols = undefined("_ops")
    assert [name for name in symbols if CPP_OF_TORCH.search(name)] == []
    of_torch = [name for name in symbols if STABLE.fullmatch(name)]
    assert {"torch_parallel_for", "torch_get_num_threads", "torch_call_dispatcher"} <= set(of_torch)
    headers = Path(torch.__file__).parent / "include/torch/csrc"
    declared = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("stable/c", "inductor/aoti_torch/c")
        for path in (headers / folder).glob("*.h")
    )
    assert [name for name in of_torch if not re.search(rf"\b{name}\(", declared)] == []


@pytest.mark.parametrize("module", ["_plan", "_cuda"])
def test_the_other_modules_take_nothing_of_torch(module: str):
    if module == "_cuda" and not _library.cuda_available():
        pytest.skip("the CUDA part was not built")
    assert [name for name in undefined(module) if STABLE.fullmatch(name) or CPP_OF_TORCH.search(name)] == []


def test_the_oldest_torch_is_the_one_that_is_compiled_for():
    (target,) = re.findall(r"TORCH_TARGET_VERSION=0x(\w{2})(\w{2})0{12}\b", (ROOT / "setup.py").read_text())
    oldest = ".".join(str(int(part, 16)) for part in target)
    (torch_range,) = (each for each in project()["dependencies"] if each.startswith("torch>"))
    assert torch_range.startswith(f"torch>={oldest},<")
    page = (ROOT / "docs/packaging.md").read_text(encoding="utf-8")
    assert f"`TORCH_TARGET_VERSION` to {oldest}," in page
