"""Maps for tests of kernels: rows padded to 8 channels with zeros; memory that is NaN where nothing was written."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

GUARD = 64  # numbers behind what is written

ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x,
    torch.relu,
    torch.nn.functional.relu6,
    torch.nn.functional.hardswish,
    torch.nn.functional.silu,
)


def row_channels(channels: int) -> int:
    return -(-channels // 8) * 8


def padded(cuda: Any, values: Tensor) -> Tensor:
    """[..., channels] as a map of the device under test; in its precision."""
    row = row_channels(values.shape[-1])
    result = torch.zeros(*values.shape[:-1], row, dtype=cuda.dtype)
    result[..., : values.shape[-1]] = values.to(cuda.dtype)
    return result.to(cuda.device)


def affine_of(generator: torch.Generator, channels: int) -> Tensor:
    """scale, shift and zeros (kernels ask for no bound) [3, row_channels]."""
    affine = torch.zeros(3, row_channels(channels))
    affine[:2, :channels] = torch.randn(2, channels, generator=generator)
    affine[2] = math.nan
    return affine


class Written:
    """Memory for a result, NaN before."""

    def __init__(self, cuda: Any, *shape: int, dtype: torch.dtype | None = None) -> None:
        count = math.prod(shape)
        self._memory = torch.full((count + GUARD,), math.nan, dtype=dtype or cuda.dtype, device=cuda.device)
        self._shape = shape

    @property
    def address(self) -> int:
        return self._memory.data_ptr()

    def values(self) -> Tensor:
        """What was written, in float64."""
        memory = self._memory.cpu()
        assert memory[-GUARD:].isnan().all()
        return memory[:-GUARD].view(self._shape).double()


def rounding(cuda: Any) -> float:
    """Half of the distance of neighbouring numbers, relative."""
    return float(torch.finfo(cuda.dtype).eps) / 2


def units_of(cuda: Any, pixels: int) -> list[tuple[int, int]]:
    """First and last pixel, the latter excluded, of the units that statistics are taken of."""
    units = cuda.maps.pointwise_units(pixels)
    tiles = math.ceil(pixels / 128)
    share = math.ceil(tiles / units) * 128 if units else 0
    return [(first, min(first + share, pixels)) for first in range(0, pixels, share)]


def check_statistics(cuda: Any, partials: Tensor, stored: Tensor) -> None:
    """`partials` [units, 4, row] of what was stored, [pixels, row] in float64."""
    for unit, (first, last) in enumerate(units_of(cuda, len(stored))):
        pilot, total, squares, count = partials[unit]
        values = stored[first:last]
        assert torch.equal(pilot, values[0])
        assert (count == last - first).all()
        distances = values - pilot
        # Floats added up in an order of their own.
        for found, terms in ((total, distances), (squares, distances**2)):
            assert ((found - terms.sum(0)).abs() <= 4e-6 * terms.abs().sum(0) + 1e-30).all()
