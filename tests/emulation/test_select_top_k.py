"""csrc/cuda/select_top_k.cu against a stable sort: indices are equal."""

import math

import pytest
import torch
from precisions import of_floats

GUARD = 8


def check(cuda, losses, k):
    device_losses = losses.to(cuda.device)
    indices = torch.full((k + GUARD,), -7, dtype=torch.int64, device=cuda.device)
    arguments = cuda.kernels.SelectTopK(
        losses=device_losses.data_ptr(), indices=indices.data_ptr(), count=len(losses), k=k
    )
    cuda.kernels.select_top_k(arguments, cuda.stream)
    cuda.synchronize()
    assert indices[:k].tolist() == torch.sort(losses, stable=True).indices[:k].tolist()
    assert (indices[k:] == -7).all()


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 513, 1000])
def test_numbers(cuda, count):
    losses = torch.randn(count, generator=torch.Generator().manual_seed(count))
    for k in {0, 1, count // 2, count}:
        check(cuda, losses, k)


@of_floats
@pytest.mark.parametrize("count", [10, 600])
def test_ties(cuda, count):
    losses = torch.randint(-2, 3, (count,), generator=torch.Generator().manual_seed(count)).float()
    check(cuda, losses, count)
    check(cuda, torch.full((count,), 2.5), count)
    check(cuda, torch.full((count,), math.nan), count)
    check(cuda, torch.full((count,), math.inf), count)


@pytest.mark.parametrize("count", [40, 700])
def test_special_values(cuda, count):
    """Both zeros are equal; infinities are numbers; NaN of every kind comes last; neighbours are told apart."""
    bits = [0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFFFFFFF, 0x7F800001, 0xFF800001]
    bits += [0x00000001, 0x80000001, 0x7F7FFFFF, 0xFF7FFFFF, 0x3F800000, 0x3F800001, 0xBF800000, 0xBF800001]
    values = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
    losses = values[torch.randint(0, len(values), (count,), generator=torch.Generator().manual_seed(count))]
    for k in (5, count):
        check(cuda, losses, k)


def test_many(cuda):
    if cuda.device.type == "cpu":
        pytest.skip("takes minutes under emulation")
    losses = torch.randint(0, 50_000, (100_000,), generator=torch.Generator().manual_seed(1)).float()
    for k in (10, 100_000):
        check(cuda, losses, k)
