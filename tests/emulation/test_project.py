"""project: y = W activation(d * scale + shift) * gates, stored raw with its statistics, or mapped."""

import pytest
import torch
from pointwise_reference import (
    ACTIVATIONS,
    HSWISH,
    LINEAR,
    RELU,
    RELU6,
    SILU,
    activate,
    check_map,
    check_partials,
    guarded,
    padded_affine,
    random_affine,
    row_channels,
    rows,
)
from precisions import of_all, of_both


def make(cuda, g, images, image_pixels, hidden, channels, activation, *, gated=False, mean=0.0):
    """Inputs of a node, float64 of what is stored."""
    pixels = images * image_pixels
    d = rows(torch.randn(pixels, hidden, generator=g) + mean, cuda.stored)
    # As BatchNorm makes it: the mean goes, the spread becomes about one; factors are powers of two.
    factor = 2.0 ** torch.randint(-3, 4, (hidden,), generator=g)
    affine = random_affine(g, hidden, activation, factor, mean)
    weight = rows(torch.randn(channels, hidden, generator=g) / hidden**0.5 / factor, cuda.stored, pad_rows=True)
    gates = rows(torch.rand(images, hidden, generator=g), torch.float32) if gated else None
    return {
        "d": d,
        "affine": padded_affine(affine, hidden),
        "weight": weight,
        "gates": gates,
        "image_pixels": image_pixels,
        "hidden": hidden,
        "channels": channels,
        "activation": activation,
    }


def sums_of(node):
    """The products in float64, and how far the precision of d and of the weight may be from them."""
    half = torch.finfo(node["d"].dtype).eps / 2  # a unit in the last place, relative
    hidden, channels = node["hidden"], node["channels"]
    scale, shift, bound = node["affine"][:, :hidden].double()
    u = node["d"][:, :hidden].double() * scale + shift
    value = activate(u, node["activation"], bound)
    # Single precision until the value is rounded; then a gate is rounded, and their product.
    error = half * value.abs() + 2.0**-22 * (node["d"][:, :hidden].double().abs() * scale.abs() + shift.abs())
    if node["activation"] in (HSWISH, SILU):  # fast exponentials and quotients
        error += 2.0**-20 * u.abs()
    if node["gates"] is not None:
        gate = node["gates"][:, :hidden].double().repeat_interleave(node["image_pixels"], 0)
        value, error = value * gate, (error + 2 * half * value.abs()) * gate + 2.0**-24
    weight = node["weight"][:channels, :hidden].double()
    sums = value @ weight.T
    # Roundings of the inputs, none of which is larger than `error`, and sums in single precision.
    return sums, (error + 2.0**-20 * value.abs() + 2.0**-24) @ weight.abs().T


def launch(cuda, nodes, outputs, **kwargs):
    k, keep, group = cuda.maps, [], []
    for node, (y, partials, affine, residual, activation) in zip(nodes, outputs, strict=True):
        tensors = {
            name: None if node[name] is None else node[name].to(cuda.device)
            for name in ("d", "affine", "weight", "gates")
        }
        keep.append(tensors)
        pointers = {name: 0 if t is None else t.data_ptr() for name, t in tensors.items()}
        out = k.PointwiseOutput(
            y=y.data_ptr(),
            partials=0 if partials is None else partials.data_ptr(),
            affine=0 if affine is None else affine.data_ptr(),
            residual=0 if residual is None else residual.data_ptr(),
            channels=node["channels"],
            activation=activation,
        )
        group.append(
            k.Project(
                **pointers,
                out=out,
                pixels=len(node["d"]),
                image_pixels=node["image_pixels"],
                hidden_channels=node["hidden"],
                activation=node["activation"],
            )
        )
    k.project(group, cuda.stream)
    cuda.synchronize()


def run_raw(cuda, nodes):
    results = []
    for node in nodes:
        pixels, row = len(node["d"]), row_channels(node["channels"])
        units = cuda.maps.pointwise_units(pixels)
        y, check_y = guarded(cuda, (pixels, row), cuda.dtype)
        partials, check_sums = guarded(cuda, (units, 4, row), torch.float32)
        results.append((y, partials, check_y, check_sums))
    launch(cuda, nodes, [(y, partials, None, None, LINEAR) for y, partials, _, _ in results])
    for _, _, check_y, check_sums in results:
        check_y()
        check_sums()
    return [(y.cpu(), partials.cpu()) for y, partials, _, _ in results]


