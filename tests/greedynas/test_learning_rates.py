import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from greedynas.learning_rates import cosine, exponential, with_warmup


@pytest.mark.parametrize(("step", "value"), [(0, 0.12), (25, 0.06 + 0.06 * math.sqrt(0.5)), (50, 0.06), (100, 0.0)])
def test_cosine_at_known_points(step, value):
    assert cosine(step, 101, 0.12, 0.0) == pytest.approx(value, abs=1e-15)


@given(
    total=st.integers(1, 500), start=st.floats(1e-6, 10), ratio=st.floats(0, 1), extra=st.integers(0, 5), data=st.data()
)
def test_cosine_falls_from_start_to_end_and_stays_there(total, start, ratio, extra, data):
    end = start * ratio
    assert cosine(0, total, start, end) == pytest.approx(start, rel=1e-12)
    if total > 1:
        assert cosine(total - 1 + extra, total, start, end) == pytest.approx(end, rel=1e-12)
    step = data.draw(st.integers(0, total - 1))
    assert cosine(step, total, start, end) >= cosine(step + 1, total, start, end) - 1e-12 * start


def test_warmup_rises_evenly_and_its_first_step_is_not_lost():
    assert [with_warmup(step, 4, 0.8) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    assert with_warmup(0, 0, 0.8) == 0.8


def test_exponential_is_a_staircase():
    # x0.97 every 2.4 epochs, as GreedyNAS retrains
    assert [exponential(epoch, 1.0) for epoch in (0.0, 2.39)] == [1.0, 1.0]
    assert [exponential(epoch, 1.0) for epoch in (2.4, 4.79)] == pytest.approx([0.97, 0.97])
    assert exponential(24.1, 0.064) == pytest.approx(0.064 * 0.97**10)
    assert exponential(5.0, 1.0, factor=0.5, every=2.0) == 0.25
