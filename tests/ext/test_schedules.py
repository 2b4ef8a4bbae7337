import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from greedynas_ext.schedules import ExploitSchedule

KINDS = ["linear", "cosine"]


@st.composite
def schedules(draw):
    total = draw(st.integers(1, 400))
    start, end = sorted((draw(st.floats(0.0, 1.0)), draw(st.floats(0.0, 1.0))))
    warmup = draw(st.integers(0, total))
    return ExploitSchedule(draw(st.sampled_from(KINDS)), start=start, end=end, warmup_steps=warmup, total_steps=total)


def test_kind_may_be_given_by_position():
    assert ExploitSchedule("cosine", warmup_steps=0, total_steps=3).kind == "cosine"


@given(schedules())
def test_zero_in_warmup_then_from_start_to_end_never_falling(schedule):
    values = [schedule(step) for step in range(schedule.total_steps + 5)]
    warmup, last = schedule.warmup_steps, schedule.total_steps - 1
    assert values[:warmup] == [0.0] * warmup
    assert all(a <= b for a, b in itertools.pairwise(values))
    assert all(schedule.start <= value <= schedule.end for value in values[warmup:])
    assert set(values[max(last, warmup) :]) == {schedule.end}
    if warmup < last:
        assert values[warmup] == schedule.start
    assert [schedule.in_warmup(step) for step in range(last + 1)] == [step < warmup for step in range(last + 1)]


def test_linear_goes_in_equal_steps():
    schedule = ExploitSchedule(start=0.25, end=0.75, warmup_steps=3, total_steps=8)
    assert [schedule(step) for step in range(9)] == [0, 0, 0, 0.25, 0.375, 0.5, 0.625, 0.75, 0.75]


def test_cosine_is_the_rising_half_wave():
    schedule = ExploitSchedule("cosine", start=0.1, end=0.9, warmup_steps=10, total_steps=111)
    expected = [0.1 + 0.8 * (1 - math.cos(math.pi * t / 100)) / 2 for t in range(101)]
    assert [schedule(10 + t) for t in range(101)] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_go_from_0_to_eight_tenths(kind):
    schedule = ExploitSchedule(kind, warmup_steps=5, total_steps=26)
    assert (schedule(5), schedule(15), schedule(25)) == (0.0, pytest.approx(0.4), 0.8)


@pytest.mark.parametrize("kind", KINDS)
def test_long_schedules_do_not_wobble_at_their_ends(kind):
    schedule = ExploitSchedule(kind, warmup_steps=0, total_steps=10**8)
    for begin in (0, 10**8 - 1000):
        values = [schedule(step) for step in range(begin, begin + 1000)]
        assert values == sorted(values)


def test_rounding_does_not_lift_it_above_the_end():
    assert 0.29 + (0.92 - 0.29) > 0.92
    schedule = ExploitSchedule("cosine", start=0.29, end=0.92, warmup_steps=0, total_steps=10**9)
    assert schedule(10**9 - 2) == 0.92


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_after_the_warmup_has_the_end(kind):
    schedule = ExploitSchedule(kind, start=0.2, end=0.6, warmup_steps=4, total_steps=5)
    assert [schedule(step) for step in range(3, 7)] == [0.0, 0.6, 0.6, 0.6]


def test_a_warmup_of_all_steps_is_uniform_training():
    schedule = ExploitSchedule(warmup_steps=7, total_steps=7)
    assert [schedule(step) for step in range(7)] == [0.0] * 7


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"kind": "sine"}, ValueError, "kind: expected one of linear, cosine, got 'sine'"),
        ({"start": 0.9}, ValueError, r"start: expected at most end = 0.8 \(the schedule never falls\), got 0.9"),
        ({"start": -0.1}, ValueError, r"start: expected a probability in \[0, 1\], got -0.1"),
        ({"end": 1.5}, ValueError, r"end: expected a probability in \[0, 1\], got 1.5"),
        ({"end": math.nan}, ValueError, "end: expected a probability"),
        ({"end": None}, TypeError, "end: expected a number, got NoneType None"),
        ({"total_steps": 0}, ValueError, "total_steps: expected at least 1, got 0"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps: expected at least 0, got -1"),
        ({"warmup_steps": 11}, ValueError, "warmup_steps: expected at most total_steps = 10, got 11"),
        ({"warmup_steps": 2.0}, TypeError, "warmup_steps: expected an integer, got float 2.0"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        ExploitSchedule(**{"warmup_steps": 2, "total_steps": 10, **arguments})


@pytest.mark.parametrize(("step", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError)])
def test_bad_steps_are_refused(step, error):
    schedule = ExploitSchedule(warmup_steps=2, total_steps=10)
    with pytest.raises(error, match="step: expected"):
        schedule(step)
    with pytest.raises(error, match="step: expected"):
        schedule.in_warmup(step)


def test_numpy_steps_count():
    schedule = ExploitSchedule(warmup_steps=2, total_steps=4)
    assert schedule(np.int64(3)) == 0.8
