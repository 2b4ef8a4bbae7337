"""expand_depthwise against plain torch in float64 on the rounded inputs."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from precisions import of_all, of_both, of_floats

LINEAR, RELU, RELU6, HSWISH, SILU = range(5)
ACTIVATIONS = [LINEAR, RELU, RELU6, HSWISH, SILU]
GUARD = 64  # elements behind an output that must stay as they are
FACTOR = 4.0  # of normalised values, as BatchNorm::factor

# Half precision keeps 11 bits. Expanded values, weights' products and the running sum are each rounded to it: in
# the norm that is 5e-4 for 9 taps and 1e-3 for 49 (err.py of the study), and a single value is off by a few
# roundings of the largest partial sum.
# In single precision they are off by a few 2^-24, and by 2^-21 where an activation has an exponential.
TOLERANCES = {torch.float16: (1.5e-3, 4e-3), torch.float32: (1e-6, 4e-6)}  # of the norm, of a value
# Sums of a few thousand floats, of distances from a value among them.
STATISTICS_TOLERANCE = 1e-5


def padded(channels):
    return -(-channels // 8) * 8


def make(cuda, images, height, width, in_channels, hidden, kernel, stride, activation, seed=0, x=None):
    """Inputs of one node, on the device, padded with zeros."""
    g = torch.Generator().manual_seed(seed)
    n = SimpleNamespace(images=images, height=height, width=width, in_channels=in_channels)
    n.hidden_channels, n.kernel, n.stride, n.activation = hidden, kernel, stride, activation

    def pad(t, *sizes):
        missing = [size - have for size, have in zip(sizes, t.shape, strict=True)]
        return F.pad(t, [p for m in reversed(missing) for p in (0, m)])

    rows_in, rows = padded(in_channels), padded(hidden)
    values = torch.randn(images, height, width, in_channels, generator=g)
    n.x = pad(values, images, height, width, rows_in).to(cuda.dtype) if x is None else x
    n.expand = pad(torch.randn(hidden, in_channels, generator=g) / in_channels**0.5, rows, rows_in).to(cuda.dtype)
    bound = {RELU6: 6 * FACTOR, HSWISH: 1 / (6 * FACTOR), SILU: 1 / FACTOR}.get(activation, float("nan"))
    scale = FACTOR * (torch.rand(hidden, generator=g) + 0.5)
    shift = FACTOR * (torch.randn(hidden, generator=g) + 0.5)
    n.affine = pad(torch.stack([scale, shift, torch.full((hidden,), bound)]), 3, rows)
    n.depthwise = pad(torch.randn(kernel * kernel, hidden, generator=g) / kernel, kernel * kernel, rows).to(cuda.stored)
    for name in ("x", "expand", "affine", "depthwise"):
        setattr(n, name, getattr(n, name).contiguous().to(cuda.device))
    return n


def run(cuda, nodes, statistics=True):
    """Launches a group; sets `d` and `partials` of each node."""
    structs = []
    for n in nodes:
        out = [(size - 1) // n.stride + 1 for size in (n.height, n.width)]
        s = cuda.maps.ExpandDepthwise(
            **{name: getattr(n, name).data_ptr() for name in ("x", "expand", "affine", "depthwise")},
            images=n.images,
            height=n.height,
            width=n.width,
            in_channels=n.in_channels,
            hidden_channels=n.hidden_channels,
            kernel=n.kernel,
            stride=n.stride,
            activation=n.activation,
        )
        rows = padded(n.hidden_channels)
        n.units = cuda.maps.expand_depthwise_units(s)
        size = n.images * out[0] * out[1] * rows
        n.d_memory = torch.full((size + GUARD,), float("nan"), dtype=cuda.stored, device=cuda.device)
        n.partials_memory = torch.full((n.units * 4 * rows + GUARD,), float("nan"), device=cuda.device)
        n.d = n.d_memory[:size].view(n.images, *out, rows)
        n.partials = n.partials_memory[: n.units * 4 * rows].view(n.units, 4, rows)
        s.d = n.d.data_ptr()
        s.partials = n.partials.data_ptr() if statistics else 0
        structs.append(s)
    cuda.maps.expand_depthwise(structs, cuda.stream)
    cuda.synchronize()
    for n in nodes:
        assert n.d_memory[n.d.numel() :].isnan().all(), "wrote behind d"
        assert n.partials_memory[n.partials.numel() :].isnan().all(), "wrote behind the partials"


def reference(n):
    x = n.x.double().cpu()
    scale, shift, bound = n.affine.double().cpu()
    u = x @ n.expand.double().cpu().T
    u = u * scale + shift
    if n.activation == RELU:
        u = u.clamp(min=0)
    elif n.activation == RELU6:
        u = torch.minimum(u.clamp(min=0), bound)
    elif n.activation == HSWISH:
        u = u * (u * bound + 0.5).clamp(0, 1)
    elif n.activation == SILU:
        u = u / (1 + torch.exp(-u * bound))
    weight = n.depthwise.double().cpu().T.reshape(-1, 1, n.kernel, n.kernel)
    d = F.conv2d(u.permute(0, 3, 1, 2), weight, stride=n.stride, padding=n.kernel // 2, groups=weight.shape[0])
    return d.permute(0, 2, 3, 1)


def joined(partials):
    """Mean and biased variance, as norm_affine joins units."""
    pilot, total, squares, count = partials.double().cpu().unbind(1)
    seen = count > 0
    mean = (pilot * count + total).sum(0) / count.sum(0)
    distance = torch.where(seen, pilot + total / count.clamp(min=1) - mean, 0.0)
    variance = (squares - total * total / count.clamp(min=1) + count * distance**2).sum(0) / count.sum(0)
    return mean, variance


def check_statistics(n):
    d = n.d.double().cpu().flatten(0, 2)
    hidden = n.hidden_channels
    assert n.partials.isfinite().all(), "a unit was not written"
    assert (n.partials[:, 3].double().sum(0).cpu() == len(d)).all()
    mean, variance = joined(n.partials)
    std = d.std(0, unbiased=False)[:hidden]
    error = (mean - d.mean(0))[:hidden].abs()
    assert (error <= STATISTICS_TOLERANCE * std + 1e-12).all(), (error / std).max()
    error = (variance - d.var(0, unbiased=False))[:hidden].abs()
    assert (error <= 2 * STATISTICS_TOLERANCE * std**2 + 1e-12).all(), (error / std**2).max()
    assert (n.partials[:, :3, hidden:] == 0).all(), "padding of the partials"


def check(n, statistics=True):
    d, expected = n.d.double().cpu(), reference(n)
    assert d.isfinite().all(), "a value was not written"
    error = d - expected
    of_norm, of_value = TOLERANCES[n.d.dtype]
    assert error.norm() <= of_norm * expected.norm(), error.norm() / expected.norm()
    assert error.abs().max() <= of_value * expected.abs().max(), error.abs().max() / expected.abs().max()
    assert (d[..., n.hidden_channels :] == 0).all(), "padding of d"
    if statistics:
        check_statistics(n)
    else:
        assert n.partials.isnan().all()


@of_all
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_variants(cuda, kernel, stride, activation):
    nodes = [make(cuda, 2, 9, 11, 16, hidden, kernel, stride, activation, hidden) for hidden in (16, 64)]
    run(cuda, nodes)
    for n in nodes:
        check(n)


@of_all
@pytest.mark.parametrize("in_channels", [3, 8, 16, 24, 40])
def test_groups_of_nodes(cuda, in_channels):
    nodes = [make(cuda, 1, 8, 8, in_channels, hidden, 5, 1, RELU6, hidden) for hidden in (48, 96, 120, 200, 13)]
    run(cuda, nodes)
    for n in nodes:
        check(n)
    alone = SimpleNamespace(**vars(nodes[1]))
    run(cuda, [alone])
    assert torch.equal(alone.d, nodes[1].d)
    assert torch.equal(alone.partials, nodes[1].partials)


SIZES = [(1, 1, 1), (3, 1, 5), (2, 5, 1), (1, 7, 7), (9, 7, 7), (1, 14, 13), (1, 29, 15), (1, 3, 113), (1, 30, 8)]


@of_both
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 7])
@pytest.mark.parametrize(("images", "height", "width"), SIZES)
def test_sizes(cuda, images, height, width, kernel, stride):
    n = make(cuda, images, height, width, 24, 40, kernel, stride, RELU)
    run(cuda, [n])
    check(n)


SHAPES = [  # one image of mbv2-7 (and a wider one): size, channels, hidden, kernel, stride
    (112, 16, 48, 3, 2),
    (56, 32, 96, 7, 1),
    (28, 40, 120, 5, 1),
    (14, 96, 288, 3, 2),
    (14, 96, 288, 5, 1),
    (7, 192, 576, 7, 1),
    (7, 320, 64, 3, 1),
]


@of_both
@pytest.mark.parametrize(("size", "in_channels", "hidden", "kernel", "stride"), SHAPES)
@pytest.mark.parametrize("shared", [99, 227])
def test_real_shapes(cuda, emulation, shared, size, in_channels, hidden, kernel, stride):
    emulation(shared_bytes=shared * 1024)
    n = make(cuda, 1 if size > 7 else 3, size, size, in_channels, hidden, kernel, stride, RELU6)
    run(cuda, [n])
    check(n)


@pytest.mark.parametrize("cuda", ["fp32 on sm_75"], indirect=True)
@pytest.mark.parametrize(("size", "in_channels", "hidden", "kernel", "stride"), SHAPES)
def test_real_shapes_of_floats_in_little_memory(cuda, size, in_channels, hidden, kernel, stride):
    n = make(cuda, 1 if size > 7 else 3, size, size, in_channels, hidden, kernel, stride, RELU6)
    run(cuda, [n])
    check(n)


# Pixels of a step below, at and above a tile of the product of floats; a depth of less than a chunk, and more.
@of_floats
@pytest.mark.parametrize(("images", "height", "width"), [(1, 1, 127), (2, 8, 8), (1, 3, 43), (1, 128, 3), (5, 7, 7)])
@pytest.mark.parametrize("in_channels", [8, 24])
@pytest.mark.parametrize("stride", [1, 2])
def test_tiles_of_floats(cuda, images, height, width, in_channels, stride):
    n = make(cuda, images, height, width, in_channels, 33, 5, stride, HSWISH)
    run(cuda, [n])
    check(n)


@of_both
@pytest.mark.parametrize(("shared", "in_channels"), [(99, 400), (227, 640), (227, 1024)])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (7, 2)])
def test_many_input_channels(cuda, emulation, shared, in_channels, kernel, stride):
    emulation(shared_bytes=shared * 1024)
    n = make(cuda, 2, 6, 9, in_channels, 64, kernel, stride, RELU6)
    run(cuda, [n])
    check(n)


def test_too_many_input_channels_are_refused(cuda):
    n = make(cuda, 1, 1, 1, 4000, 8, 3, 1, RELU6)
    with pytest.raises(ValueError, match="4000 input channels do not fit"):
        run(cuda, [n])


@of_both
def test_same_bits_in_any_order(cuda, emulation):
    results = []
    for order in range(3):
        emulation(order=order)
        nodes = [make(cuda, 2, 23, 16, 16, hidden, 3, 1, RELU6, hidden) for hidden in (48, 64)]
        run(cuda, nodes)
        results.append([t for n in nodes for t in (n.d, n.partials)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@of_both
def test_without_statistics(cuda):
    n = make(cuda, 1, 9, 9, 16, 72, 3, 1, HSWISH)
    run(cuda, [n], statistics=False)
    check(n, statistics=False)


@of_both
def test_statistics_do_not_cancel(cuda):
    n = make(cuda, 3, 20, 17, 16, 96, 3, 1, LINEAR)
    n.depthwise.zero_()
    n.depthwise[4] = (
        1  # the middle: d is the expanded map itself, mean 24, deviation about 2 units in the last place of halves
    )
    n.affine[0], n.affine[1] = 2.0**-5, 24.0
    run(cuda, [n])
    d = n.d.double()
    assert (d.mean((0, 1, 2)) > 500 * d.std((0, 1, 2))).all()  # in float, the sum of squares would be worth nothing
    check_statistics(n)


@of_all
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_stay_where_they_belong(cuda, activation):
    for value in (float("nan"), float("inf"), -float("inf")):
        n = make(cuda, 2, 12, 12, 16, 45, 3, 1, activation)
        n.x[1, 4, 5, 3] = value
        run(cuda, [n])
        d, expected = n.d.double().cpu()[..., :45], reference(n)[..., :45]
        assert torch.equal(d.isnan(), expected.isnan())
        assert torch.equal(d.isinf(), expected.isinf())
        finite = expected.isfinite()
        assert finite.sum() >= expected.numel() - 9 * 45
        assert (d - expected)[finite].abs().max() <= TOLERANCES[n.d.dtype][1] * expected[finite].abs().max()
        assert (n.d[..., 45:] == 0).all()
        assert (n.partials[:, :3, 45:] == 0).all()
