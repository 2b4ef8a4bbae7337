"""csrc/cuda/pool.cu against float64, of the same numbers."""

import math

import pytest
import torch
import torch.nn.functional as F
from map_cases import ACTIVATIONS, Written, affine_of, check_statistics, padded, rounding, row_channels
from precisions import of_all

MAXIMUM, MEAN, MEAN_WITH_PADDING = 1, 2, 3


def pooled(x, pooling, kernel, stride):
    """[N, H, W, C] in float64."""
    maps = x.permute(0, 3, 1, 2)
    if pooling == MAXIMUM:
        result = F.max_pool2d(maps, kernel, stride, kernel // 2)
    else:
        result = F.avg_pool2d(maps, kernel, stride, kernel // 2, count_include_pad=pooling == MEAN_WITH_PADDING)
    return result.permute(0, 2, 3, 1)


class Case:
    def __init__(self, cuda, size, channels, kernel, stride, pooling, *, activation=0, affine=False, sums=True):
        generator = torch.Generator().manual_seed(channels + kernel)
        self.cuda, self.channels = cuda, channels
        self.x = padded(cuda, torch.randn(*size, channels, generator=generator) * 3 + 1)
        self.affine = affine_of(generator, channels).to(cuda.device) if affine else None
        self.shape = (size[0], -(-size[1] // stride), -(-size[2] // stride), row_channels(channels))
        self.pixels = math.prod(self.shape[:3])
        self.y = Written(cuda, *self.shape)
        units = cuda.maps.pointwise_units(self.pixels)
        self.partials = Written(cuda, units, 4, self.shape[3], dtype=torch.float32) if sums else None
        self.pooling = pooling, kernel, stride
        self.activation = activation
        self.node = cuda.maps.Pool(
            x=self.x.data_ptr(),
            affine=0 if self.affine is None else self.affine.data_ptr(),
            y=self.y.address,
            partials=self.partials.address if sums else 0,
            images=size[0],
            height=size[1],
            width=size[2],
            channels=channels,
            kernel=kernel,
            stride=stride,
            pooling=pooling,
            activation=activation,
        )

    def run(self):
        self.cuda.maps.pool(self.node, self.cuda.stream)
        self.cuda.synchronize()
        return self.y.values()

    def check(self):
        y = self.run()
        u = pooled(self.x.cpu().double(), *self.pooling)
        size = pooled(self.x.cpu().double().abs(), *self.pooling)
        if self.affine is not None:
            scale, shift = self.affine.cpu().double()[:2]
            u, size = u * scale + shift, size * scale.abs() + shift.abs()
        expected = ACTIVATIONS[self.activation](u)
        # Sums of at most 49 floats, and what is rounded at the end (exponential: 2^-21).
        assert ((y - expected).abs() <= 4e-6 * size + rounding(self.cuda) * expected.abs() + 1e-7).all()
        assert (y[..., self.channels :] == 0).all()
        if self.partials is not None:
            check_statistics(self.cuda, self.partials.values(), y.flatten(0, 2))


# Maps of one pixel and of less than a window; 8 vectors of 8 channels to a block, or a few more.
@of_all
@pytest.mark.parametrize("pooling", [MAXIMUM, MEAN, MEAN_WITH_PADDING])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (5, 2), (7, 1), (7, 3)])
@pytest.mark.parametrize(("size", "channels"), [((1, 1, 1), 3), ((2, 2, 3), 64), ((3, 9, 8), 70), ((1, 8, 13), 8)])
def test_windows(cuda, pooling, kernel, stride, size, channels):
    Case(cuda, size, channels, kernel, stride, pooling).check()


# Units of one, and of several tiles of 128 pixels; the last one not full.
@of_all
@pytest.mark.parametrize("height", [127, 128, 129, 384, 385, 1000])
@pytest.mark.parametrize("channels", [16, 24])
def test_units(cuda, height, channels):
    Case(cuda, (1, height, 1), channels, 3, 1, MAXIMUM).check()
    Case(cuda, (2, height, 1), channels, 3, 2, MEAN).check()


@of_all
@pytest.mark.parametrize("activation", range(5))
@pytest.mark.parametrize("affine", [False, True])
def test_what_comes_after(cuda, activation, affine):
    for pooling in (MAXIMUM, MEAN):
        Case(cuda, (2, 5, 7), 13, 3, 1, pooling, activation=activation, affine=affine, sums=False).check()


@of_all
def test_the_order_of_threads_does_not_matter(cuda, emulation):
    outputs = []
    for order in range(3):
        emulation(order=order)
        case = Case(cuda, (2, 20, 19), 40, 3, 1, MEAN)
        outputs.append((case.run(), case.partials.values()))
    for y, partials in outputs[1:]:
        assert torch.equal(y, outputs[0][0])
        assert torch.equal(partials, outputs[0][1])


@of_all
@pytest.mark.parametrize("pooling", [MAXIMUM, MEAN, MEAN_WITH_PADDING])
def test_special_values_go_where_torch_pools_them(cuda, pooling):
    case = Case(cuda, (2, 9, 8), 10, 3, 1, pooling)
    for channel, value in enumerate((math.nan, math.inf, -math.inf, -0.0)):
        case.x[0, 4, 3, channel] = value  # where windows begin, end, and in their middle
    case.x[1, ..., :3] = -math.inf
    expected = pooled(case.x.cpu().double(), pooling, 3, 1)
    tolerance = 4 * rounding(cuda)
    torch.testing.assert_close(case.run(), expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def test_nothing(cuda):
    case = Case(cuda, (2, 3, 3), 8, 3, 1, MEAN)
    case.node.images = 0
    assert case.run().isnan().all()
