"""The kernels under test: executed under emulation on the host, or, with GREEDYNAS_TEST_CUDA=1, on this machine's GPU.

CUDA_KERNELS=folder takes a module that was built before.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


@dataclass(frozen=True)
class Backend:
    """What a test of kernels works with.

    Attributes:
        module: greedynas_ext._cuda, for a GPU or for the emulation.
        kernels: its kernels one by one.
        device: where their tensors live.
        stream: what launches are given.
    """

    module: ModuleType
    kernels: Any
    device: torch.device
    stream: int

    def synchronize(self) -> None:
        """Until all launches are done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


@pytest.fixture(scope="session")
def cuda(tmp_path_factory: pytest.TempPathFactory) -> Backend:
    if os.environ.get("GREEDYNAS_TEST_CUDA") == "1":
        module = importlib.import_module("greedynas_ext._cuda")
        return Backend(module, module.kernels, torch.device("cuda"), torch.cuda.current_stream().cuda_stream)
    if "CUDA_KERNELS" in os.environ:
        folder = Path(os.environ["CUDA_KERNELS"])
    else:
        from emulation_build import build

        folder = build(tmp_path_factory.mktemp("emulated"), [])
    path = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    spec = importlib.util.spec_from_file_location("_cuda", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Backend(module, module.kernels, torch.device("cpu"), 0)