def check_raw(cuda, nodes):
    for node, (y, partials) in zip(nodes, run_raw(cuda, nodes), strict=True):
        sums, error = sums_of(node)
        check_map(y, sums, error)
        check_partials(partials, y, node["channels"])


# Every width of a pass, one below, at and above; depths around 16, 32 and 64; pixels around a tile.
@of_all
@pytest.mark.parametrize(
    ("pixels", "hidden", "channels"),
    [
        (127, 16, 16),
        (128, 32, 15),
        (129, 24, 17),
        (70, 40, 13),
        (257, 48, 24),
        (130, 63, 25),
        (100, 64, 32),
        (131, 65, 33),
        (64, 96, 40),
        (129, 72, 41),
        (129, 144, 64),
        (66, 120, 80),
        (65, 136, 88),
        (130, 200, 96),
        (129, 104, 104),
        (1, 40, 160),
        (129, 80, 192),
        (130, 72, 200),
        (33, 40, 320),
    ],
)
def test_shapes(cuda, pixels, hidden, channels):
    g = torch.Generator().manual_seed(pixels * 1000 + hidden + channels)
    check_raw(cuda, [make(cuda, g, 1, pixels, hidden, channels, RELU6)])


@of_all
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(cuda, activation, gated):
    g = torch.Generator().manual_seed(activation)
    check_raw(cuda, [make(cuda, g, 3, 49, 40, 24, activation, gated=gated)])


# Tiles within an image, at its border, over several images, and an image a pixel.
@of_all
@pytest.mark.parametrize(("images", "image_pixels"), [(1, 300), (3, 127), (2, 128), (2, 129), (40, 7), (150, 1)])
def test_gates_of_many_images(cuda, images, image_pixels):
    g = torch.Generator().manual_seed(images)
    check_raw(cuda, [make(cuda, g, images, image_pixels, 24, 16, HSWISH, gated=True)])


@of_both
def test_group_of_different_depths(cuda):
    g = torch.Generator().manual_seed(5)
    nodes = [make(cuda, g, 2, 70, hidden, 24, RELU, gated=hidden == 72) for hidden in (72, 8, 144, 330)]
    check_raw(cuda, nodes)


@of_both
def test_far_means(cuda):
    """With mean / std = 300 in d little is left of it, but what is left must come through."""
    g = torch.Generator().manual_seed(6)
    check_raw(cuda, [make(cuda, g, 2, 65, 96, 16, RELU6, mean=300.0)])


@of_both
def test_far_means_of_outputs(cuda):
    """Statistics of outputs that are 300 deviations from zero do not cancel."""
    g = torch.Generator().manual_seed(11)
    node = make(cuda, g, 2, 350, 8, 16, LINEAR)
    node["affine"][1, :8] += 300 * node["affine"][0, :8]
    node["weight"] = node["weight"].abs()
    y = run_raw(cuda, [node])[0][0].double()
    assert (y.mean(0).abs() > 100 * y.std(0)).all()
    check_raw(cuda, [node])


# A unit has several tiles above 384 pixels under emulation, above 2048 * 128 on a GPU. Weights stay in shared
# memory, or come with every tile.
@of_both
@pytest.mark.parametrize(
    ("images", "image_pixels", "hidden", "channels"),
    [
        (1, 640, 72, 40),
        (3, 341, 40, 96),
        (17, 49, 136, 192),
        (29, 17, 600, 24),
        (641, 1, 16, 16),
        (5350, 49, 8, 8),
        (2, 131073, 8, 8),
    ],
)
def test_units_of_several_tiles(cuda, images, image_pixels, hidden, channels):
    """Statistics, and images with their gates, go on from tile to tile; copies of the next one are under way."""
    g = torch.Generator().manual_seed(images)
    pixels = images * image_pixels
    assert cuda.maps.pointwise_units(pixels) < -(-pixels // 128) or cuda.device.type == "cuda"
    check_raw(cuda, [make(cuda, g, images, image_pixels, hidden, channels, RELU6, gated=True)])


@of_both
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("channels", "with_residual"), [(21, True), (96, False), (168, True)])
def test_known_statistics(cuda, channels, with_residual, activation):
    check_mapped(cuda, 40, channels, activation, with_residual=with_residual)


