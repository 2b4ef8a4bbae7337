"""Loads the native parts. Importing the package never fails; the first use of a missing part explains itself."""

from __future__ import annotations

import importlib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch

_FOLDER = Path(__file__).resolve().parent
_HOW = "build it with `pip install --no-build-isolation -e .` (or `make setup`) in a checkout of greedynas_ext"


def _find(name: str) -> Path | None:
    candidates = [_FOLDER / f"{name}{suffix}" for suffix in EXTENSION_SUFFIXES]
    return next((path for path in candidates if path.exists()), None)


def _load_ops() -> Exception | None:
    path = _find("_ops")
    if path is None:
        return FileNotFoundError(f"no _ops library in {_FOLDER}")
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except Exception as error:  # kept, and raised from by the first use
        return error
    return None


_ops_error = _load_ops()


def ops_available() -> bool:
    """Whether the operations `torch.ops.greedynas.*` could be loaded."""
    return _ops_error is None


def require_ops() -> None:
    """Raises ImportError, with the original reason as its cause, where the operations could not be loaded."""
    if _ops_error is not None:
        raise ImportError(f"greedynas_ext._ops could not be loaded: {_ops_error}; {_HOW}") from _ops_error


def require_plan() -> ModuleType:
    """The module `greedynas_ext._plan`; ImportError that says what to do where it could not be loaded."""
    return _require("_plan")


def require_chain() -> ModuleType:
    """The module `greedynas_ext._ops`, which evaluates chains beside holding the operations."""
    require_ops()
    return _require("_ops")


def cuda_available() -> bool:
    """Whether the CUDA kernels were built. It says nothing of a GPU."""
    return _find("_cuda") is not None


def require_cuda() -> ModuleType:
    """The module `greedynas_ext._cuda`."""
    return _require("_cuda")


def _require(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"greedynas_ext.{name}")
    except ImportError as error:
        raise ImportError(f"greedynas_ext.{name} could not be loaded: {error}; {_HOW}") from error
