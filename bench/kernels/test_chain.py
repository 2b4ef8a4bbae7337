"""Whole evaluations of a small space: packing of all weights, launches prepared before, the head with its loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from greedynas_ext import evaluate_paths, prepare_paths
from greedynas_ext.bench.inputs import make_images, make_paths, make_targets
from greedynas_ext.bench.subjects import make_supernet, space_named

SPACE, IMAGES, PATHS = "mini-16", 64, 10


@pytest.fixture(scope="module")
def evaluated() -> Any:
    """A supernet, paths, images, targets."""
    space = space_named(SPACE)
    batch = make_images(IMAGES, space.in_channels, space.resolution), make_targets(IMAGES, space.num_classes)
    return make_supernet(space), make_paths("uniform", PATHS, space), *batch


@pytest.mark.parametrize("by", ["prepared", "evaluate_paths", "torch"])
@pytest.mark.parametrize("bn", ["batch", "running"])
def test_chain(timed: Any, evaluated: Any, by: str, bn: Any) -> None:
    expected = evaluate_paths(*evaluated, bn=bn, fused=False).losses
    if by == "prepared":
        prepared = prepare_paths(*evaluated, bn=bn)
        timed(prepared.launch, group=f"{SPACE}, {IMAGES} images, {PATHS} paths, {bn}")
        losses = prepared.result().losses
    else:
        losses = timed(
            lambda: evaluate_paths(*evaluated, bn=bn, fused=by == "evaluate_paths"),
            group=f"{SPACE}, {IMAGES} images, {PATHS} paths, {bn}",
        ).losses
    # As tests/ext/test_fused_spaces.py has it, for statistics over few values.
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kernels_by_stage(benchmark: Any, evaluated: Any, precision: Any) -> None:
    """Milliseconds of each kernel of the blocks, all layers together, stand in the saved file as extra_info."""
    benchmark.group = f"kernels_by_stage, {SPACE}, {IMAGES} images, {PATHS} paths"
    result = benchmark(evaluate_paths, *evaluated, precision=precision, fused=True, profile=True)
    parts: dict[str, float] = {}
    for stage in result.profile:
        for part, seconds in stage.parts.items():
            parts[part] = parts.get(part, 0.0) + seconds
    benchmark.extra_info.update({part: 1e3 * seconds for part, seconds in parts.items()})
    assert {"expand and depthwise", "project", "finish", "statistics"} <= parts.keys()
    assert sum(parts.values()) <= sum(stage.seconds for stage in result.profile)


def test_recognition_and_packing(timed: Any, evaluated: Any) -> None:
    """What an evaluation does before it computes: the least that is left on one image."""
    supernet, paths, images, targets = evaluated
    result = timed(lambda: evaluate_paths(supernet, paths, images[:1], targets[:1], bn="running"), group=SPACE)
    assert result.plan.kernels.startswith("fused")
