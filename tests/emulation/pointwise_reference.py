"""What the tests of project, strided_conv, stem_conv and head_pool share."""

import torch

LINEAR, RELU, RELU6, HSWISH, SILU = range(5)  # Activation (choice_block.h)
ACTIVATIONS = [LINEAR, RELU, RELU6, HSWISH, SILU]


def row_channels(channels):
    return -(-channels // 8) * 8


def rows(values, dtype, *, pad_rows=False):
    """Values as kernels read them: rows padded with zeros."""
    pad = (0, row_channels(values.shape[-1]) - values.shape[-1])
    pad += (0, row_channels(len(values)) - len(values)) if pad_rows else ()
    return torch.nn.functional.pad(values, pad).to(dtype).contiguous()


def activate(u, activation, bound):
    """As kernels.h defines activations of values that are multiplied by a factor; NaN stays NaN."""
    if activation == RELU:
        return torch.relu(u)
    if activation == RELU6:
        return torch.minimum(torch.relu(u), bound.expand_as(u))
    if activation == HSWISH:
        return u * (u * bound + 0.5).clamp(0, 1)
    if activation == SILU:
        return u * torch.sigmoid(u * bound)
    return u


def random_affine(g, channels, activation, factor, mean):
    """Scale, shift and bound that bring values near `mean` to about one, times the factor."""
    scale = (torch.rand(channels, generator=g) + 0.5) * factor
    shift = torch.randn(channels, generator=g) * factor - mean * scale
    bound = {RELU6: 6 * factor, HSWISH: 1 / (6 * factor), SILU: 1 / factor}.get(activation, torch.zeros(channels))
    return torch.stack([scale, shift, bound]).float()


def padded_affine(affine, channels):
    return torch.nn.functional.pad(affine, (0, row_channels(channels) - channels)).contiguous()


def guarded(cuda, shape, dtype):
    """A tensor of NaN with rows of NaN around it, and a check that these are untouched."""
    size = torch.Size(shape).numel()
    memory = torch.full((size + 512,), float("nan"), dtype=dtype, device=cuda.device)

    def check():
        assert memory[:256].isnan().all()
        assert memory[256 + size :].isnan().all()

    return memory[256 : 256 + size].view(shape), check


def check_map(y, expected, error):
    """`error`: of the sums before they are rounded to y's type, by half a unit in the last place (which leaves room
    for the double rounding at the border of two exponents)."""
    channels = expected.shape[1]
    assert (y[:, channels:] == 0).all()
    distance = (y[:, :channels].double() - expected).abs()
    limits = torch.finfo(y.dtype)
    allowed = limits.eps / 2 * (expected.abs() + limits.smallest_normal) + error + 1e-30
    assert (distance <= allowed).all(), (distance / allowed).max()


def check_partials(partials, y, channels):
    """Joined in float64, against the stored values: within 1e-5 deviations, and 1e-5 of the variance."""
    pilot, sums, squares, count = partials.double().unbind(1)
    values = y.double()
    total = count.sum(0)
    assert (total == len(y)).all()
    mean = ((sums + count * pilot).sum(0)) / total
    variance = (squares - sums**2 / count + count * (pilot + sums / count - mean) ** 2).sum(0) / total
    deviation = values.std(0, correction=0)
    assert ((mean - values.mean(0)).abs() <= 1e-5 * deviation + 1e-12).all()
    assert ((variance - deviation**2).abs() <= 2e-5 * deviation**2 + 1e-24).all()
    assert (partials[:, :3, channels:] == 0).all()
