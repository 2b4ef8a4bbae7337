"""What a fused result says about itself: operations counted, stages, traversal, selection."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from supernets import draw_images
from test_fused_spaces import POLICIES, calibration_for, covering_paths, small_supernet, space_supernet

from greedynas_ext import _library, evaluate_paths


@pytest.mark.parametrize(("name", "size"), [("small", 17), ("small", 18), ("mbv2-7", 33), ("macro", 9), ("mini-16", 8)])
@pytest.mark.parametrize("bn", ["batch", "recalibrated"])
def test_operations_are_counted_as_the_modules_count(name: str, size: int, bn: str) -> None:
    net = small_supernet(torch.float32) if name == "small" else space_supernet(name)
    paths = covering_paths(net)
    images, targets = draw_images(3, size, channels=net.space.in_channels, dtype=torch.float32)
    calibration = calibration_for(bn, images)
    fused, modules = (
        evaluate_paths(net, paths, images, targets, bn=bn, calibration=calibration, fused=way) for way in (True, False)
    )
    assert fused.plan.macs_computed == modules.plan.macs_computed
    assert fused.plan.macs_saved == modules.plan.macs_saved
    total = sum(net.space.macs(paths.tolist(), size))
    assert fused.plan.macs_computed + fused.plan.macs_saved == total
    for field in ("num_paths", "num_layers", "unique_nodes", "nodes_per_layer", "traversal", "batch_split"):
        assert getattr(fused.plan, field) == getattr(modules.plan, field), field
    used = _library.require_chain().used_capability()
    assert fused.plan.kernels == f"fused, {'avx512' if used == 'amx' else used}"  # tiles multiply bfloat16 alone
    assert modules.plan.kernels == "modules: fused=False"


@pytest.mark.parametrize("bn", ["batch", "running"])
def test_stages(bn: str) -> None:
    net = small_supernet(torch.float32)
    paths = covering_paths(net)
    loader = [draw_images(count, 17, dtype=torch.float32) for count in (4, 2)]
    fused, modules = (
        evaluate_paths(net, paths, loader, bn=bn, profile=True, fused=way).profile for way in (True, False)
    )
    assert fused is not None
    assert modules is not None
    assert [stage.stage for stage in fused] == ["stem", "layer 0", "layer 1", "layer 2", "head", "loss"]
    assert [stage.stage for stage in modules] == [stage.stage for stage in fused]
    counted = {stage.stage: stage for stage in modules}
    for stage in fused:
        assert stage.macs == counted[stage.stage].macs, stage.stage
        assert stage.seconds > 0, stage.stage
        if stage.stage != "loss":  # the modules' logits are scored several paths at a time
            assert stage.calls == counted[stage.stage].calls, stage.stage
            assert stage.bytes == counted[stage.stage].bytes, stage.stage
    assert sum(stage.macs for stage in fused) == 6 * evaluate_paths(net, paths, loader).plan.macs_computed


def test_no_profile_unless_asked() -> None:
    net = small_supernet()
    assert evaluate_paths(net, covering_paths(net), *draw_images(2, 17), fused=True).profile is None


def test_duplicates_are_computed_once() -> None:
    net = small_supernet()
    paths = torch.tensor([[1, 0, 2], [0, 0, 2], [1, 0, 2], [1, 0, 0]])
    result = evaluate_paths(net, paths, *draw_images(3, 17), per_image=True, k=4, fused=True)
    assert result.plan.nodes_per_layer == (2, 2, 3)
    assert result.image_losses is not None
    assert torch.equal(result.image_losses[0], result.image_losses[2])
    assert result.losses[0] == result.losses[2]
    assert not torch.equal(result.image_losses[0], result.image_losses[1])
    order = result.top_k
    assert order is not None
    ranked = sorted(range(4), key=lambda path: (float(result.losses[path]), path))
    assert order.tolist() == ranked


@pytest.mark.parametrize("bn", POLICIES)
def test_losses_do_not_depend_on_the_other_paths(bn: str) -> None:
    """Neither what was computed before in the same memory nor the order of the work leaves a trace."""
    net = small_supernet()
    paths = covering_paths(net, 6)
    images, targets = draw_images(3, 17)
    calibration = calibration_for(bn, images)
    together = evaluate_paths(net, paths, images, targets, bn=bn, calibration=calibration, fused=True)
    for number, path in enumerate(paths):
        alone = evaluate_paths(net, path[None], images, targets, bn=bn, calibration=calibration, fused=True)
        assert alone.losses[0] == together.losses[number]


def test_a_path_that_overflows_ranks_last_and_spoils_no_other() -> None:
    net = small_supernet(torch.float32)
    paths = covering_paths(net)
    images, targets = draw_images(3, 17, dtype=torch.float32)
    good = evaluate_paths(net, paths, images, targets, k=1, fused=True)
    with torch.no_grad():
        net.choices[2][1].project.bn.weight.fill_(math.inf)
    spoiled = paths[:, 2] == 1
    finite = int((~spoiled).sum())
    assert 0 < finite < len(paths)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = evaluate_paths(net, paths, images, targets, k=finite + 1, fused=True)
    assert [str(warning.message).split(";")[0] for warning in caught] == [
        f"evaluate_paths: only {finite} of {len(paths)} paths have a finite loss, fewer than k={finite + 1}"
    ]
    assert torch.equal(torch.isfinite(result.losses), ~spoiled)
    assert torch.equal(result.losses[~spoiled], good.losses[~spoiled])
    assert result.top_k is not None
    assert not bool(spoiled[result.top_k[:finite]].any())
