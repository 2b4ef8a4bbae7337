"""strided_conv and stem_conv: stored raw with their statistics, or mapped."""

import pytest
import torch
from pointwise_reference import (
    ACTIVATIONS,
    HSWISH,
    LINEAR,
    activate,
    check_map,
    check_partials,
    guarded,
    padded_affine,
    random_affine,
    row_channels,
    rows,
)
from precisions import of_all


def output(cuda, channels, y, partials=None, affine=None, residual=None, activation=LINEAR):
    pointers = {"y": y, "partials": partials, "affine": affine, "residual": residual}
    return cuda.maps.PointwiseOutput(
        **{name: 0 if t is None else t.data_ptr() for name, t in pointers.items()},
        channels=channels,
        activation=activation,
    )


def check_raw(cuda, launch, expected, magnitude):
    """`launch(output)` and what it has to give, [pixels, channels] in float64; `magnitude`: of the terms."""
    pixels, channels = expected.shape
    y, check_y = guarded(cuda, (pixels, row_channels(channels)), cuda.dtype)
    units = cuda.maps.pointwise_units(pixels)
    partials, check_sums = guarded(cuda, (units, 4, row_channels(channels)), torch.float32)
    launch(output(cuda, channels, y, partials))
    check_y()
    check_sums()
    # Products of bfloat16 are exact in single precision; sums are not.
    check_map(y.cpu(), expected, 2.0**-20 * magnitude)
    check_partials(partials.cpu(), y.cpu(), channels)
    return y.cpu()


def check_mapped(cuda, launch, expected, magnitude, activation, *, with_residual):
    g = torch.Generator().manual_seed(activation)
    pixels, channels = expected.shape
    affine = padded_affine(random_affine(g, channels, activation, torch.ones(channels), 0.0), channels)
    residual = rows(torch.randn(pixels, channels, generator=g), cuda.dtype) if with_residual else None
    y, check = guarded(cuda, (pixels, row_channels(channels)), cuda.dtype)
    on_device = [None if t is None else t.to(cuda.device) for t in (affine, residual)]
    launch(output(cuda, channels, y, None, *on_device, activation))
    check()
    scale, shift, bound = affine[:, :channels].double()
    u = expected * scale + shift
    expected = activate(u, activation, bound)
    if residual is not None:
        expected = expected + residual[:, :channels].double()
    error = 2.0**-20 * (magnitude * scale + u.abs() + expected.abs() + 1)  # fast exponentials and quotients
    check_map(y.cpu(), expected, error)


class Strided:
    """A strided convolution, its expected sums, and how large their terms are."""

    def __init__(self, cuda, g, images, height, width, in_channels, channels, stride):
        self.cuda, self.sizes = cuda, (images, height, width)
        self.in_channels, self.stride = in_channels, stride
        x = rows(torch.randn(images, height, width, in_channels, generator=g), cuda.dtype)
        weight = rows(torch.randn(channels, in_channels, generator=g), cuda.dtype, pad_rows=True)
        seen = x[:, ::stride, ::stride, :in_channels].double().reshape(-1, in_channels)
        self.expected = seen @ weight[:channels, :in_channels].double().T
        self.magnitude = seen.abs() @ weight[:channels, :in_channels].double().abs().T
        self.x, self.weight = x.to(cuda.device), weight.to(cuda.device)

    def node(self, out):
        images, height, width = self.sizes
        return self.cuda.maps.StridedConv(
            x=self.x.data_ptr(),
            weight=self.weight.data_ptr(),
            out=out,
            images=images,
            height=height,
            width=width,
            in_channels=self.in_channels,
            stride=self.stride,
        )

    def launch(self, out):
        self.cuda.maps.strided_conv([self.node(out)], self.cuda.stream)
        self.cuda.synchronize()


