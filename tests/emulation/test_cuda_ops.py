"""The operations on CUDA tensors, `greedynas_ext.ops_cuda`, against their references in plain torch."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from greedynas_ext import ops_cuda, reference


@pytest.fixture(autouse=True)
def _kernels_under_test(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if cuda.device.type == "cpu":
        monkeypatch.setattr(ops_cuda, "_module", lambda tensor: cuda.module)
        monkeypatch.setattr(ops_cuda, "_stream", lambda tensor: 0)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())


def test_path_cross_entropy(cuda: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(3, 13, 11, generator=generator) * 3).to(cuda.device)
    targets = torch.randint(11, (13,), generator=generator).to(cuda.device)
    found = ops_cuda.path_cross_entropy(logits, targets, 0.1)
    expected = reference.path_cross_entropy(logits.double(), targets, 0.1)
    # float32 rounds at 6e-8, and a loss of 10 is a sum of eleven exponentials.
    for ours, exact in zip(found[:2], expected[:2], strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=2e-6)
    assert torch.equal(found[2], expected[2])


def test_select_top_k(cuda: Any) -> None:
    losses = torch.tensor([2.0, float("nan"), 0.5, 2.0, -1.0, float("inf")]).to(cuda.device)
    for k in range(1, 7):
        assert torch.equal(ops_cuda.select_top_k(losses, k), reference.select_top_k(losses, k))
    assert ops_cuda.select_top_k(losses, 0).shape == (0,)
