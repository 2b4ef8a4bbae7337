"""The kernels under test, executed under emulation on the host, or, with GREEDYNAS_TEST_CUDA=1, on this machine's GPU.

CUDA_KERNELS=folder takes a module that was built before; EMULATION_LAUNCHES=file is written with which kernels each
test has launched (launches.py).
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from emulated_device import configured
from filelock import FileLock
from launches import Record

sys.path.append(str(Path(__file__).parents[1] / "ext"))  # its modules of many makings are of use here too

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Backend:
    """What a test of kernels works with.

    Attributes:
        module: greedynas_ext._cuda, for a GPU or for the emulation.
        kernels: its kernels one by one.
        device: where their tensors live.
        stream: what launches are given.
        precision: of maps, a key of DTYPES.
    """

    module: ModuleType
    kernels: Any
    device: torch.device
    stream: int
    precision: str

    @property
    def maps(self) -> Any:
        """The kernels for maps of this precision."""
        return getattr(self.kernels, self.precision)

    @property
    def dtype(self) -> torch.dtype:
        """Of maps."""
        return DTYPES[self.precision]

    @property
    def stored(self) -> torch.dtype:
        """Of depthwise outputs, and of the weights before and behind them."""
        return torch.float32 if self.precision == "fp32" else torch.float16

    def synchronize(self) -> None:
        """Until all launches are done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """greedynas_ext._cuda, of the GPU or of the emulation."""
    if os.environ.get("GREEDYNAS_TEST_CUDA") == "1":
        return importlib.import_module("greedynas_ext._cuda")
    from emulation_build import build, load

    if "CUDA_KERNELS" in os.environ:
        return load(Path(os.environ["CUDA_KERNELS"]))
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # one build for all of them
        root = root.parent
    folder = root / "emulated"
    with FileLock(root / "emulated.lock"):
        if not folder.exists():
            build(tmp_path_factory.mktemp("emulated"), []).rename(folder)
    return load(folder)


@pytest.fixture(scope="session")
def record(built: ModuleType) -> Iterator[Record | None]:
    """Where EMULATION_LAUNCHES asks for it."""
    if "EMULATION_LAUNCHES" not in os.environ:
        yield None
        return
    assert built.__file__
    record = Record(built.__file__)
    yield record
    record.write(Path(os.environ["EMULATION_LAUNCHES"]))


@pytest.fixture
def cuda(built: ModuleType, record: Record | None, request: pytest.FixtureRequest) -> Iterator[Backend]:
    """For maps in bf16, or as a test asks for in precisions.py; sm_75 has 64 KB of shared memory."""
    precision, _, arch = getattr(request, "param", "bf16").partition(" on ")
    if os.environ.get("GREEDYNAS_TEST_CUDA") == "1":
        if arch:
            pytest.skip("another device's code")
        stream = torch.cuda.current_stream().cuda_stream
        yield Backend(built, built.kernels, torch.device("cuda"), stream, precision)
        return
    with configured(built.__file__) as configuration:
        if arch == "sm_75":
            configuration.arch, configuration.shared_bytes = 750, 64 * 1024
        start = time.perf_counter()
        yield Backend(built, built.kernels, torch.device("cpu"), 0, precision)
        if record is not None:
            record.add(request.node.nodeid, time.perf_counter() - start)


@pytest.fixture
def emulation(cuda: Backend) -> Iterator[Callable[..., None]]:
    """Sets the order of threads and the shared memory of the emulated device; does nothing on a real one."""
    if cuda.device.type != "cpu":
        yield lambda **_: None
        return
    with configured(cuda.module.__file__) as configuration:

        def configure(**values: int) -> None:
            for name, value in values.items():
                setattr(configuration, name, value)

        yield configure
