"""csrc/cuda/depthwise.cu against float64, of the same numbers."""

import pytest
import torch
import torch.nn.functional as F
from map_cases import ACTIVATIONS, Written, affine_of, padded, rounding, row_channels
from precisions import of_all


def convolved(x, weight, stride):
    """[N, H, W, C] and [C, 1, k, k] in float64."""
    maps = x.permute(0, 3, 1, 2)
    kernel, channels = weight.shape[-1], len(weight)
    return F.conv2d(maps, weight, stride=stride, padding=kernel // 2, groups=channels).permute(0, 2, 3, 1)


class Case:
    def __init__(self, cuda, size, channels, kernel, stride, *, activation=0, affine=False):
        generator = torch.Generator().manual_seed(channels + kernel)
        self.cuda, self.channels = cuda, channels
        row = row_channels(channels)
        self.x = padded(cuda, torch.randn(*size, channels, generator=generator) * 2)
        self.affine = affine_of(generator, channels).to(cuda.device) if affine else None
        weight = torch.zeros(row, 1, kernel, kernel)
        weight[:channels] = torch.randn(channels, 1, kernel, kernel, generator=generator)
        factor = torch.randint(-3, 4, (row,), generator=generator).float().exp2()
        packed = (weight[:, 0] * factor[:, None, None]).permute(1, 2, 0).contiguous()
        self.memory = [tensor.to(cuda.device) for tensor in (packed, factor)]
        self.weight, self.stride, self.activation = weight.double(), stride, activation
        self.y = Written(cuda, size[0], -(-size[1] // stride), -(-size[2] // stride), row)
        self.node = cuda.maps.DepthwiseConv(
            x=self.x.data_ptr(),
            affine=0 if self.affine is None else self.affine.data_ptr(),
            weight=self.memory[0].data_ptr(),
            stored_factor=self.memory[1].data_ptr(),
            y=self.y.address,
            images=size[0],
            height=size[1],
            width=size[2],
            channels=channels,
            kernel=kernel,
            stride=stride,
            activation=activation,
        )

    def run(self):
        self.cuda.maps.depthwise_conv(self.node, self.cuda.stream)
        self.cuda.synchronize()
        return self.y.values()

    def check(self):
        y = self.run()
        x = self.x.cpu().double()
        u, size = x, x.abs()
        if self.affine is not None:
            scale, shift = self.affine.cpu().double()[:2]
            u, size = x * scale + shift, x.abs() * scale.abs() + shift.abs()
        expected = convolved(ACTIVATIONS[self.activation](u), self.weight, self.stride)
        # Sums of at most 81 floats, and what is rounded at the end.
        allowed = 4e-6 * convolved(size, self.weight.abs(), self.stride) + rounding(self.cuda) * expected.abs() + 1e-7
        assert ((y - expected).abs() <= allowed).all()
        assert (y[..., self.channels :] == 0).all()


# Strips of 4 pixels: widths below, at and above; 8 vectors of 8 channels to a block, or a few more.
@of_all
@pytest.mark.parametrize("kernel", [1, 3, 5, 7, 9])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize(
    ("size", "channels"),
    [((1, 1, 1), 3), ((2, 2, 3), 64), ((1, 9, 4), 70), ((1, 6, 5), 8), ((3, 5, 8), 24), ((1, 7, 9), 17)],
)
def test_sizes(cuda, kernel, stride, size, channels):
    Case(cuda, size, channels, kernel, stride).check()


@of_all
@pytest.mark.parametrize("activation", range(5))
@pytest.mark.parametrize("affine", [False, True])
def test_what_is_read_is_activated(cuda, activation, affine):
    """What pads the map is 0, whatever the shift."""
    for stride in (1, 2):
        Case(cuda, (2, 5, 7), 13, 3, stride, activation=activation, affine=affine).check()


@of_all
def test_many_pixels(cuda):
    Case(cuda, (4, 40, 37), 16, 3, 1, activation=1, affine=True).check()


@of_all
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_special_values_stay_in_their_windows(cuda, value):
    case = Case(cuda, (2, 7, 6), 10, 3, 1)
    case.x[1, 3, 2, 5] = value
    bad = ~case.run().isfinite()
    expected = torch.zeros_like(bad)
    expected[1, 2:5, 1:4, 5] = True
    assert torch.equal(bad, expected)


def test_nothing(cuda):
    case = Case(cuda, (2, 3, 3), 8, 3, 1)
    case.node.images = 0
    assert case.run().isnan().all()
