"""csrc/cuda/squeeze_excite.cu against float64, of the same numbers."""

import math

import pytest
import torch
from precisions import of_both

ACTIVATIONS = {
    "linear": lambda x: x,
    "relu": torch.relu,
    "relu6": torch.nn.functional.relu6,
    "hswish": torch.nn.functional.hardswish,
    "silu": torch.nn.functional.silu,
}
GUARD = 16


def row_channels(channels):
    return -(-channels // 8) * 8


class Case:
    def __init__(self, cuda, generator, images, pixels, channels, activation, *, factor=True):
        row = row_channels(channels)
        d = torch.zeros(images, pixels, row, dtype=cuda.stored)
        d[..., :channels] = (torch.randn(images, pixels, channels, generator=generator) * 3).to(cuda.stored)
        power = torch.randint(-6, 7, (channels,), generator=generator).float().exp2()
        if not factor:
            power.fill_(1)
        name = list(ACTIVATIONS)[activation]
        bound = {"relu6": 6 * power, "hswish": 1 / (6 * power), "silu": 1 / power}.get(name, power)
        affine = torch.zeros(3, row)
        affine[0, :channels] = torch.randn(channels, generator=generator) * power
        affine[1, :channels] = torch.randn(channels, generator=generator) * power
        affine[2, :channels] = bound
        self.shape = images, row
        self.channels = channels
        u = (d.double() * affine[0] + affine[1])[..., :channels] / power
        y = ACTIVATIONS[name](u)
        self.expected = y.mean(1)
        # Sums of at most 16 thousand floats, each off by 2^-24 of what goes into it, or less (exponential: 2^-21).
        self.tolerance = 4e-6 * ((d.double() * affine[0]).abs() + affine[1].abs())[..., :channels].mean(1) / power
        packed_factor = torch.ones(row)
        packed_factor[:channels] = power
        self.memory = [v.to(cuda.device) for v in (d, affine, packed_factor)]
        self.pooled = torch.full((images * row + GUARD,), math.nan, device=cuda.device)
        self.node = cuda.maps.Squeeze(
            d=self.memory[0].data_ptr(),
            affine=self.memory[1].data_ptr(),
            factor=self.memory[2].data_ptr() if factor else 0,
            pooled=self.pooled.data_ptr(),
            images=images,
            image_pixels=pixels,
            channels=channels,
            activation=activation,
        )

    def output(self):
        assert self.pooled[-GUARD:].isnan().all()
        return self.pooled[:-GUARD].view(self.shape).cpu()

    def check(self):
        pooled = self.output()
        assert (pooled[:, self.channels :] == 0).all()
        error = (pooled[:, : self.channels].double() - self.expected).abs()
        assert (error <= self.tolerance).all(), (error / self.tolerance).max()


# 32 vectors of 8 channels to a block; pixels below, at and above what its threads have on the way at once.
@of_both
@pytest.mark.parametrize("channels", [1, 8, 16, 72, 250, 256, 257, 264, 520])
@pytest.mark.parametrize("pixels", [1, 33])
def test_widths(cuda, channels, pixels):
    generator = torch.Generator().manual_seed(channels)
    case = Case(cuda, generator, 3, pixels, channels, channels % 5)
    cuda.maps.squeeze([case.node], cuda.stream)
    cuda.synchronize()
    case.check()


@of_both
@pytest.mark.parametrize("pixels", [127, 128, 129, 511, 512, 513, 3000])
@pytest.mark.parametrize("activation", range(5))
def test_pixels_and_activations(cuda, pixels, activation):
    generator = torch.Generator().manual_seed(pixels)
    case = Case(cuda, generator, 1, pixels, 16, activation, factor=pixels % 2 == 0)
    cuda.maps.squeeze([case.node], cuda.stream)
    cuda.synchronize()
    case.check()


@of_both
def test_group(cuda):
    """Nodes of different sizes; a node's results are the same in any company, and in every run."""
    generator = torch.Generator().manual_seed(7)
    shapes = [(4, 49, 96), (4, 49, 264), (2, 20, 8), (5, 1, 40)]
    cases = [Case(cuda, generator, *shape, activation=i) for i, shape in enumerate(shapes)]
    cuda.maps.squeeze([case.node for case in cases], cuda.stream)
    cuda.synchronize()
    for case in cases:
        case.check()
        together = case.output()
        case.pooled.fill_(math.nan)
        cuda.maps.squeeze([case.node], cuda.stream)
        cuda.synchronize()
        assert torch.equal(case.output(), together)


@of_both
@pytest.mark.parametrize("activation", range(5))
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_stay_in_their_channel_and_image(cuda, activation, value):
    generator = torch.Generator().manual_seed(8)
    case = Case(cuda, generator, 3, 20, 16, activation)
    scale = case.memory[1][0, 5].abs()
    case.memory[1][0, 5] = scale
    case.memory[0][1, 13, 5] = value
    cuda.maps.squeeze([case.node], cuda.stream)
    cuda.synchronize()
    pooled = case.output()
    expected = ACTIVATIONS[list(ACTIVATIONS)[activation]](torch.tensor(value))
    assert pooled[1, 5].isnan() if expected.isnan() else (pooled[1, 5] == expected or activation == 2)
    pooled[1, 5] = 0
    assert pooled.isfinite().all()
