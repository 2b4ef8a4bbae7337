"""csrc/cuda/arrange_channels.cu against indexing, bit for bit where nothing is activated."""

import math

import pytest
import torch
from map_cases import ACTIVATIONS, Written, rounding
from precisions import of_all

HALVES = ["bf16", "fp16", "fp16 on sm_75"]


def of_halves(test):
    return pytest.mark.parametrize("cuda", HALVES, indirect=True)(test)


class Sources:
    """Maps [pixels, row], NaN where nothing is to be read, and what is expected of them."""

    def __init__(self, cuda, pixels, out_row):
        self.cuda, self.pixels, self.out_row = cuda, pixels, out_row
        self.expected = torch.zeros(pixels, out_row, dtype=torch.float64)
        self.maps, self.given = [], []
        self.generator = torch.Generator().manual_seed(out_row)

    def add(self, row, reads, writes, offset=0):
        """`reads` and `writes`: ranges of channels; offset: of the map from a multiple of 16 bytes, in numbers."""
        memory = torch.full((offset + self.pixels * row,), math.nan, dtype=self.cuda.dtype)
        values = memory[offset:].view(self.pixels, row)
        values[:, list(reads)] = torch.randn(self.pixels, len(reads), generator=self.generator).to(self.cuda.dtype)
        self.expected[:, list(writes)] = values[:, list(reads)].double()
        moved = memory.to(self.cuda.device)
        address = moved.data_ptr() + offset * moved.element_size()
        self.maps.append(moved)
        self.given.append((address, row, reads.start, reads.step, len(reads), writes.start, writes.step))
        return self

    def run(self, name="arrange_channels", activation=0, dtype=None):
        out = Written(self.cuda, self.pixels, self.out_row, dtype=dtype)
        launch = getattr(self.cuda.maps, name)
        launch(self.given, out.address, self.out_row, activation, self.pixels, self.cuda.stream)
        self.cuda.synchronize()
        return out.values()


# 256 vectors of 8 numbers to a row of threads.
@of_all
@pytest.mark.parametrize("pixels", [1, 3, 700])
@pytest.mark.parametrize("channels", [1, 7, 8, 20, 64])
def test_rows_are_padded_with_zeros(cuda, pixels, channels):
    row = -(-channels // 8) * 8
    sources = Sources(cuda, pixels, row).add(channels, range(channels), range(channels))
    assert torch.equal(sources.run(), sources.expected)


@of_all
@pytest.mark.parametrize("half", [4, 8, 17, 24])
def test_halves_and_every_other_channel(cuda, half):
    """What splits read, at and beside multiples of 16 bytes."""
    row = -(-half // 8) * 8
    for reads in (range(half), range(half, 2 * half), range(0, 2 * half, 2), range(1, 2 * half, 2)):
        sources = Sources(cuda, 37, row).add(2 * half, reads, range(half))
        assert torch.equal(sources.run(), sources.expected)


@of_all
@pytest.mark.parametrize("half", [4, 8, 17, 24])
def test_concatenations_and_shuffles(cuda, half):
    row = -(-half // 8) * 8
    for one, two in (
        (range(half), range(half, 2 * half)),
        (range(0, 2 * half, 2), range(1, 2 * half, 2)),
        (range(half, 2 * half), range(half)),
    ):
        sources = Sources(cuda, 37, 2 * half).add(2 * half, range(half, 2 * half), one).add(row, range(half), two)
        assert torch.equal(sources.run(), sources.expected)


@of_all
def test_as_many_sources_as_there_may_be(cuda):
    sources = Sources(cuda, 9, 16 * 5)
    for number in range(16):
        sources.add(8, range(number % 3, number % 3 + 5), range(number, 80, 16))
    assert torch.equal(sources.run(), sources.expected)
    with pytest.raises(ValueError, match="sources: expected at most 16"):
        sources.add(8, range(5), range(5)).run()


@of_all
def test_rows_longer_than_a_block(cuda):
    channels = 2056 * 2
    sources = Sources(cuda, 3, channels).add(channels, range(0, channels, 2), range(channels // 2))
    sources.add(channels // 2, range(channels // 2), range(channels // 2, channels))
    assert torch.equal(sources.run(), sources.expected)


@of_all
def test_maps_at_no_multiple_of_16_bytes(cuda):
    sources = Sources(cuda, 5, 24).add(24, range(24), range(24), offset=1)
    assert torch.equal(sources.run(), sources.expected)


@of_all
@pytest.mark.parametrize("activation", range(5))
def test_activations(cuda, activation):
    sources = Sources(cuda, 50, 24).add(20, range(20), range(20))
    expected = ACTIVATIONS[activation](sources.expected)
    allowed = 1e-6 + rounding(cuda) * expected.abs()
    assert ((sources.run(activation=activation) - expected).abs() <= allowed).all()


@of_halves
@pytest.mark.parametrize("channels", [3, 16, 21])
def test_as_floats(cuda, channels):
    row = -(-channels // 8) * 8
    sources = Sources(cuda, 70, channels).add(row, range(channels), range(channels))
    assert torch.equal(sources.run("widen_channels", dtype=torch.float32), sources.expected)


def test_nothing(cuda):
    sources = Sources(cuda, 0, 8).add(8, range(8), range(8))
    assert sources.run().shape == (0, 8)
