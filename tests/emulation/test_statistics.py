"""csrc/cuda/statistics.cu against float64. Most of it is done in double, so that what kernels give is the exact value
rounded to float: 2^-24, or a little more where it is a difference."""

import math

import pytest
import torch
from precisions import of_all

LINEAR, RELU, RELU6, HSWISH, SILU = range(5)
EXACT = 2.0**-23
# norm_affine adds up four units at a time in float, from distances in float: a few 2^-24, by chance.
NORM = 5e-7
NAN = math.nan


def row_channels(channels):
    return -(-channels // 8) * 8


def padded(values, *shape, fill=0.0):
    result = values.new_full(shape, fill)
    result[tuple(slice(0, n) for n in values.shape)] = values
    return result


class Norm:
    """The parameters of a BatchNorm, on the host and on the device, and what its affine map has to be."""

    def __init__(self, cuda, generator, channels, factor):
        self.channels, self.row, self.eps = channels, row_channels(channels), 1e-3
        self.gamma = torch.randn(channels, generator=generator)
        self.beta = torch.randn(channels, generator=generator)
        self.factor = torch.randint(-6, 7, (channels,), generator=generator).float().exp2()
        if not factor:
            self.factor.fill_(1)
        self.packed = [padded(v, self.row).to(cuda.device) for v in (self.gamma, self.beta)]
        self.packed_factor = padded(self.factor, self.row, fill=1).to(cuda.device) if factor else None
        self.struct = cuda.kernels.BatchNorm(
            gamma=self.packed[0].data_ptr(),
            beta=self.packed[1].data_ptr(),
            factor=self.packed_factor.data_ptr() if factor else 0,
            eps=self.eps,
        )
        self.affine = torch.full((3 * self.row + 8,), NAN, device=cuda.device)
        self.kept_row = -(-channels // 16) * 16
        self.keep = torch.full((2 * self.kept_row + 8,), NAN, device=cuda.device)

    def check(self, mean, variance, stored, activation, *, keep=True, rtol=EXACT, mean_error=0.0):
        """Float64 statistics of values that were not multiplied.

        rtol: of the variance. mean_error: in deviations, apart from rounding it.
        """
        slope = self.gamma.double() / (variance.double() + torch.tensor(self.eps).double()).sqrt()
        factor = self.factor.double()
        bound = {RELU6: 6 * factor, HSWISH: 1 / (6 * factor), SILU: 1 / factor}.get(activation)
        affine = self.affine[: 3 * self.row].view(3, self.row).double().cpu()
        assert (affine[:2, self.channels :] == 0).all()
        assert self.affine[3 * self.row :].isnan().all()
        scale, shift, bounds = affine[:, : self.channels]
        shift_size = factor * (self.beta.abs() + (mean * slope).abs())
        assert ((scale - factor * slope / stored).abs() <= rtol * (factor * slope / stored).abs()).all()
        expected = factor * (self.beta.double() - mean * slope)
        shift_error = rtol * shift_size + mean_error * factor * (variance.sqrt() * slope).abs()
        assert ((shift - expected).abs() <= EXACT * expected.abs() + shift_error).all()
        if bound is not None:
            torch.testing.assert_close(bounds, bound, rtol=EXACT, atol=0)
        if keep:
            kept = self.keep[: 2 * self.kept_row].view(2, self.kept_row).double().cpu()
            assert (kept[:, self.channels : self.row] == 0).all()
            assert kept[:, self.row :].isnan().all()
            assert self.keep[2 * self.kept_row :].isnan().all()
            error = (kept[0, : self.channels] - mean).abs()
            assert (error <= EXACT * mean.abs() + mean_error * variance.sqrt()).all()
            torch.testing.assert_close(kept[1, : self.channels], variance, rtol=rtol, atol=0)


def draw_partials(generator, units, channels, *, ratio=3.0, empty=0.0):
    """Partial sums of units of different sizes, with means up to `ratio` deviations from 0, and the mean and
    variance that they stand for."""
    counts = torch.randint(1, 400, (units,), generator=generator).float()
    counts[torch.rand(units, generator=generator) < empty] = 0
    deviation = torch.rand(channels, generator=generator) * 5 + 0.1
    pilot = deviation * (ratio + torch.randn(units, channels, generator=generator))
    distance = deviation * torch.randn(units, channels, generator=generator)  # of the unit's mean from its pilot
    count = counts[:, None].expand(-1, channels)
    total = count * distance
    squares = count * (distance**2 + deviation**2)
    partials = torch.full((units, 4, row_channels(channels)), 7.0)
    partials[:, :, :channels] = torch.stack([pilot, total, squares, count], 1)
    partials[:, 3, channels:] = counts[:, None]
    n, p, s, q = count.double(), pilot.double(), total.double(), squares.double()
    mean = (n * p + s).sum(0) / n.sum(0)
    variance = (q + 2 * (p - mean) * s + n * (p - mean) ** 2).sum(0) / n.sum(0)
    partials[counts == 0, :3] = NAN  # never to be read
    return partials, mean, variance


# One unit below, at and above one for each two threads of a block, and what they have on the way at once.
@pytest.mark.parametrize("units", [1, 2, 255, 256, 257, 1023, 1024, 1025, 2600])
@pytest.mark.parametrize(("channels", "ratio"), [(16, 3.0), (9, 1000.0)])
def test_norm_affine_joins_units(cuda, units, channels, ratio):
    generator = torch.Generator().manual_seed(units)
    partials, mean, variance = draw_partials(generator, units, channels, ratio=ratio)
    norm = Norm(cuda, generator, channels, factor=False)
    memory = partials.to(cuda.device)
    node = cuda.kernels.NormAffine(
        partials=memory.data_ptr(),
        affine=norm.affine.data_ptr(),
        keep=norm.keep.data_ptr(),
        norm=norm.struct,
        units=units,
        channels=channels,
    )
    cuda.kernels.norm_affine([node], cuda.stream)
    cuda.synchronize()
    norm.check(mean, variance, 1, LINEAR, rtol=NORM, mean_error=NORM)


def test_norm_affine_of_a_group(cuda):
    """Nodes of different sizes, with empty units (the first one, too), factors and every activation."""
    generator = torch.Generator().manual_seed(1)
    nodes, alive, checks = [], [], []
    for activation, (units, channels) in enumerate([(40, 96), (3, 8), (301, 1), (77, 24), (12, 13)]):
        norm = Norm(cuda, generator, channels, factor=activation != RELU)
        partials, mean, variance = draw_partials(generator, units, channels, empty=0.3)
        while partials[0, 3, 0] != 0 or not mean.isfinite().all():
            partials, mean, variance = draw_partials(generator, units, channels, empty=0.3)
        stored = torch.randint(-8, 9, (channels,), generator=generator).float().exp2()
        stored_memory = padded(stored, norm.row, fill=1).to(cuda.device)
        memory = partials.to(cuda.device)
        alive += [stored_memory, memory]
        keep = activation != SILU
        nodes.append(
            cuda.kernels.NormAffine(
                partials=memory.data_ptr(),
                stored_factor=stored_memory.data_ptr(),
                affine=norm.affine.data_ptr(),
                keep=norm.keep.data_ptr() if keep else 0,
                norm=norm.struct,
                units=units,
                channels=channels,
                activation=activation,
            )
        )
        checks.append((norm, mean / stored, variance / stored.double() ** 2, stored, activation, keep))
    cuda.kernels.norm_affine(nodes, cuda.stream)
    cuda.synchronize()
    for norm, mean, variance, stored, activation, keep in checks:
        norm.check(mean, variance, stored, activation, keep=keep, rtol=NORM, mean_error=NORM)


def test_norm_affine_of_known_statistics(cuda):
    """They are not multiplied, but what they are applied to is."""
    generator = torch.Generator().manual_seed(2)
    norm = Norm(cuda, generator, 21, factor=True)
    mean, variance = torch.randn(21, generator=generator), torch.rand(21, generator=generator)
    variance[3] = 0
    stored = torch.randint(-8, 9, (21,), generator=generator).float().exp2()
    memory = [padded(v, norm.row, fill=f).to(cuda.device) for v, f in ((mean, 0), (variance, 0), (stored, 1))]
    node = cuda.kernels.NormAffine(
        mean=memory[0].data_ptr(),
        variance=memory[1].data_ptr(),
        stored_factor=memory[2].data_ptr(),
        affine=norm.affine.data_ptr(),
        keep=norm.keep.data_ptr(),
        norm=norm.struct,
        channels=21,
        activation=RELU6,
    )
    cuda.kernels.norm_affine([node], cuda.stream)
    cuda.synchronize()
    norm.check(mean.double(), variance.double(), stored, RELU6)


@of_all
def test_kept_statistics_make_the_same_affine_map(cuda):
    """Bit for bit, from sums and from moments."""
    generator = torch.Generator().manual_seed(9)
    norms = [Norm(cuda, generator, 45, factor=True) for _ in range(2)]
    stored = torch.randint(-8, 9, (45,), generator=generator).float().exp2()
    stored_memory = padded(stored, norms[0].row, fill=1).to(cuda.device)
    partials = draw_partials(generator, 40, 45, ratio=30.0)[0].to(cuda.device)
    summed = cuda.kernels.NormAffine(
        partials=partials.data_ptr(),
        stored_factor=stored_memory.data_ptr(),
        affine=norms[0].affine.data_ptr(),
        keep=norms[0].keep.data_ptr(),
        norm=norms[0].struct,
        units=40,
        channels=45,
        activation=SILU,
    )
    weight = torch.randn(45, 20, generator=generator).to(cuda.dtype).float()
    measured, memory = pointwise_node(cuda, norms[1], *draw_moments(generator, 20), weight, SILU, stored)
    cuda.kernels.norm_affine([summed], cuda.stream)
    cuda.maps.pointwise_affine([measured], cuda.stream)
    for norm in norms:
        again = torch.full_like(norm.affine, NAN)
        kept_again = torch.full_like(norm.keep, NAN)
        known = cuda.kernels.NormAffine(
            mean=norm.keep.data_ptr(),
            variance=norm.keep[norm.kept_row :].data_ptr(),
            stored_factor=stored_memory.data_ptr(),
            affine=again.data_ptr(),
            keep=kept_again.data_ptr(),
            norm=norm.struct,
            channels=45,
            activation=SILU,
        )
        cuda.kernels.norm_affine([known], cuda.stream)
        cuda.synchronize()
        assert torch.equal(again[: 3 * norm.row], norm.affine[: 3 * norm.row])
        assert torch.equal(kept_again.nan_to_num(-1), norm.keep.nan_to_num(-1))
    del memory


def test_norm_affine_of_odd_values(cuda):
    """A constant channel, sums that rounding has made inconsistent, NaN and infinity."""
    generator = torch.Generator().manual_seed(3)
    norm = Norm(cuda, generator, 5, factor=False)
    partials, mean, variance = draw_partials(generator, 4, 5)
    partials[:, :3, 0] = torch.tensor([1234.5, 0.0, 0.0])
    mean[0], variance[0] = 1234.5, 0
    partials[:, 1:3, 1] = torch.tensor([4.0, 0.0])
    partials[:, 0, 1] = 8
    mean[1] = 8 + 4 * 4 / partials[:, 3, 1].double().sum()
    variance[1] = 0
    partials[2, 1, 2] = NAN
    partials[1, 2, 3] = math.inf
    memory = partials.to(cuda.device)
    node = cuda.kernels.NormAffine(
        partials=memory.data_ptr(),
        affine=norm.affine.data_ptr(),
        keep=norm.keep.data_ptr(),
        norm=norm.struct,
        units=4,
        channels=5,
        activation=HSWISH,
    )
    cuda.kernels.norm_affine([node], cuda.stream)
    cuda.synchronize()
    affine, keep = norm.affine[:24].view(3, 8).cpu(), norm.keep[:32].view(2, 16)[:, :8].cpu()
    assert affine[:2, 2].isnan().all()
    assert keep[:, 2].isnan().all()
    assert affine[0, 3] == 0  # 1 / inf
    assert keep[1, 3].isinf()
    slope = norm.gamma / (variance + norm.eps).sqrt()
    torch.testing.assert_close(affine[0, [0, 1, 4]].double(), slope[[0, 1, 4]].double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(keep[0, [0, 1, 4]].double(), mean[[0, 1, 4]], rtol=NORM, atol=0)
    torch.testing.assert_close(keep[1, [0, 1, 4]].double(), variance[[0, 1, 4]], rtol=NORM, atol=0)


# ---- pointwise_affine


def draw_moments(generator, channels, size=1.0):
    """The mean and the covariance of correlated channels of different deviations."""
    deviation = torch.rand(channels, generator=generator) + 0.1
    samples = torch.randn(2 * channels + 3, channels, generator=generator) + torch.randn(
        2 * channels + 3, 1, generator=generator
    )
    samples = (samples * deviation * size).double()
    covariance = torch.cov(samples.T, correction=0).view(channels, channels).float()
    return torch.randn(channels, generator=generator) * 3 * size, covariance


def pointwise_node(cuda, norm, mean, covariance, weight, activation=LINEAR, stored=None):
    in_channels = len(mean)
    row = row_channels(in_channels)
    memory = [
        padded(mean, row).to(cuda.device),
        padded(covariance, row, row).to(cuda.device),
        padded(weight, norm.row, row).to(cuda.dtype).to(cuda.device),
    ]
    if stored is not None:
        memory.append(padded(stored, norm.row, fill=1.0).to(cuda.device))
    node = cuda.maps.PointwiseAffine(
        mean=memory[0].data_ptr(),
        covariance=memory[1].data_ptr(),
        weight=memory[2].data_ptr(),
        stored_factor=0 if stored is None else memory[3].data_ptr(),
        affine=norm.affine.data_ptr(),
        keep=norm.keep.data_ptr(),
        norm=norm.struct,
        in_channels=in_channels,
        channels=norm.channels,
        activation=activation,
    )
    return node, memory


def pointwise_statistics(mean, covariance, weight):
    w = weight.double()
    return w @ mean.double(), ((w @ covariance.double()) * w).sum(1)


# Products are exact; they are summed in float over 16 channels of a row and column of the covariance at a time,
# and those sums again, which costs a few 2^-24 of the sum of magnitudes.
POINTWISE_RTOL = 3e-6


@of_all
@pytest.mark.parametrize(
    ("in_channels", "channels"),
    [(1, 1), (8, 31), (15, 32), (16, 33), (17, 64), (24, 96), (40, 65), (96, 40), (200, 33)],
)
def test_pointwise_affine(cuda, in_channels, channels):
    check_pointwise(cuda, in_channels, channels)


@pytest.mark.parametrize("cuda", ["bf16", "fp16", "fp32"], indirect=True)
def test_pointwise_affine_of_many_channels(cuda):
    check_pointwise(cuda, 1024, 8)


def check_pointwise(cuda, in_channels, channels):
    generator = torch.Generator().manual_seed(in_channels)
    norm = Norm(cuda, generator, channels, factor=False)
    mean, covariance = draw_moments(generator, in_channels)
    weight = torch.randn(channels, in_channels, generator=generator).to(cuda.dtype).float()
    node, memory = pointwise_node(cuda, norm, mean, covariance, weight)
    cuda.maps.pointwise_affine([node], cuda.stream)
    cuda.synchronize()
    del memory
    norm.check(*pointwise_statistics(mean, covariance, weight), 1, LINEAR, rtol=POINTWISE_RTOL)


@of_all
def test_pointwise_affine_of_a_group(cuda):
    """Different sizes, factors, every activation, and covariances from 1e-12 to 1e12."""
    generator = torch.Generator().manual_seed(4)
    nodes, checks, alive = [], [], []
    shapes = [(16, 96, 1e-6), (40, 24, 1e6), (8, 8, 1.0), (56, 33, 1e-3), (23, 17, 1e3)]
    for activation, (in_channels, channels, size) in enumerate(shapes):
        norm = Norm(cuda, generator, channels, factor=activation > RELU)
        mean, covariance = draw_moments(generator, in_channels, size)
        weight = (torch.randn(channels, in_channels, generator=generator) / 7).to(cuda.dtype).float()
        node, memory = pointwise_node(cuda, norm, mean, covariance, weight, activation)
        nodes.append(node)
        alive.append(memory)
        checks.append((norm, *pointwise_statistics(mean, covariance, weight), activation))
    cuda.maps.pointwise_affine(nodes, cuda.stream)
    cuda.synchronize()
    for norm, mean, variance, activation in checks:
        norm.check(mean, variance, 1, activation, rtol=POINTWISE_RTOL)


@of_all
def test_pointwise_affine_of_multiplied_weights(cuda):
    """Statistics are of what the weights stand for, the map is of what the sums are."""
    generator = torch.Generator().manual_seed(6)
    norm = Norm(cuda, generator, 37, factor=True)
    mean, covariance = draw_moments(generator, 20)
    weight = (torch.rand(37, 20, generator=generator) - 0.5).to(cuda.dtype).float()
    stored = torch.randint(-20, 21, (37,), generator=generator).float().exp2()
    norm.eps = 1e-20
    norm.struct.eps = norm.eps
    node, memory = pointwise_node(cuda, norm, mean, covariance, weight, RELU6, stored)
    cuda.maps.pointwise_affine([node], cuda.stream)
    cuda.synchronize()
    del memory
    exact = pointwise_statistics(mean, covariance, weight / stored[:, None].double())
    norm.check(*exact, stored, RELU6, rtol=POINTWISE_RTOL)


@of_all
def test_pointwise_affine_clamps_the_variance_and_keeps_nan(cuda):
    generator = torch.Generator().manual_seed(5)
    covariance = torch.diag(torch.tensor([1.0, -1e-3, 2.0]))
    weight = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    for broken in (False, True):
        norm = Norm(cuda, generator, 2, factor=False)
        if broken:
            covariance[2, 2] = NAN  # times 0, as a convolution of that channel would give
        node, memory = pointwise_node(cuda, norm, torch.zeros(3), covariance, weight)
        cuda.maps.pointwise_affine([node], cuda.stream)
        cuda.synchronize()
        del memory
        variance = norm.keep[16:18].cpu()
        assert variance.isnan().all() if broken else variance.tolist() == [1, 0]
