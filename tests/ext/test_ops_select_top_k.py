"""ops.select_top_k against a sort in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_memory import poisoned_memory

from greedynas_ext import ops, reference

INF, NAN = float("inf"), float("nan")
LOSSES = st.lists(st.one_of(st.floats(width=32), st.sampled_from([0.0, -0.0, 1.0, INF, -INF, NAN])), max_size=40)


@given(losses=LOSSES, data=st.data(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_equals_a_sort_in_python(losses: list[float], data: st.DataObject, dtype: torch.dtype):
    k = data.draw(st.integers(0, len(losses)))
    expected = sorted(
        range(len(losses)), key=lambda i: (math.isnan(losses[i]), 0.0 if math.isnan(losses[i]) else losses[i], i)
    )[:k]
    tensor = torch.tensor(losses, dtype=dtype)
    assert ops.select_top_k(tensor, k).tolist() == expected
    assert reference.select_top_k(tensor, k).tolist() == expected


def test_worked_example():
    losses = torch.tensor([NAN, INF, 0.0, -0.0, 2.0, 0.0, NAN, -INF])
    assert ops.select_top_k(losses, 8).tolist() == [7, 2, 3, 5, 4, 1, 0, 6]


def test_result_is_int64_and_written_everywhere():
    with poisoned_memory():
        selected = ops.select_top_k(torch.tensor([3.0, 1.0, 2.0]), 2)
    assert selected.dtype == torch.int64
    assert selected.tolist() == [1, 2]


def test_no_losses():
    assert ops.select_top_k(torch.zeros(0), 0).shape == (0,)


def test_strided_losses():
    losses = torch.tensor([[3.0, 0.0], [1.0, 0.0], [2.0, 0.0]])[:, 0]
    assert not losses.is_contiguous()
    assert ops.select_top_k(losses, 3).tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("losses", "k", "message"),
    [
        (torch.zeros(3), 4, r"k should be in \[0, m=3\], got 4"),
        (torch.zeros(3), -1, r"k should be in \[0, m=3\], got -1"),
        (torch.zeros(3, 1), 1, r"losses should be float64 or float32 \[m\], got float32 \[3, 1\]"),
        (torch.zeros(3, dtype=torch.int64), 1, r"losses should be .*, got int64 \[3\]"),
        (torch.zeros(3, dtype=torch.bfloat16), 1, r"losses should be .*, got bfloat16 \[3\]"),
    ],
)
def test_errors(losses: torch.Tensor, k: int, message: str):
    with pytest.raises(ValueError, match="^select_top_k: " + message):
        ops.select_top_k(losses, k)
