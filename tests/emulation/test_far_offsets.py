"""Maps of more than 2^32 elements: the last blocks of a launch, in memory of which little is ever touched.

Only these blocks are executed. What they write is compared with float64, and the memory's first pages, where offsets
in elements or in bytes would lead that have lost their high bits, have to be zeros still.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emulated_device import configured
from emulation_build import build, load
from torch import Tensor

pytestmark = pytest.mark.slow

MAP_NORESERVE = 0x4000  # Linux; Python has no name for it yet
FAR = 1 << 32  # elements
MAX_UNITS = 2048  # kMaxUnits (pointwise.cuh) as nvcc has it
FIRST = 1 << 20  # elements at the beginning that are looked at
LINEAR, RELU = 0, 1

Kernels = Any


@dataclass(frozen=True)
class Maps:
    """Kernels for maps of a type.

    Attributes:
        kernels: of greedynas_ext._cuda.
        dtype: of maps and of the weights of most convolutions.
        stored: of depthwise outputs, and of the weights before and behind them.
        tolerance: relative to the largest value; of sums, of which those of depthwise convolutions are `stored`.
        group: channels that a block makes, at least.
    """

    kernels: Kernels
    dtype: torch.dtype
    stored: torch.dtype
    tolerance: float
    group: int


MAPS = {
    "bf16": (torch.bfloat16, torch.float16, 2.0**-7, 48),
    "fp16": (torch.float16, torch.float16, 2.0**-9, 48),
    "fp32": (torch.float32, torch.float32, 1e-5, 32),
}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernels]:
    module = load(build(tmp_path_factory.mktemp("far"), [f"-DGREEDYNAS_MAX_UNITS={MAX_UNITS}"]))
    with configured(str(module.__file__)) as device:
        device.last_blocks = 1
        device.multiprocessors = 1 << 20  # a block has one piece of work
        yield module.kernels


@pytest.fixture(params=list(MAPS))
def maps(kernels: Kernels, request: pytest.FixtureRequest) -> Maps:
    return Maps(getattr(kernels, request.param), *MAPS[request.param])


def sparse(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros, which take memory only where something is written."""
    count = torch.Size(shape).numel()
    memory = mmap.mmap(-1, count * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pixels_beyond(channels: int) -> int:
    """Of which the last ones lie behind FAR elements."""
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


@pytest.mark.parametrize("moments", [False, True], ids=["plain", "moments"])
def test_finish_map(maps: Maps, moments: bool) -> None:
    channels = 32
    y = sparse(pixels_beyond(channels), channels, dtype=maps.dtype)
    y[-300:] = numbers(300, channels)
    before, affine = y[-300:].double(), affine_of(channels)
    node = maps.kernels.FinishMap(
        map=y.data_ptr(), affine=affine.data_ptr(), pixels=len(y), channels=channels, activation=RELU
    )
    mean, covariance = torch.zeros(channels), torch.zeros(channels, channels)
    partials = sparse(maps.kernels.finish_map_floats(len(y), channels) if moments else 1, dtype=torch.float32)
    if moments:
        node.mean, node.covariance, node.partials = mean.data_ptr(), covariance.data_ptr(), partials.data_ptr()
    maps.kernels.finish_map([node])
    changed = int((y[-300:].double() != before).any(1).sum())
    assert changed >= 30
    check_only_the_end(y, (before[-30:] + 0.25).relu(), maps.tolerance / 2)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (7, 2)])
