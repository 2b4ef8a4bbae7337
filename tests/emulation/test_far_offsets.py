"""Maps of more than 2^31 elements: the last blocks of a launch, in memory of which little is ever touched.

Only these blocks are executed. What they write is compared with float64, and the memory's first pages, where offsets
would lead that have lost their high bits, have to be zeros still.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emulated_device import configured
from emulation_build import build, load
from torch import Tensor

pytestmark = pytest.mark.slow

MAP_NORESERVE = 0x4000  # Linux; Python has no name for it yet
FAR = 1 << 31  # elements
MAX_UNITS = 2048  # kMaxUnits (pointwise.cuh) as nvcc has it
FIRST = 1 << 20  # elements at the beginning that are looked at
LINEAR, RELU = 0, 1

Kernels = Any


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernels]:
    module = load(build(tmp_path_factory.mktemp("far"), [f"-DGREEDYNAS_MAX_UNITS={MAX_UNITS}"]))
    with configured(str(module.__file__)) as device:
        device.last_blocks = 1
        device.multiprocessors = 1 << 20  # a block has one piece of work
        yield module.kernels


def sparse(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Zeros, which take memory only where something is written."""
    count = torch.Size(shape).numel()
    memory = mmap.mmap(-1, count * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pixels_beyond(channels: int) -> int:
    """Of which the last ones lie behind 2^31 elements."""
    return FAR // channels + 4096


def check_only_the_end(y: Tensor, expected: Tensor, tolerance: float) -> None:
    """The last rows of y are as expected, and some were written; none at the beginning."""
    rows = len(expected)
    assert y.numel() > FAR + expected.numel()
    assert (y.flatten()[:FIRST] == 0).all()
    found = y[-rows:].double()
    assert expected.abs().max() > 0.1
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def unit_pixels(pixels: int) -> int:
    """Of the last unit (pointwise.cuh)."""
    tiles = math.ceil(math.ceil(pixels / 128) / MAX_UNITS)
    return pixels - (pixels - 1) // (tiles * 128) * (tiles * 128)


def affine_of(channels: int) -> Tensor:
    return torch.stack([torch.ones(channels), torch.full((channels,), 0.25), torch.zeros(channels)]).contiguous()


def test_finish_map(kernels: Kernels) -> None:
    channels = 32
    y = sparse(pixels_beyond(channels), channels)
    y[-300:] = numbers(300, channels)
    before, affine = y[-300:].double(), affine_of(channels)
    node = kernels.bf16.FinishMap(
        map=y.data_ptr(), affine=affine.data_ptr(), pixels=len(y), channels=channels, activation=RELU
    )
    kernels.bf16.finish_map([node])
    changed = int((y[-300:].double() != before).any(1).sum())
    assert changed > 50
    check_only_the_end(y, (before[-50:] + 0.25).relu(), 2.0**-8)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (7, 2)])