@of_all
@pytest.mark.parametrize(
    ("images", "height", "width", "in_channels", "channels", "stride"),
    [
        (3, 13, 11, 16, 32, 2),
        (2, 16, 16, 24, 40, 2),  # 128 pixels
        (129, 1, 1, 33, 24, 2),
        (70, 3, 4, 65, 80, 2),
        (1, 24, 23, 72, 96, 2),
        (2, 15, 17, 8, 192, 1),
        (1, 17, 17, 96, 320, 2),
        (1, 31, 9, 12, 19, 3),
        (2, 9, 8, 130, 160, 1),
        (1, 2, 260, 16, 16, 1),
        (5, 23, 25, 72, 96, 2),  # units of several tiles (under emulation)
        (70, 5, 7, 8, 16, 2),
    ],
)
def test_strided_shapes(cuda, images, height, width, in_channels, channels, stride):
    g = torch.Generator().manual_seed(images * height * width)
    conv = Strided(cuda, g, images, height, width, in_channels, channels, stride)
    check_raw(cuda, conv.launch, conv.expected, conv.magnitude)


def test_strided_units_of_several_tiles(cuda):
    """On every device."""
    conv = Strided(cuda, torch.Generator().manual_seed(0), 7, 387, 389, 8, 8, 2)
    check_raw(cuda, conv.launch, conv.expected, conv.magnitude)


@of_all
@pytest.mark.parametrize(("activation", "with_residual"), [(LINEAR, False), *[(a, True) for a in ACTIVATIONS]])
def test_strided_with_known_statistics(cuda, activation, with_residual):
    conv = Strided(cuda, torch.Generator().manual_seed(1), 2, 15, 18, 20, 42, 2)
    check_mapped(cuda, conv.launch, conv.expected, conv.magnitude, activation, with_residual=with_residual)


# Every width of a pass, with one chunk and more.
@of_all
@pytest.mark.parametrize(
    ("in_channels", "channels"),
    [(24, 16), (40, 13), (40, 24), (72, 32), (16, 40), (72, 64), (40, 80), (72, 96), (40, 160), (24, 192)],
)
def test_strided_widths(cuda, in_channels, channels):
    conv = Strided(cuda, torch.Generator().manual_seed(channels), 2, 9, 10, in_channels, channels, 2)
    check_raw(cuda, conv.launch, conv.expected, conv.magnitude)
    check_mapped(cuda, conv.launch, conv.expected, conv.magnitude, HSWISH, with_residual=True)


@of_all
def test_strided_group(cuda):
    g = torch.Generator().manual_seed(2)
    convs = [Strided(cuda, g, 2, 9, 20, in_channels, 24, 2) for in_channels in (16, 72, 8)]
    maps = [guarded(cuda, (len(c.expected), 24), cuda.dtype) for c in convs]
    cuda.maps.strided_conv([c.node(output(cuda, 24, y)) for c, (y, _) in zip(convs, maps, strict=True)], cuda.stream)
    cuda.synchronize()
    for conv, (y, check) in zip(convs, maps, strict=True):
        check()
        check_map(y.cpu(), conv.expected, 2.0**-20 * conv.magnitude)


@of_all
def test_strided_not_finite(cuda):
    """NaN in one pixel of x shows in that pixel's outputs, or nowhere."""
    conv = Strided(cuda, torch.Generator().manual_seed(3), 1, 7, 7, 16, 10, 2)
    conv.x[0, 4, 2, 5] = float("nan")
    conv.x[0, 3, 3] = float("nan")
    y, check = guarded(cuda, (16, 16), cuda.dtype)
    conv.launch(output(cuda, 10, y))
    check()
    bad = torch.zeros(16, 16, dtype=torch.bool)
    bad[2 * 4 + 1, :10] = True
    assert torch.equal(y.cpu().isnan(), bad)


