"""The operations on CUDA tensors, `greedynas_ext.ops_cuda`, against their references in plain torch."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from greedynas_ext import ops, ops_cuda, reference


@pytest.fixture(autouse=True)
def _kernels_under_test(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if cuda.device.type == "cpu":
        monkeypatch.setattr(ops_cuda, "_module", lambda tensor: cuda.module)
        monkeypatch.setattr(ops_cuda, "stream_of", lambda tensor: 0)
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


ZEROS, TARGETS = torch.zeros, torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("logits", "targets", "label_smoothing"),
    [
        (ZEROS(4, 3), TARGETS, 0.0),
        (ZEROS(2, 4, 3, dtype=torch.int64), TARGETS, 0.0),
        (ZEROS(2, 0, 3), TARGETS[:0], 0.0),
        (ZEROS(2, 4, 0), TARGETS, 0.0),
        (ZEROS(2, 4, 3), TARGETS[:3], 0.0),
        (ZEROS(2, 4, 3), TARGETS.int(), 0.0),
        (ZEROS(2, 4, 3), TARGETS[:, None], 0.0),
        (ZEROS(2, 4, 3), TARGETS, 1.25),
        (ZEROS(2, 4, 3), TARGETS, -0.1),
        (ZEROS(2, 4, 3), TARGETS, float("nan")),
    ],
)
def test_path_cross_entropy_refuses_what_the_cpu_does(
    cuda: Any, logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float
) -> None:
    with pytest.raises(ValueError, match=r"^path_cross_entropy: ") as expected:
        ops.path_cross_entropy(logits, targets, label_smoothing)
    with pytest.raises(ValueError, match=r"^path_cross_entropy: ") as found:
        ops_cuda.path_cross_entropy(logits.to(cuda.device), targets.to(cuda.device), label_smoothing)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize(
    ("losses", "k"), [(ZEROS(3), 4), (ZEROS(3), -1), (ZEROS(3, 1), 1), (ZEROS(3, dtype=torch.bfloat16), 1)]
)
def test_select_top_k_refuses_what_the_cpu_does(cuda: Any, losses: torch.Tensor, k: int) -> None:
    with pytest.raises(ValueError, match=r"^select_top_k: ") as expected:
        ops.select_top_k(losses, k)
    with pytest.raises(ValueError, match=r"^select_top_k: ") as found:
        ops_cuda.select_top_k(losses.to(cuda.device), k)
    assert str(found.value) == str(expected.value)
