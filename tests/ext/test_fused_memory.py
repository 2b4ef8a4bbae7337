"""`max_memory` with the fused kernels: what it chooses, what it refuses, and that it tells the truth."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from supernets import draw_images, relative_error
from test_fused_spaces import FP64, POLICIES, calibration_for, small_supernet
from torch import Tensor

from greedynas_ext import PathEvaluation, evaluate_paths

PATHS = torch.cartesian_prod(*[torch.arange(4)] * 3)
TESTS = Path(__file__).parent


def evaluate(images: Tensor, targets: Tensor, bn: str = "batch", **kwargs: Any) -> PathEvaluation:
    kwargs.setdefault("calibration", calibration_for(bn, images))
    return evaluate_paths(small_supernet(), PATHS, images, targets, bn=bn, fused=True, **kwargs)


def smallest(images: Tensor, targets: Tensor, bn: str = "batch", **kwargs: Any) -> tuple[int, str]:
    """The bytes that a refusal asks for, and what it says after them."""
    with pytest.raises(ValueError, match=r"^max_memory: ") as raised:
        evaluate(images, targets, bn, max_memory=1, **kwargs)
    found = re.fullmatch(r"max_memory: expected at least (\d+) bytes for these paths, got 1(.*)", str(raised.value))
    assert found is not None
    return int(found[1]), found[2]


def limit_of_layer_by_layer(images: Tensor, targets: Tensor, low: int) -> int:
    """The least bytes at which that traversal is chosen."""
    high = low * 64
    assert evaluate(images, targets, max_memory=high).plan.traversal == "layer-by-layer"
    while high - low > 1:
        middle = (low + high) // 2
        if evaluate(images, targets, max_memory=middle).plan.traversal == "layer-by-layer":
            high = middle
        else:
            low = middle
    return high


def test_room_decides_between_the_traversals() -> None:
    images, targets = draw_images(4, 17)
    whole = evaluate(images, targets, per_image=True)
    assert whole.plan.traversal == "depth-first"
    deep, advice = smallest(images, targets)
    assert advice == "; fewer images, or micro_batch=, which changes the statistics, need less"
    wide = limit_of_layer_by_layer(images, targets, deep)
    assert wide > 1.2 * deep
    for max_memory, traversal in ((deep, "depth-first"), (wide - 1, "depth-first"), (wide, "layer-by-layer")):
        result = evaluate(images, targets, max_memory=max_memory, per_image=True)
        assert result.plan.traversal == traversal
        assert result.plan.batch_split == 1
        assert torch.equal(result.losses, whole.losses), "the same work in another order"
        assert result.image_losses is not None
        assert torch.equal(result.image_losses, whole.image_losses)
    with pytest.raises(ValueError, match=rf"^max_memory: expected at least {deep} bytes .*, got {deep - 1}; fewer"):
        evaluate(images, targets, max_memory=deep - 1)


@pytest.mark.parametrize("bn", ["running", "recalibrated"])
def test_batches_are_split_where_statistics_allow_it(bn: str) -> None:
    images, targets = draw_images(9, 17)
    calibration = images[:2] * 0.7 if bn == "recalibrated" else None
    whole = evaluate(images, targets, bn, calibration=calibration, per_image=True)
    least, advice = smallest(images, targets, bn, calibration=calibration)
    assert advice == ("" if bn == "running" else "; fewer calibration images need less")
    splits = []
    for factor in (1.0, 1.5, 2.0, 3.0, 5.0, 40.0):
        result = evaluate(images, targets, bn, calibration=calibration, max_memory=int(least * factor), per_image=True)
        splits.append(result.plan.batch_split)
        assert relative_error(result.losses, whole.losses) <= FP64
        torch.testing.assert_close(result.image_losses, whole.image_losses, rtol=1e-9, atol=1e-12)
        assert result.statistics == whole.statistics
        assert torch.equal(result.accuracy, whole.accuracy)
    assert splits == sorted(splits, reverse=True)
    assert splits[-1] == 1
    assert splits[0] > 1
    if bn == "running":
        assert splits[0] == 9  # image by image, and not one byte less
        with pytest.raises(ValueError, match=rf"^max_memory: expected at least {least} bytes .*, got {least - 1}$"):
            evaluate(images, targets, bn, max_memory=least - 1)


def test_calibration_images_are_not_split() -> None:
    """Statistics of parts would be others."""
    images, targets = draw_images(2, 17)
    few, many = (smallest(images, targets, "recalibrated", calibration=images[[0] * n]) for n in (2, 12))
    assert few[1] == many[1] == "; fewer calibration images need less"
    assert many[0] > 2 * few[0]


def test_micro_batches_are_chosen_for_one_by_one() -> None:
    images, targets = draw_images(6, 17)
    limit, _ = smallest(images[:2], targets[:2])
    with pytest.raises(ValueError, match=r"^max_memory: .* fewer images"):
        evaluate(images, targets, max_memory=limit)
    result = evaluate(images, targets, max_memory=limit, micro_batch=2)
    assert torch.equal(result.losses, evaluate(images, targets, micro_batch=2).losses)
    assert result.statistics == "batch statistics of 2 images at a time (micro_batch=2)"


@pytest.mark.parametrize("bn", POLICIES)
def test_more_images_and_larger_ones_need_more(bn: str) -> None:
    if bn == "running":  # image by image: only their size counts
        needs = [smallest(*draw_images(3, side), bn)[0] for side in (9, 17, 33)]
    else:
        needs = [smallest(*draw_images(count, side), bn)[0] for count, side in ((2, 17), (4, 17), (4, 33), (9, 33))]
    assert needs == sorted(set(needs))


MEASURE = """
    import re, sys
    sys.path[:0] = [sys.argv[1]]
    bn, count, size = sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    import torch
    torch.set_num_threads(1)
    from greedynas_ext import evaluate_paths
    from supernets import draw_images
    from test_fused_spaces import covering_paths, small_supernet

    def status(name):
        with open("/proc/self/status") as file:
            return 1024 * int(re.search(name + r":\\s+(\\d+) kB", file.read())[1])

    net = small_supernet(torch.float32)
    paths = covering_paths(net)
    evaluate_paths(net, paths, *draw_images(2, 17, dtype=torch.float32), bn=bn, fused=True)  # loads what it loads
    images, targets = draw_images(count, size, dtype=torch.float32)
    try:
        evaluate_paths(net, paths, images, targets, bn=bn, fused=True, max_memory=1)
    except ValueError as error:
        needed = int(re.search(r"at least (\\d+) bytes", str(error))[1])
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before = status("VmRSS")
    result = evaluate_paths(net, paths, images, targets, bn=bn, fused=True, max_memory=needed)
    weights = sum(parameter.nbytes for parameter in net.parameters())
    print(needed, status("VmHWM") - before, weights, result.plan.batch_split)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak cannot be set back here")
@pytest.mark.parametrize(
    ("bn", "count", "size"),
    [
        ("batch", 24, 160),
        ("running", 1, 700),
    ],
)
def test_no_more_memory_than_said_is_used(bn: str, count: int, size: int) -> None:
    """What a process grows by, measured by the operating system: within 1.3 of what was said, and not far below."""
    script = [sys.executable, "-c", textwrap.dedent(MEASURE), str(TESTS), bn, str(count), str(size)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    needed, grown, weights, split = map(int, done.stdout.split())
    assert split == 1
    assert needed > 20e6, "enough to be seen beside what the interpreter takes"
    assert grown <= 1.3 * needed + weights
    assert grown > 0.6 * needed, "a bound that is far too high splits batches that would fit"
