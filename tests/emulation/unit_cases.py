"""Units by the CUDA kernels, emulated or on a GPU, for tests of whole units."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from greedynas_ext import _library, ops_cuda
from greedynas_ext.fused_operation import FusedUnit
from greedynas_ext.intercept import Interceptor
from greedynas_ext.recognise import Unrecognised
from greedynas_ext.recognise_unit import recognise_unit
from greedynas_ext.unit import UnitWeights


def use_cuda_kernels(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what the package does on a GPU it does on the device under test."""
    if cuda.device.type == "cuda":
        return
    monkeypatch.setattr(_library, "require_cuda", lambda: cuda.module)
    monkeypatch.setattr(ops_cuda, "computes", lambda dtype, device: dtype in ops_cuda.PRECISIONS)
    monkeypatch.setattr(ops_cuda, "most_inputs", lambda device, precision: (200, 800))
    monkeypatch.setattr(ops_cuda, "stream_of", lambda tensor: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.delattr(FusedUnit, "_evaluation")  # the CPU's kernels cannot read what is on a GPU


def fused(module: nn.Module, precision: str, policy: Any, channels: int | None = None) -> tuple[FusedUnit, Interceptor]:
    """A unit that has to run fused; `channels`: of its input, where pooling does not say."""
    unit = recognise_unit(module, channels)
    assert not isinstance(unit, Unrecognised), unit
    assert isinstance(unit, UnitWeights)
    interceptor = Interceptor(None, frozenset())
    interceptor.normalisation = policy

    def refuse(x: Tensor) -> Tensor:
        raise AssertionError("the kernels should have run")

    return FusedUnit(refuse, unit, precision, interceptor), interceptor


@torch.no_grad()
def exact(module: nn.Module, x: Tensor, training: bool) -> Tensor:
    """What a module computes in float64; training: with the statistics of the batch."""
    return copy.deepcopy(module).double().train(training)(x.double())
