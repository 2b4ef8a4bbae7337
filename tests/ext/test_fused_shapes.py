"""Fused losses at odd sizes, few and many images, and images however they lie in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from supernets import draw_images, plain_image_losses, relative_error
from test_fused_spaces import (
    FP32,
    FP64,
    POLICIES,
    calibration_for,
    compare,
    covering_paths,
    make_supernet,
    small_space,
    small_supernet,
)
from torch import Tensor

from greedynas.spaces import Space
from greedynas_ext import evaluate_paths


def draw(count: int, height: int, width: int, *, channels: int = 3, dtype: torch.dtype = torch.float64) -> Any:
    images, targets = draw_images(count, max(height, width), channels=channels, dtype=dtype)
    return images[:, :, :height, :width].contiguous(), targets


@pytest.mark.parametrize(("height", "width"), [(33, 33), (35, 35), (37, 45), (45, 37), (6, 50), (8, 3), (1, 40)])
@pytest.mark.parametrize("bn", POLICIES)
def test_resolutions(height: int, width: int, bn: str) -> None:
    """Rows shorter than a kernel, an odd number of them under each stride, one only."""
    net = small_supernet(operations="e3k7 e6k5s e1k3 id")
    compare(net, covering_paths(net), *draw(3, height, width), bn=bn, tolerance=FP64)


@pytest.mark.parametrize("bn", POLICIES)
@pytest.mark.parametrize("count", range(1, 10))
def test_numbers_of_images(count: int, bn: str) -> None:
    """Images are worked on in slabs of some 400 pixels: at 25 pixels 16 of them, at 81 five, at 289 two."""
    net = small_supernet()
    for side in (9, 17, 33):
        compare(net, covering_paths(net, 1)[-4:], *draw(count, side, side), bn=bn, tolerance=FP64)


@pytest.mark.parametrize("bn", POLICIES)
@pytest.mark.parametrize("count", [15, 16, 17, 33])
def test_more_images_than_a_slab_holds(count: int, bn: str) -> None:
    net = small_supernet()
    compare(net, covering_paths(net, 1)[-4:], *draw(count, 9, 9), bn=bn, tolerance=FP64)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("in_channels", [1, 2, 5])
def test_image_channels_and_a_stem_without_blocks(in_channels: int, stride: int) -> None:
    small = small_space(in_channels=in_channels)
    space = Space(**{**_fields(small), "stem_channels": 9, "stem_stride": stride, "fixed": ()})
    net = make_supernet(space)
    for bn in POLICIES:
        compare(net, covering_paths(net), *draw(3, 11, 13, channels=in_channels), bn=bn, tolerance=FP64)


def test_several_blocks_in_the_stem() -> None:
    small = small_space()
    net = make_supernet(small)
    taken = [net.choices[0][op] for op in (0, 1)]  # with an expansion, and with squeeze-excitation
    rest = make_supernet(Space(**{**_fields(small), "layers": small.layers[1:], "stem_channels": 12, "fixed": ()}))
    rest.stem = torch.nn.Sequential(*net.stem, taken[0], rest.choices[0][1], rest.choices[0][2])
    for bn in POLICIES:
        compare(rest, covering_paths(rest), *draw(3, 21, 19), bn=bn, tolerance=FP64)


def _fields(space: Space) -> dict[str, Any]:
    return {name: getattr(space, name) for name in Space.__dataclass_fields__}


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every other column": lambda x: torch.stack([x, -x], -1).flatten(3)[..., ::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "rows of a larger image": lambda x: torch.nn.functional.pad(x, (2, 3, 1, 4))[:, :, 1:-4, 2:-3],
    "images apart": lambda x: torch.stack([x, -x], 1)[:, 0],
    "not at the start": lambda x: torch.cat([-x[:1], x])[1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_layouts_change_no_bit(layout: str, dtype: torch.dtype) -> None:
    net = small_supernet(dtype)
    paths = covering_paths(net)
    images, targets = draw(4, 13, 18, dtype=dtype)
    other = LAYOUTS[layout](images)
    assert torch.equal(other, images)
    assert other.stride() != images.stride() or other.storage_offset() > 0
    for bn in POLICIES:
        calibration = calibration_for(bn, images)
        changed = None if calibration is None else LAYOUTS[layout](calibration)
        expected = evaluate_paths(net, paths, images, targets, bn=bn, calibration=calibration, fused=True)
        result = evaluate_paths(net, paths, other, targets, bn=bn, calibration=changed, fused=True)
        assert torch.equal(result.losses, expected.losses)


@pytest.mark.parametrize("how", ["one image", "grey", "one row"])
def test_expanded_images(how: str) -> None:
    net = small_supernet()
    images, targets = draw(4, 13, 18)
    one = {"one image": images[:1], "grey": images[:, :1], "one row": images[:, :, :1]}[how]
    expanded = one.expand_as(images)
    assert 0 in expanded.stride()
    compare(net, covering_paths(net), expanded, targets, tolerance=FP64)


def test_images_of_other_dtypes_are_cast() -> None:
    net = small_supernet(torch.float32)
    paths = covering_paths(net)
    images, targets = draw(4, 17, 17)
    single = evaluate_paths(net, paths, images.float(), targets, fused=True)
    assert torch.equal(evaluate_paths(net, paths, images, targets, fused=True).losses, single.losses)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = evaluate_paths(net, paths, images.to(dtype), targets, fused=True)
        expected = evaluate_paths(net, paths, images.to(dtype).float(), targets, fused=True)
        assert torch.equal(rounded.losses, expected.losses)
        assert not torch.equal(rounded.losses, single.losses)
        assert rounded.losses.dtype == torch.float32


def test_targets_that_do_not_lie_side_by_side() -> None:
    net = small_supernet()
    images, targets = draw(6, 9, 9)
    apart = torch.stack([targets, (targets + 1) % 5], 1)[:, 0]
    assert not apart.is_contiguous()
    compare(net, covering_paths(net), images, apart, tolerance=FP64)


# Several batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bn", POLICIES)
def test_batches_of_other_sizes_and_resolutions(bn: str) -> None:
    """The working memory of a batch serves the next, which is larger or smaller."""
    net = small_supernet()
    paths = covering_paths(net)
    loader = [draw(4, 17, 17), draw(2, 33, 21), draw(7, 9, 12), draw(1, 17, 40), draw(4, 17, 17)]
    calibration = calibration_for(bn, loader[1][0])
    parts = [plain_image_losses(net, paths, *batch, bn, calibration) for batch in loader]
    expected = torch.cat([losses for losses, _ in parts], 1)
    read: list[int] = []

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(loader):
            read.append(number)
            yield batch

    result = evaluate_paths(net, paths, batches(), bn=bn, calibration=calibration, per_image=True, fused=True, k=3)
    assert read == [0, 1, 2, 3, 4]
    torch.testing.assert_close(result.image_losses, expected, rtol=1e-9, atol=1e-11)
    assert relative_error(result.losses, expected.mean(1)) < FP64
    accuracy = sum(part[1] * len(batch[0]) for part, batch in zip(parts, loader, strict=True)) / 18
    torch.testing.assert_close(result.accuracy, accuracy, rtol=1e-12, atol=0)
    assert result.top_k is not None
    ranked = sorted(range(len(paths)), key=lambda path: (float(result.losses[path]), path))
    assert result.top_k.tolist() == ranked[:3]


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 7, 9])
def test_micro_batches_are_batches(micro_batch: int) -> None:
    net = small_supernet()
    paths = covering_paths(net)
    images, targets = draw(7, 17, 20)
    result = evaluate_paths(net, paths, images, targets, micro_batch=micro_batch, per_image=True, fused=True)
    parts = -(-7 // micro_batch)
    batches = zip(images.tensor_split(parts), targets.tensor_split(parts), strict=True)
    expected = torch.cat([plain_image_losses(net, paths, *batch)[0] for batch in batches], 1)
    torch.testing.assert_close(result.image_losses, expected, rtol=1e-9, atol=1e-11)
    assert f"(micro_batch={micro_batch})" in result.statistics


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3, 1.0])
def test_label_smoothing_and_single_precision(label_smoothing: float) -> None:
    net = small_supernet(torch.float32)
    images, targets = draw(6, 33, 33, dtype=torch.float32)
    compare(net, covering_paths(net), images, targets, tolerance=FP32, label_smoothing=label_smoothing)