def test_expand_depthwise(kernels: Kernels, kernel: int, stride: int) -> None:
    into, hidden, size = 64, 96, 8
    out = size // stride
    images = FAR // (size * size * into) + 5 if stride == 1 else FAR // (out * out * hidden) + 5
    x = sparse(images, size, size, into)
    x[-9:] = numbers(9, size, size, into)
    expand = (numbers(hidden, into, seed=1) / 8).bfloat16()
    depthwise = (numbers(kernel * kernel, hidden, seed=2) / kernel).half()
    affine = affine_of(hidden)
    d = sparse(images, out, out, hidden, dtype=torch.float16)
    node = kernels.bf16.ExpandDepthwise(
        x=x.data_ptr(),
        expand=expand.data_ptr(),
        affine=affine.data_ptr(),
        depthwise=depthwise.data_ptr(),
        d=d.data_ptr(),
        images=images,
        height=size,
        width=size,
        in_channels=into,
        hidden_channels=hidden,
        kernel=kernel,
        stride=stride,
        activation=RELU,
    )
    kernels.bf16.expand_depthwise([node])
    u = (x[-1:].double() @ expand.double().T + 0.25).relu().permute(0, 3, 1, 2)
    taps = depthwise.double().T.reshape(hidden, 1, kernel, kernel)
    expected = F.conv2d(u, taps, stride=stride, padding=kernel // 2, groups=hidden).permute(0, 2, 3, 1)
    written = (d[-1] != 0).flatten(0, 1).any(0)  # a block has some of the channels
    assert written.sum() >= 48
    expected[..., ~written] = 0
    check_only_the_end(d, expected, 4e-3)


def output(kernels: Kernels, y: Tensor, partials: Tensor) -> Any:
    return kernels.bf16.PointwiseOutput(
        y=y.data_ptr(), partials=partials.data_ptr(), channels=y.shape[-1], activation=LINEAR
    )


def check_pointwise(kernels: Kernels, launch: Callable[[Any], None], y: Tensor, expected: Tensor) -> None:
    """`launch(output)`; expected: of the last pixels."""
    partials = torch.full((kernels.bf16.pointwise_units(len(y)), 4, y.shape[1]), float("nan"))
    launch(output(kernels, y, partials))
    check_only_the_end(y, expected, 2.0**-7)
    assert partials[:-1].isnan().all()
    pilot, sums, _, count = partials[-1].double()
    assert (count == unit_pixels(len(y))).all()
    mean = y[-unit_pixels(len(y)) :].double().mean(0)
    assert torch.allclose(pilot + sums / count, mean, rtol=1e-4, atol=1e-6)


def test_project(kernels: Kernels) -> None:
    hidden, channels = 64, 64
    d = sparse(pixels_beyond(hidden), hidden, dtype=torch.float16)
    d[-500:] = numbers(500, hidden)
    weight, affine = (numbers(channels, hidden, seed=1) / 8).half(), affine_of(hidden)
    y = sparse(len(d), channels)

    def launch(out: Any) -> None:
        node = kernels.bf16.Project(
            d=d.data_ptr(),
            affine=affine.data_ptr(),
            weight=weight.data_ptr(),
            out=out,
            pixels=len(d),
            image_pixels=64,
            hidden_channels=hidden,
            activation=RELU,
        )
        kernels.bf16.project([node])

    rows = min(500, unit_pixels(len(d)))
    check_pointwise(kernels, launch, y, (d[-rows:].double() + 0.25).relu() @ weight.double().T)


def test_strided_conv(kernels: Kernels) -> None:
    into, channels, size = 64, 64, 6
    images = FAR // (9 * channels) + 700
    x = sparse(images, size, size, into)
    x[-40:] = numbers(40, size, size, into)
    weight = (numbers(channels, into, seed=1) / 8).bfloat16()
    y = sparse(images * 9, channels)

    def launch(out: Any) -> None:
        node = kernels.bf16.StridedConv(
            x=x.data_ptr(),
            weight=weight.data_ptr(),
            out=out,
            images=images,
            height=size,
            width=size,
            in_channels=into,
            stride=2,
        )
        kernels.bf16.strided_conv([node])

    seen = x[-40:, ::2, ::2].double().reshape(-1, into)[-unit_pixels(len(y)) :]
    check_pointwise(kernels, launch, y, seen @ weight.double().T)


def test_stem_conv_of_images_far_apart(kernels: Kernels) -> None:
    """Strides of the images, channels and rows: some beyond 2^31, and 2^32, elements."""
    images, into, size, channels = 3, 2, 12, 16
    strides = (FAR + 1003, (1 << 30) + 17, 57, 3)
    memory = sparse(
        sum((n - 1) * s for n, s in zip((images, into, size, size), strides, strict=True)) + 1, dtype=torch.float32
    )
    x = torch.as_strided(memory, (images, into, size, size), strides)
    x.copy_(numbers(images, into, size, size))
    weight = (numbers(channels, into, 3, 3, seed=1) / 4).bfloat16()
    packed = F.pad(weight.permute(0, 2, 3, 1).reshape(channels, -1), (0, 32 - 9 * into)).contiguous()
    pixels = images * 36
    y = torch.full((pixels, channels), float("nan")).bfloat16()
    partials = torch.full((1, 4, channels), float("nan"))
    node = kernels.bf16.StemConv(
        images=x.data_ptr(),
        strides=list(x.stride()),
        weight=packed.data_ptr(),
        out=output(kernels, y, partials),
        images_count=images,
        height=size,
        width=size,
        in_channels=into,
        kernel=3,
        stride=2,
    )
    kernels.bf16.stem_conv(node)
    expected = F.conv2d(x.bfloat16().double(), weight.double(), stride=2, padding=1).permute(0, 2, 3, 1)
    found = y.double().view(images, 6, 6, channels)
    assert (found - expected).abs().max() <= 2.0**-7 * expected.abs().max()


def test_head_pool(kernels: Kernels) -> None:
    into, channels, image_pixels = 64, 128, 49
    images = FAR // (into * image_pixels) + 9
    x = sparse(images, image_pixels, into)
    x[-1] = numbers(image_pixels, into)
    weight, affine = (numbers(channels, into, seed=1) / 8).bfloat16(), affine_of(channels)
    pooled = torch.full((images, channels), float("nan"))
    node = kernels.bf16.HeadPool(
        x=x.data_ptr(),
        weight=weight.data_ptr(),
        affine=affine.data_ptr(),
        pooled=pooled.data_ptr(),
        images=images,
        image_pixels=image_pixels,
        in_channels=into,
        channels=channels,
        activation=RELU,
    )
    kernels.bf16.head_pool([node])
    expected = (x[-1].double() @ weight.double().T + 0.25).relu().mean(0)
    written = ~pooled[-1].isnan()
    assert written.sum() >= 64
    assert (pooled[-1].double() - expected)[written].abs().max() <= 1e-5 * expected.max()
    assert pooled[0].isnan().all()


def test_squeeze(kernels: Kernels) -> None:
    channels, image_pixels = 96, 49
    images = FAR // (channels * image_pixels) + 9
    d = sparse(images, image_pixels, channels, dtype=torch.float16)
    d[-1] = numbers(image_pixels, channels)
    affine, pooled = affine_of(channels), torch.full((images, channels), float("nan"))
    node = kernels.bf16.Squeeze(
        d=d.data_ptr(),
        affine=affine.data_ptr(),
        pooled=pooled.data_ptr(),
        images=images,
        image_pixels=image_pixels,
        channels=channels,
        activation=RELU,
    )
    kernels.bf16.squeeze([node])
    expected = (d[-1].double() + 0.25).relu().mean(0)
    written = ~pooled[-1].isnan()
    assert written.sum() >= 32
    assert (pooled[-1].double() - expected)[written].abs().max() <= 1e-5 * expected.max()
    assert pooled[0].isnan().all()


def test_path_cross_entropy(kernels: Kernels) -> None:
    paths, classes = 3, 1000
    images = FAR // (2 * classes) + 999
    logits = sparse(paths, images, classes, dtype=torch.float32)
    logits[-1, -8:] = numbers(8, classes)
    targets = torch.arange(images) % classes
    losses = torch.full((paths, images), float("nan"))
    correct, status = torch.zeros(paths, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    node = kernels.PathCrossEntropy(
        logits=logits.data_ptr(),
        targets=targets.data_ptr(),
        image_losses=losses.data_ptr(),
        correct=correct.data_ptr(),
        status=status.data_ptr(),
        paths=paths,
        images=images,
        classes=classes,
        label_smoothing=0.1,
    )
    kernels.path_cross_entropy(node)
    expected = F.cross_entropy(logits[-1, -8:].double(), targets[-8:], reduction="none", label_smoothing=0.1)
    written = ~losses[-1, -8:].isnan()
    assert written.any()
    assert (losses[-1, -8:].double() - expected)[written].abs().max() < 1e-5
    assert losses[:-1].isnan().all()