# Every width of a pass, with one chunk and more.
@of_all
@pytest.mark.parametrize(
    ("hidden", "channels"),
    [(24, 16), (40, 13), (40, 24), (72, 32), (16, 40), (72, 64), (40, 80), (72, 96), (40, 160), (24, 192)],
)
def test_known_statistics_of_every_width(cuda, hidden, channels):
    check_mapped(cuda, hidden, channels, HSWISH, with_residual=True)


def check_mapped(cuda, hidden, channels, activation, *, with_residual):
    g = torch.Generator().manual_seed(channels + activation)
    node = make(cuda, g, 2, 70, hidden, channels, RELU)
    pixels, row = len(node["d"]), row_channels(channels)
    affine = padded_affine(random_affine(g, channels, activation, torch.ones(channels), 0.0), channels)
    residual = rows(torch.randn(pixels, channels, generator=g), cuda.dtype) if with_residual else None
    y, check = guarded(cuda, (pixels, row), cuda.dtype)
    on_device = [None if t is None else t.to(cuda.device) for t in (affine, residual)]
    launch(cuda, [node], [(y, None, *on_device, activation)])
    check()
    sums, error = sums_of(node)
    scale, shift, bound = affine[:, :channels].double()
    u = sums * scale + shift
    expected = activate(u, activation, bound)
    if with_residual:
        expected = expected + residual[:, :channels].double()
    # No activation is steeper than 1.1; quotients and exponentials are fast ones.
    check_map(y.cpu(), expected, 1.1 * error * scale.abs() + 2.0**-20 * (u.abs() + expected.abs() + 1))


@of_all
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(cuda, value, activation):
    """A number of d that is not finite shows in its own pixel alone, and in the statistics."""
    g = torch.Generator().manual_seed(8)
    node = make(cuda, g, 1, 140, 16, 16, activation)
    node["affine"][0] = node["affine"][0].abs()
    clean, _ = run_raw(cuda, [node])[0]
    node["d"][130, 3] = value
    node["weight"][:, 3] = node["weight"][:, 3].abs() + 0.25
    (y, partials), expected = run_raw(cuda, [node])[0], sums_of(node)[0]
    assert torch.equal(y[:128].isfinite(), torch.ones(128, 16, dtype=torch.bool))
    assert torch.equal(y[130].isnan(), expected[130].isnan())
    assert torch.equal(y[130].isinf(), expected[130].isinf())
    others = torch.arange(140) != 130
    check_map(y[others], expected[others], sums_of(node)[1][others])
    bad = not expected[130].isfinite().all()
    assert bad == (activation != RELU6 or value != value)
    assert partials[1, 1:3].isfinite().all() == (not bad)
    assert partials[0].isfinite().all()
    assert clean.isfinite().all()


@of_all
def test_padding_stays_zero(cuda):
    """Even of pixels that are not finite."""
    g = torch.Generator().manual_seed(9)
    node = make(cuda, g, 1, 20, 16, 11, RELU)
    node["d"][7, 5] = float("nan")
    y, partials = run_raw(cuda, [node])[0]
    assert y[7, :11].isnan().all()
    assert (y[:, 11:] == 0).all()
    assert (partials[:, :3, 11:] == 0).all()


@of_both
def test_same_in_every_run(cuda):
    g = torch.Generator().manual_seed(10)
    node = make(cuda, g, 1, 300, 80, 24, SILU)
    (first, first_sums), (second, second_sums) = run_raw(cuda, [node])[0], run_raw(cuda, [node])[0]
    assert torch.equal(first.view(torch.uint8), second.view(torch.uint8))
    assert torch.equal(first_sums, second_sums)