def test_expand_depthwise(maps: Maps, kernel: int, stride: int) -> None:
    into, hidden, size = 64, 96, 8
    out = size // stride
    images = FAR // (size * size * into) + 5 if stride == 1 else FAR // (out * out * hidden) + 5
    x = sparse(images, size, size, into, dtype=maps.dtype)
    x[-9:] = numbers(9, size, size, into)
    expand = (numbers(hidden, into, seed=1) / 8).to(maps.dtype)
    depthwise = (numbers(kernel * kernel, hidden, seed=2) / kernel).to(maps.stored)
    affine = affine_of(hidden)
    d = sparse(images, out, out, hidden, dtype=maps.stored)
    node = maps.kernels.ExpandDepthwise(
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
    maps.kernels.expand_depthwise([node])
    u = (x[-1:].double() @ expand.double().T + 0.25).relu().permute(0, 3, 1, 2)
    taps = depthwise.double().T.reshape(hidden, 1, kernel, kernel)
    expected = F.conv2d(u, taps, stride=stride, padding=kernel // 2, groups=hidden).permute(0, 2, 3, 1)
    written = (d[-1] != 0).flatten(0, 1).any(0)  # a block has some of the channels
    assert written.sum() >= maps.group
    expected[..., ~written] = 0
    check_only_the_end(d, expected, min(maps.tolerance, 4e-3))


def output(maps: Maps, y: Tensor, partials: Tensor) -> Any:
    return maps.kernels.PointwiseOutput(
        y=y.data_ptr(), partials=partials.data_ptr(), channels=y.shape[-1], activation=LINEAR
    )


def check_pointwise(maps: Maps, launch: Callable[[Any], None], y: Tensor, expected: Tensor) -> None:
    """`launch(output)`; expected: of the last pixels."""
    partials = torch.full((maps.kernels.pointwise_units(len(y)), 4, y.shape[1]), float("nan"))
    launch(output(maps, y, partials))
    check_only_the_end(y, expected, maps.tolerance)
    assert partials[:-1].isnan().all()
    pilot, sums, _, count = partials[-1].double()
    assert (count == unit_pixels(len(y))).all()
    mean = y[-unit_pixels(len(y)) :].double().mean(0)
    assert torch.allclose(pilot + sums / count, mean, rtol=1e-4, atol=1e-6)


def test_project(maps: Maps) -> None:
    hidden, channels = 64, 64
    d = sparse(pixels_beyond(hidden), hidden, dtype=maps.stored)
    d[-500:] = numbers(500, hidden)
    weight, affine = (numbers(channels, hidden, seed=1) / 8).to(maps.stored), affine_of(hidden)
    y = sparse(len(d), channels, dtype=maps.dtype)

    def launch(out: Any) -> None:
        node = maps.kernels.Project(
            d=d.data_ptr(),
            affine=affine.data_ptr(),
            weight=weight.data_ptr(),
            out=out,
            pixels=len(d),
            image_pixels=64,
            hidden_channels=hidden,
            activation=RELU,
        )
        maps.kernels.project([node])

    rows = min(500, unit_pixels(len(d)))
    check_pointwise(maps, launch, y, (d[-rows:].double() + 0.25).relu() @ weight.double().T)


def test_strided_conv(maps: Maps) -> None:
    into, channels, size = 64, 48, 6  # one pass
    images = FAR // (9 * channels) + 700
    x = sparse(images, size, size, into, dtype=maps.dtype)
    x[-40:] = numbers(40, size, size, into)
    weight = (numbers(channels, into, seed=1) / 8).to(maps.dtype)
    y = sparse(images * 9, channels, dtype=maps.dtype)

    def launch(out: Any) -> None:
        node = maps.kernels.StridedConv(
            x=x.data_ptr(),
            weight=weight.data_ptr(),
            out=out,
            images=images,
            height=size,
            width=size,
            in_channels=into,
            stride=2,
        )
        maps.kernels.strided_conv([node])

    seen = x[-40:, ::2, ::2].double().reshape(-1, into)[-unit_pixels(len(y)) :]
    check_pointwise(maps, launch, y, seen @ weight.double().T)


def test_stem_conv_of_images_far_apart(maps: Maps) -> None:
    """Strides of the images, channels and rows: some beyond 2^31, and 2^32, elements."""
    images, into, size, channels = 3, 2, 12, 16
    strides = ((1 << 31) + 1003, (1 << 30) + 17, 57, 3)
    memory = sparse(
        sum((n - 1) * s for n, s in zip((images, into, size, size), strides, strict=True)) + 1, dtype=torch.float32
    )
    x = torch.as_strided(memory, (images, into, size, size), strides)
    x.copy_(numbers(images, into, size, size))
    weight = (numbers(channels, into, 3, 3, seed=1) / 4).to(maps.dtype)
    packed = F.pad(weight.permute(0, 2, 3, 1).reshape(channels, -1), (0, 32 - 9 * into)).contiguous()
    pixels = images * 36
    y = torch.full((pixels, channels), float("nan")).to(maps.dtype)
    partials = torch.full((1, 4, channels), float("nan"))
    node = maps.kernels.StemConv(
        images=x.data_ptr(),
        strides=list(x.stride()),
        weight=packed.data_ptr(),
        out=output(maps, y, partials),
        images_count=images,
        height=size,
        width=size,
        in_channels=into,
        kernel=3,
        stride=2,
    )
    maps.kernels.stem_conv(node)
    expected = F.conv2d(x.to(maps.dtype).double(), weight.double(), stride=2, padding=1).permute(0, 2, 3, 1)
    found = y.double().view(images, 6, 6, channels)
    assert (found - expected).abs().max() <= maps.tolerance * expected.abs().max()


def test_arrange_channels(maps: Maps) -> None:
    """Every other channel of rows of 32, and half of the rows of 64 that become."""
    x = sparse(pixels_beyond(32), 32, dtype=maps.dtype)
    x[-60:] = numbers(60, 32)
    y = sparse(len(x), 64, dtype=maps.dtype)
    sources = [(x.data_ptr(), 32, 1, 2, 16, 0, 1), (x.data_ptr(), 32, 0, 1, 32, 32, 1)]
    maps.kernels.arrange_channels(sources, y.data_ptr(), 64, RELU, len(x))
    expected = torch.zeros(60, 64, dtype=torch.float64)
    expected[:, :16], expected[:, 32:] = x[-60:, 1::2].double().relu(), x[-60:].double().relu()
    written = y[-60:].any(1)  # a block has 256 vectors of 8 channels
    assert written.sum() >= 1
    expected[~written] = 0
    check_only_the_end(y, expected, 0)


def test_depthwise_conv(maps: Maps) -> None:
    channels, size, stride = 32, 8, 2
    images = FAR // (channels * (size // stride) ** 2) + 5
    x = sparse(images, size, size, channels, dtype=maps.dtype)
    x[-1] = numbers(size, size, channels)
    weight, ones, affine = numbers(9, channels, seed=1) / 3, torch.ones(channels), affine_of(channels)
    y = sparse(images, size // stride, size // stride, channels, dtype=maps.dtype)
    node = maps.kernels.DepthwiseConv(
        x=x.data_ptr(),
        affine=affine.data_ptr(),
        weight=weight.data_ptr(),
        stored_factor=ones.data_ptr(),
        y=y.data_ptr(),
        images=images,
        height=size,
        width=size,
        channels=channels,
        kernel=3,
        stride=stride,
        activation=RELU,
    )
    maps.kernels.depthwise_conv(node)
    u = (x[-1:].double() + 0.25).relu().permute(0, 3, 1, 2)
    taps = weight.double().T.reshape(channels, 1, 3, 3)
    expected = F.conv2d(u, taps, stride=stride, padding=1, groups=channels).permute(0, 2, 3, 1)[0]
    written = y[-1].any(-1)
    assert written.any()
    expected[~written] = 0
    check_only_the_end(y.flatten(0, 2), expected.flatten(0, 1), maps.tolerance)


def test_pool(maps: Maps) -> None:
    channels, size = 32, 8
    images = FAR // (channels * size * size) + 1500
    x = sparse(images, size, size, channels, dtype=maps.dtype)
    pixels = images * size * size
    last = unit_pixels(pixels)
    seen = -(-last // (size * size)) + 1
    x[-seen:] = numbers(seen, size, size, channels)
    y = sparse(pixels, channels, dtype=maps.dtype)
    partials = torch.full((maps.kernels.pointwise_units(pixels), 4, channels), float("nan"))
    node = maps.kernels.Pool(
        x=x.data_ptr(),
        y=y.data_ptr(),
        partials=partials.data_ptr(),
        images=images,
        height=size,
        width=size,
        channels=channels,
        kernel=3,
        stride=1,
        pooling=1,
        activation=LINEAR,
    )
    maps.kernels.pool(node)
    expected = F.max_pool2d(x[-seen:].double().permute(0, 3, 1, 2), 3, 1, 1).permute(0, 2, 3, 1).flatten(0, 2)
    check_only_the_end(y, expected[-last:], 0)
    assert partials[:-1].isnan().all()
    pilot, sums, _, count = partials[-1].double()
    assert (count == last).all()
    assert torch.allclose(pilot + sums / count, y[-last:].double().mean(0), rtol=1e-4, atol=1e-6)


def test_head_pool(maps: Maps) -> None:
    into, channels, image_pixels = 64, 128, 49
    images = FAR // (into * image_pixels) + 9
    x = sparse(images, image_pixels, into, dtype=maps.dtype)
    x[-1] = numbers(image_pixels, into)
    weight, affine = (numbers(channels, into, seed=1) / 8).to(maps.dtype), affine_of(channels)
    pooled = sparse(images, channels, dtype=torch.float32)
    node = maps.kernels.HeadPool(
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
    maps.kernels.head_pool([node])
    check_pooled(pooled, (x[-1].double() @ weight.double().T + 0.25).relu().mean(0), 64)


def check_pooled(pooled: Tensor, expected: Tensor, least: int) -> None:
    """The last image's row, as far as it was written: at least so many channels, of which none is 0."""
    assert (expected > 0).all()
    written = pooled[-1] != 0
    assert written.sum() >= least
    assert (pooled[-1].double() - expected)[written].abs().max() <= 1e-5 * expected.max()
    assert (pooled[:1000] == 0).all()


def test_squeeze(maps: Maps) -> None:
    channels, image_pixels = 96, 49
    images = FAR // (channels * image_pixels) + 9
    d = sparse(images, image_pixels, channels, dtype=maps.stored)
    d[-1] = numbers(image_pixels, channels)
    affine, pooled = affine_of(channels), sparse(images, channels, dtype=torch.float32)
    node = maps.kernels.Squeeze(
        d=d.data_ptr(),
        affine=affine.data_ptr(),
        pooled=pooled.data_ptr(),
        images=images,
        image_pixels=image_pixels,
        channels=channels,
        activation=RELU,
    )
    maps.kernels.squeeze([node])
    check_pooled(pooled, (d[-1].double() + 0.25).relu().mean(0), 32)


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