class Stem:
    def __init__(self, cuda, images, channels, kernel, stride, g):
        self.cuda, self.images, self.kernel, self.stride = cuda, images, kernel, stride
        in_channels = images.shape[1]
        weight = torch.randn(channels, in_channels, kernel, kernel, generator=g).to(cuda.dtype)
        depth = -(-in_channels * kernel * kernel // 16) * 16
        flat = weight.permute(0, 2, 3, 1).reshape(channels, -1)
        pad = (0, depth - flat.shape[1], 0, row_channels(channels) - channels)
        self.weight = torch.nn.functional.pad(flat, pad).contiguous().to(cuda.device)
        self.images = images.to(cuda.device)
        rounded = images.to(cuda.dtype).double()
        self.expected = self.convolve(rounded, weight.double())
        self.magnitude = self.convolve(rounded.abs(), weight.double().abs())

    def convolve(self, images, weight):
        result = torch.nn.functional.conv2d(images, weight, stride=self.stride, padding=self.kernel // 2)
        return result.permute(0, 2, 3, 1).reshape(-1, weight.shape[0])

    def launch(self, out):
        count, in_channels, height, width = self.images.shape
        node = self.cuda.maps.StemConv(
            images=self.images.data_ptr(),
            strides=list(self.images.stride()),
            weight=self.weight.data_ptr(),
            out=out,
            images_count=count,
            height=height,
            width=width,
            in_channels=in_channels,
            kernel=self.kernel,
            stride=self.stride,
        )
        self.cuda.maps.stem_conv(node, self.cuda.stream)
        self.cuda.synchronize()


@of_all
@pytest.mark.parametrize(
    ("shape", "channels", "kernel", "stride"),
    [
        ((2, 3, 17, 18), 32, 3, 2),
        ((1, 3, 16, 16), 16, 3, 1),
        ((2, 3, 16, 17), 24, 3, 2),
        ((130, 3, 1, 1), 32, 3, 2),
        ((2, 1, 13, 11), 40, 5, 2),
        ((1, 4, 19, 9), 72, 7, 2),  # a depth of several chunks, and two passes
        ((3, 16, 7, 8), 32, 1, 1),
        ((1, 2, 12, 30), 13, 3, 3),
        ((1, 24, 9, 9), 64, 7, 1),  # more weights than stay in shared memory
        ((7, 3, 27, 26), 32, 3, 2),  # units of several tiles (under emulation)
        ((9, 4, 13, 14), 24, 5, 1),
    ],
)
def test_stem_shapes(cuda, shape, channels, kernel, stride):
    g = torch.Generator().manual_seed(sum(shape))
    stem = Stem(cuda, torch.randn(shape, generator=g), channels, kernel, stride, g)
    check_raw(cuda, stem.launch, stem.expected, stem.magnitude)


def test_stem_units_of_several_tiles(cuda):
    """On every device."""
    g = torch.Generator().manual_seed(0)
    stem = Stem(cuda, torch.randn(7, 1, 387, 389, generator=g), 8, 3, 2, g)
    check_raw(cuda, stem.launch, stem.expected, stem.magnitude)


@pytest.mark.parametrize(
    "view",
    [
        lambda images: images.to(memory_format=torch.channels_last),
        lambda images: images[:, :, 3:16:2, 2:17],
        lambda images: images.transpose(2, 3),
        lambda images: images[:1].expand(3, -1, -1, -1),
    ],
    ids=["channels last", "part of larger images", "transposed", "one image for all"],
)
def test_stem_strides(cuda, view):
    g = torch.Generator().manual_seed(4)
    images = torch.randn(3, 3, 20, 18, generator=g)
    stem = Stem(cuda, view(images), 32, 3, 2, g)
    stem.images = view(images.to(cuda.device))
    assert stem.images.stride() == view(images).stride()
    check_raw(cuda, stem.launch, stem.expected, stem.magnitude)


@of_all
@pytest.mark.parametrize("channels", [32, 40])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_stem_with_known_statistics(cuda, activation, channels):
    g = torch.Generator().manual_seed(5)
    stem = Stem(cuda, torch.randn(2, 3, 15, 16, generator=g), channels, 3, 2, g)
    check_mapped(cuda, stem.launch, stem.expected, stem.magnitude, activation, with_residual=False)


@of_all
def test_stem_not_finite(cuda):
    g = torch.Generator().manual_seed(6)
    images = torch.randn(1, 3, 10, 10, generator=g)
    images[0, 1, 4, 5] = float("nan")
    images[0, 2, 9, 9] = float("inf")
    stem = Stem(cuda, images, 8, 3, 2, g)
    y, check = guarded(cuda, stem.expected.shape, cuda.dtype)
    stem.launch(output(cuda, 8, y))
    check()
    assert torch.equal(y.cpu().isnan(), stem.expected.isnan())
    assert torch.equal(y.cpu().isinf(), stem.expected.isinf())
    assert stem.expected.isfinite().any()
