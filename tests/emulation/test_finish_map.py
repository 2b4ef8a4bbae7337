"""csrc/cuda/finish_map.cu: the map against float64 of the same numbers, moments against float64 of the map
that the kernel has stored."""

import math

import pytest
import torch
from precisions import of_all, of_both, of_floats

ACTIVATIONS = [
    lambda x: x,
    torch.relu,
    torch.nn.functional.relu6,
    torch.nn.functional.hardswish,
    torch.nn.functional.silu,
]
BOUNDS = [0.0, 0.0, 6.0, 1 / 6, 1.0]
GUARD = 128
NAN = math.nan


def row_channels(channels):
    return -(-channels // 8) * 8


def padded(values, *shape):
    result = values.new_zeros(shape)
    result[tuple(slice(0, n) for n in values.shape)] = values
    return result


class Case:
    """One node. ratio: means over deviations of what the affine map gives."""

    def __init__(
        self, cuda, generator, pixels, channels, *, activation=0, affine=True, residual=False, moments=True, ratio=1.0
    ):
        row = row_channels(channels)
        self.cuda, self.pixels, self.channels, self.row, self.activation = cuda, pixels, channels, row, activation
        mixed = torch.randn(pixels, channels, generator=generator) + torch.randn(pixels, 1, generator=generator)
        raw = mixed * (torch.rand(channels, generator=generator) + 0.2)
        scale = torch.randn(channels, generator=generator)
        shift = ratio * scale.abs() * (1 + torch.rand(channels, generator=generator)) if affine else torch.zeros(1)
        if not affine:
            raw = raw + ratio * (1 + torch.rand(channels, generator=generator))
        self.raw = padded(raw, pixels, row).to(cuda.dtype)
        self.residual = None
        if residual:
            self.residual = padded(torch.randn(pixels, channels, generator=generator), pixels, row).to(cuda.dtype)
        self.affine = torch.zeros(3, row)
        self.affine[0, :channels], self.affine[1, :channels] = scale, shift
        self.affine[2, :channels] = BOUNDS[activation]
        self.has_affine, self.has_moments = affine, moments
        self.affine_memory = self.affine.to(cuda.device)
        self.residual_memory = self.residual.to(cuda.device) if residual else None
        self.poison()

    def poison(self):
        """A node as it was at first."""
        device = self.cuda.device
        floats = self.cuda.maps.finish_map_floats(self.pixels, self.channels)
        self.map = torch.full((self.pixels * self.row + GUARD,), NAN, dtype=self.cuda.dtype, device=device)
        self.map[:-GUARD] = self.raw.flatten().to(device)
        self.mean, self.covariance, self.partials = (
            torch.full((size + GUARD,), NAN, device=device) for size in (self.row, self.row**2, floats)
        )

    def node(self):
        return self.cuda.maps.FinishMap(
            map=self.map.data_ptr(),
            affine=self.affine_memory.data_ptr() if self.has_affine else 0,
            residual=self.residual_memory.data_ptr() if self.residual is not None else 0,
            mean=self.mean.data_ptr() if self.has_moments else 0,
            covariance=self.covariance.data_ptr() if self.has_moments else 0,
            partials=self.partials.data_ptr() if self.has_moments else 0,
            pixels=self.pixels,
            channels=self.channels,
            activation=self.activation,
        )

    def outputs(self):
        for memory in (self.map, self.mean, self.covariance, self.partials):
            assert memory[-GUARD:].isnan().all()
        y = self.map[:-GUARD].view(self.pixels, self.row).cpu()
        return y, self.mean[:-GUARD].cpu(), self.covariance[:-GUARD].view(self.row, self.row).cpu()

    def check_map(self):
        y, mean, covariance = self.outputs()
        assert (y[:, self.channels :] == 0).all()
        if not self.has_affine:
            assert torch.equal(y, self.raw)
        else:
            affine, raw = self.affine.double(), self.raw.double()
            expected = ACTIVATIONS[self.activation](raw * affine[0] + affine[1])
            size = (raw * affine[0]).abs() + affine[1].abs()
            if self.residual is not None:
                expected += self.residual.double()
                size += self.residual.double().abs()
            # Rounded from sums in float (the exponential: 2^-21).
            error, limits = (y.double() - expected).abs(), torch.finfo(y.dtype)
            rounding = limits.eps / 2 * (expected.abs() + limits.smallest_normal)
            assert (error <= rounding + 2.0**-20 * size).all()
        if not self.has_moments:
            assert mean.isnan().all()
            assert covariance.isnan().all()
        return y

    def errors(self):
        """Of means, in deviations, and of covariances, in products of deviations."""
        y, mean, covariance = self.outputs()
        values = y[:, : self.channels].double()
        exact = torch.cov(values.T, correction=0).view(self.channels, self.channels)
        deviation = exact.diag().sqrt()
        assert (mean[self.channels :] == 0).all()
        assert (covariance[self.channels :] == 0).all()
        assert torch.equal(covariance, covariance.T)
        assert (covariance.diag() >= 0).all()
        mean_error = ((mean[: self.channels] - values.mean(0)).abs() - 2.0**-24 * mean[: self.channels].abs()).clamp(0)
        error = (covariance[: self.channels, : self.channels] - exact).abs()
        constant = deviation == 0
        assert (mean_error[constant] == 0).all()
        assert (error[constant] == 0).all()
        mean_error, error = mean_error / deviation, error / (deviation * deviation[:, None])
        return mean_error[~constant].max().nan_to_num(0) if (~constant).any() else 0.0, error[~constant][:, ~constant]

    def check(self, tolerance=None):
        self.check_map()
        mean_error, error = self.errors()
        # Sums in float cost 2^-24 a step, 26 times that where means are 5 deviations off. About means further off,
        # distances are rounded to the map's type, in the tails of a distribution alone: by 2^-8 at most (bfloat16),
        # twice that in a square, and as each its own way the error goes with the root of the count.
        # Distances of floats are not rounded; their pilot is a pixel, 5 deviations off at most.
        if self.cuda.dtype == torch.float32:
            tolerance = 8e-6
        tolerance = tolerance or 2.0**-6 / self.pixels**0.5 + 4e-6
        assert mean_error <= tolerance
        assert (error <= tolerance).all(), error.max()


def run(cuda, *cases):
    cuda.maps.finish_map([case.node() for case in cases], cuda.stream)
    cuda.synchronize()


# Sweeps have 16 pixels, of up to 8 groups of warps; chunks, under emulation, 128 or more.
@of_both
@pytest.mark.parametrize("pixels", [1, 2, 15, 16, 17, 127, 128, 129, 255, 256, 257, 1000])
def test_pixels(cuda, pixels):
    case = Case(cuda, torch.Generator().manual_seed(pixels), pixels, 16, activation=pixels % 5)
    run(cuda, case)
    case.check()


# Half tiles and whole ones, of 1 to 12 and, in windows, more.
@of_all
@pytest.mark.parametrize("channels", [1, 8, 9, 24, 32, 40, 57, 72, 96, 104, 120, 136, 144, 160, 192])
@pytest.mark.parametrize("residual", [False, True])
def test_channels(cuda, channels, residual):
    generator = torch.Generator().manual_seed(channels)
    case = Case(cuda, generator, 70, channels, activation=channels % 5, residual=residual)
    run(cuda, case)
    case.check()


# Each has a kernel of its own, with an activation and without.
@of_all
@pytest.mark.parametrize("tiles", range(1, 13))
def test_tiles(cuda, tiles):
    for activation in (0, 1):
        case = Case(cuda, torch.Generator().manual_seed(tiles), 20, 16 * tiles - 7, activation=activation)
        run(cuda, case)
        case.check()


@of_all
@pytest.mark.parametrize("channels", [200, 256, 264, 320])
@pytest.mark.parametrize("affine", [False, True])
def test_windows_of_channels(cuda, channels, affine):
    generator = torch.Generator().manual_seed(channels)
    case = Case(cuda, generator, 50, channels, affine=affine, residual=affine, activation=1)
    run(cuda, case)
    case.check()


# The patches of floats' moments below, at and above what blocks of 256 and of 512 threads have; sweeps of 21 to 64
# pixels, and chunks of several.
@of_floats
@pytest.mark.parametrize("channels", [8, 24, 88, 176, 184, 248, 256])
def test_patches_of_floats(cuda, channels):
    generator = torch.Generator().manual_seed(channels)
    for pixels in (20, 21, 65, 700):
        case = Case(cuda, generator, pixels, channels, activation=1, residual=True)
        run(cuda, case)
        case.check()


@of_floats
def test_more_channels_than_moments_of_floats_have(cuda):
    assert cuda.maps.finish_map_floats(10, 4096) > 0
    with pytest.raises(ValueError, match="at most 4096 channels with moments, got 4097"):
        cuda.maps.finish_map_floats(10, 4097)


@of_all
def test_several_chunks(cuda):
    """Of one window and of several."""
    for channels, pixels in [(40, 5000), (264, 3000)] if cuda.precision == "bf16" else [(40, 700), (264, 700)]:
        case = Case(cuda, torch.Generator().manual_seed(channels), pixels, channels, residual=True)
        run(cuda, case)
        case.check()


@of_all
@pytest.mark.parametrize("ratio", [0.0, 2.0, 4.0, 30.0, 300.0])
def test_means_far_from_0(cuda, ratio):
    case = Case(cuda, torch.Generator().manual_seed(int(ratio)), 4000, 24, ratio=ratio)
    run(cuda, case)
    case.check(1e-4)


@of_all
@pytest.mark.parametrize("activation", range(5))
@pytest.mark.parametrize(("pixels", "channels"), [(1, 8), (4, 16), (33, 40), (700, 192), (41, 2056)])
def test_map_alone(cuda, activation, pixels, channels):
    generator = torch.Generator().manual_seed(pixels)
    cases = [
        Case(cuda, generator, pixels, channels, activation=activation, moments=False, residual=residual)
        for residual in (False, True)
    ]
    run(cuda, *cases)
    for case in cases:
        case.check_map()


def test_neither_map_nor_moments_are_asked_for(cuda):
    case = Case(cuda, torch.Generator().manual_seed(1), 20, 16, affine=False, moments=False)
    run(cuda, case)
    case.check_map()


@of_all
@pytest.mark.parametrize("channels", [16, 40, 72, 216])
def test_moments_alone(cuda, channels):
    case = Case(cuda, torch.Generator().manual_seed(channels), 90, channels, affine=False)
    run(cuda, case)
    case.check()


@of_all
@pytest.mark.parametrize("channels", [16, 48, 208])
def test_group(cuda, channels):
    """Nodes of every kind; a node's results are the same in any company, and in every run."""
    generator = torch.Generator().manual_seed(channels)
    cases = [
        Case(cuda, generator, 600, channels, activation=1),
        Case(cuda, generator, 600, channels, moments=False, activation=2),
        Case(cuda, generator, 600, channels, residual=True),
        Case(cuda, generator, 600, channels, affine=False),
        Case(cuda, generator, 600, channels, moments=False, residual=True),
    ]
    run(cuda, *cases)
    for case in cases:
        case.check() if case.has_moments else case.check_map()
        together = case.outputs()
        case.poison()
        run(cuda, case)
        for one, other in zip(case.outputs(), together, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@of_all
@pytest.mark.parametrize("channels", [15, 40, 261])
@pytest.mark.parametrize("value", [NAN, math.inf])
def test_nan_and_infinity_stay_in_their_channel(cuda, channels, value):
    """In the samples that pilots are made of, and elsewhere."""
    for pixel in (0, 37):
        case = Case(cuda, torch.Generator().manual_seed(channels), 100, channels, activation=1)
        case.raw[pixel, 11] = value
        case.affine[0, 11] = 1
        case.affine_memory.copy_(case.affine)
        case.poison()
        run(cuda, case)
        y, mean, covariance = case.outputs()
        assert y[pixel, 11].isnan() if math.isnan(value) else y[pixel, 11] == value
        assert not mean[11].isfinite()
        assert covariance[11, :channels].isnan().all()
        assert covariance[:channels, 11].isnan().all()
        for padding in (mean, covariance, covariance.T):
            assert (padding[channels:] == 0).all()
        rest = [c for c in range(channels) if c != 11]
        assert y[:, rest].isfinite().all()
        values = y[:, rest].double()
        torch.testing.assert_close(mean[rest].double(), values.mean(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            covariance[rest][:, rest].double(), torch.cov(values.T, correction=0), rtol=1e-3, atol=1e-3
        )
