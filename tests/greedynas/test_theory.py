import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from greedynas.theory import corrected_optimizations, exploit_q, theorem1


@pytest.mark.parametrize(("q", "published"), [(0.6, 0.8338), (0.8, 0.9936)])
def test_theorem1_gives_the_published_figures(q, published):
    assert theorem1(m=10, k=5, q=q) == pytest.approx(published, abs=5e-5)


def test_exploiting_half_the_time_raises_q_as_published():
    assert exploit_q(0.6, 0.5) == pytest.approx(0.8, rel=1e-15)
    assert theorem1(m=10, k=5, q=exploit_q(0.6, 0.5)) == pytest.approx(0.9936, abs=5e-5)


@pytest.mark.parametrize(
    ("q", "eps", "expected"), [(0.3, 0.0, 0.3), (0.3, 1.0, 1.0), (0.0, 0.25, 0.25), (1.0, 0.4, 1.0)]
)
def test_exploit_q_at_the_ends(q, eps, expected):
    assert exploit_q(q, eps) == expected


@given(st.integers(1, 60), st.data(), st.floats(0.0, 1.0))
def test_theorem1_is_the_binomial_tail(m, data, q):
    k = data.draw(st.integers(0, m))
    assert theorem1(m=m, k=k, q=q) == pytest.approx(binom.sf(k - 1, m, q), rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("q", [0.25, 0.1, 1 / 3])
def test_theorem1_counts_outcomes_exactly(q):
    good = Fraction(q)
    total = Fraction(0)
    for outcome in itertools.product((0, 1), repeat=6):
        if sum(outcome) >= 4:
            total += math.prod(good if one else 1 - good for one in outcome)
    assert theorem1(m=6, k=4, q=q) == float(total)


def test_theorem1_of_many_paths_neither_overflows_nor_loses_the_tail():
    assert theorem1(m=2000, k=0, q=0.5) == 1.0
    assert theorem1(m=2000, k=2000, q=0.9) == pytest.approx(0.9**2000, rel=1e-11)


@pytest.mark.parametrize(("k", "q", "expected"), [(0, 0.0, 1.0), (1, 0.0, 0.0), (3, 1.0, 1.0), (0, 0.37, 1.0)])
def test_theorem1_at_the_ends(k, q, expected):
    assert theorem1(m=3, k=k, q=q) == expected


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"m": 0, "k": 0, "q": 0.5}, ValueError, "m: expected at least 1, got 0"),
        ({"m": 10, "k": 11, "q": 0.5}, ValueError, "k: expected at most m = 10, got 11"),
        ({"m": 10, "k": -1, "q": 0.5}, ValueError, "k: expected at least 0, got -1"),
        ({"m": 10, "k": 5, "q": 1.1}, ValueError, r"q: expected a probability in \[0, 1\], got 1.1"),
        ({"m": 10, "k": 5, "q": math.nan}, ValueError, "q: expected a probability .* got nan"),
        ({"m": 10, "k": 5, "q": 10**400}, ValueError, "q: expected a number within the range of a float"),
        ({"m": 10, "k": 5, "q": "0.6"}, TypeError, "q: expected a number, got str '0.6'"),
        ({"m": 10.0, "k": 5, "q": 0.6}, TypeError, "m: expected an integer, got float 10.0"),
        ({"m": True, "k": 1, "q": 0.6}, TypeError, "m: expected an integer, got bool True"),
    ],
)
def test_theorem1_refuses_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        theorem1(**arguments)


def test_exploit_q_refuses_bad_arguments():
    with pytest.raises(ValueError, match="q: expected a probability"):
        exploit_q(-0.1, 0.5)
    with pytest.raises(ValueError, match="exploit_probability: expected a probability"):
        exploit_q(0.6, 2)


@pytest.mark.parametrize(
    ("epochs", "evaluated_an_epoch", "published"),
    [(46, 2.40e6, 89.7e6), (120, 0, 147.6e6), (150, 0, 184.5e6), (73, 0, 89.8e6)],
    ids=["greedy", "uniform", "fairnas", "uniform-E"],
)
def test_corrected_optimizations_gives_the_published_figures(epochs, evaluated_an_epoch, published):
    assert corrected_optimizations(1.23e6 * epochs, evaluated_an_epoch * epochs) == pytest.approx(published, abs=5e4)


def test_corrected_optimizations_takes_a_measured_ratio():
    assert corrected_optimizations(100, 50, cost_ratio=2.5) == 120.0
    assert corrected_optimizations(0, 0) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 0), "training_images: expected a finite number of at least 0, got -1.0"),
        ((1, math.inf), "evaluated_images: expected a finite number of at least 0, got inf"),
        ((1, 1, 0), "cost_ratio: expected a positive finite number, got 0.0"),
        ((1, 1, math.nan), "cost_ratio: expected a positive finite number, got nan"),
    ],
)
def test_corrected_optimizations_refuses_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        corrected_optimizations(*arguments)
