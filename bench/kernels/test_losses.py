"""Losses of paths and the choice of the best: torch.ops.greedynas.path_cross_entropy and select_top_k."""

from __future__ import annotations

import pytest
import torch

from greedynas_ext import ops, reference

IMPLEMENTATIONS = {"ops": ops, "torch": reference}


@pytest.mark.parametrize("by", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("paths", "images", "classes"), [(10, 1000, 10), (10, 32, 1000), (10, 1000, 1000)])
def test_path_cross_entropy(timed, generator, by, dtype, paths, images, classes):
    logits = torch.randn(paths, images, classes, generator=generator).to(dtype)
    targets = torch.randint(classes, (images,), generator=generator)
    group = f"[{paths}, {images}, {classes}] {str(dtype).removeprefix('torch.')}"
    losses, image_losses, correct = timed(IMPLEMENTATIONS[by].path_cross_entropy, logits, targets, 0.1, group=group)
    expected = reference.path_cross_entropy(logits.double(), targets, 0.1)
    torch.testing.assert_close(losses.double(), expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(image_losses.double(), expected[1], rtol=1e-4, atol=1e-4)
    assert torch.equal(correct, expected[2])


@pytest.mark.parametrize("by", IMPLEMENTATIONS)
@pytest.mark.parametrize(("paths", "k"), [(10, 5), (1000, 5), (100_000, 1000)])
def test_select_top_k(timed, generator, by, paths, k):
    losses = torch.rand(paths, generator=generator)
    assert torch.equal(timed(IMPLEMENTATIONS[by].select_top_k, losses, k, group=f"{k} of {paths}"),
                       reference.select_top_k(losses, k))  # fmt: skip
