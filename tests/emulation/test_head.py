"""head_pool: mean over each image of activation(x W' * scale + shift)."""

import pytest
import torch
from pointwise_reference import (
    ACTIVATIONS,
    RELU,
    RELU6,
    activate,
    guarded,
    padded_affine,
    random_affine,
    row_channels,
    rows,
)
from precisions import of_all


class Head:
    def __init__(self, cuda, g, images, image_pixels, in_channels, channels, activation=RELU):
        self.cuda, self.images, self.image_pixels = cuda, images, image_pixels
        self.in_channels, self.channels, self.activation = in_channels, channels, activation
        self.x = rows(torch.randn(images, image_pixels, in_channels, generator=g), cuda.dtype).to(cuda.device)
        weight = torch.randn(channels, in_channels, generator=g) / in_channels**0.5
        self.weight = rows(weight, cuda.dtype, pad_rows=True).to(cuda.device)
        affine = random_affine(g, channels, activation, torch.ones(channels), 0.0)
        self.affine = padded_affine(affine, channels).to(cuda.device)
        self.pooled, self.check_guards = guarded(cuda, (images, row_channels(channels)), torch.float32)

    def node(self):
        return self.cuda.maps.HeadPool(
            x=self.x.data_ptr(),
            weight=self.weight.data_ptr(),
            affine=self.affine.data_ptr(),
            pooled=self.pooled.data_ptr(),
            images=self.images,
            image_pixels=self.image_pixels,
            in_channels=self.in_channels,
            channels=self.channels,
            activation=self.activation,
        )

    def activated(self):
        """In float64, and how far single precision may be from it."""
        x = self.x.cpu()[..., : self.in_channels].double()
        weight = self.weight.cpu()[: self.channels, : self.in_channels].double()
        scale, shift, bound = self.affine.cpu()[:, : self.channels].double()
        u = x @ weight.T * scale + shift
        # Products of bfloat16 are exact, their sums and what follows in single precision; fast exponentials.
        error = 2.0**-20 * ((x.abs() @ weight.abs().T) * scale + shift.abs() + 1)
        return activate(u, self.activation, bound), error

    def check(self):
        self.check_guards()
        values, error = self.activated()
        pooled = self.pooled.cpu()
        distance = (pooled[:, : self.channels].double() - values.mean(1)).abs()
        # Sums of n numbers of a sign: a rounding each, of which few go the same way.
        allowed = error.mean(1) + 2.0**-22 * values.abs().mean(1)
        assert (distance <= allowed).all(), (distance / allowed).max()
        assert (pooled[:, self.channels :] == 0).all()


def launch(cuda, heads):
    cuda.maps.head_pool([head.node() for head in heads], cuda.stream)
    cuda.synchronize()


@of_all
@pytest.mark.parametrize(
    ("images", "image_pixels", "in_channels", "channels"),
    [
        (5, 49, 40, 136),
        (40, 1, 16, 24),
        (3, 7, 33, 11),
        (3, 8, 31, 257),  # a slice of channels, and one channel more
        (3, 9, 32, 256),
        (30, 4, 24, 40),
        (2, 111, 65, 16),
        (2, 112, 64, 16),  # a tile of columns
        (2, 113, 8, 16),
        (1, 700, 16, 8),
        (7, 49, 200, 32),  # weights do not stay in shared memory, at least in that of the emulation
        (3, 49, 320, 264),
    ],
)
def test_shapes(cuda, images, image_pixels, in_channels, channels):
    g = torch.Generator().manual_seed(images + image_pixels + channels)
    head = Head(cuda, g, images, image_pixels, in_channels, channels)
    launch(cuda, [head])
    head.check()


@of_all
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(cuda, activation):
    head = Head(cuda, torch.Generator().manual_seed(activation), 4, 49, 24, 40, activation)
    launch(cuda, [head])
    head.check()


@of_all
def test_large_image(cuda):
    head = Head(cuda, torch.Generator().manual_seed(1), 1, 50_000, 8, 8)
    launch(cuda, [head])
    head.check()


@of_all
def test_group(cuda):
    g = torch.Generator().manual_seed(2)
    heads = [Head(cuda, g, 6, 16, in_channels, 40) for in_channels in (40, 40, 136)]
    launch(cuda, heads)
    for head in heads:
        head.check()


@of_all
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_not_finite(cuda, activation):
    """In one image's means alone; ReLU6 limits what is infinite."""
    head = Head(cuda, torch.Generator().manual_seed(3), 4, 9, 16, 12, activation)
    head.x[1, 3, 2] = float("nan")
    head.x[2, 8, 5] = float("inf")
    launch(cuda, [head])
    head.check_guards()
    expected, pooled = head.activated()[0].mean(1), head.pooled.cpu()
    assert torch.equal(pooled[:, :12].isnan(), expected.isnan())
    assert torch.equal(pooled[:, :12].isinf(), expected.isinf())
    assert pooled[[0, 3]].isfinite().all()
    assert pooled[1, :12].isnan().all()
    assert (pooled[:, 12:] == 0).all()
    assert pooled[2].isfinite().all() == (activation == RELU6)


@of_all
def test_image_alone_gives_the_same(cuda):
    """Sums of an image do not depend on what else a block does."""
    head = Head(cuda, torch.Generator().manual_seed(4), 9, 49, 40, 24)
    launch(cuda, [head])
    alone = Head(cuda, torch.Generator().manual_seed(4), 9, 49, 40, 24)
    alone.x, alone.images = head.x[7:8].contiguous(), 1
    alone.pooled, _ = guarded(cuda, (1, 24), torch.float32)
    launch(cuda, [alone])
    assert torch.equal(head.pooled[7], alone.pooled[0])
