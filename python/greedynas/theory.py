"""The arithmetic of the GreedyNAS paper: how likely good paths are, and what a run costs (You et al., CVPR 2020)."""

import math
from fractions import Fraction

from greedynas_ext.checks import check_count, check_number, check_probability

# What evaluating a path on one image costs, measured in the paper: 1/3.33 of training it on one image.
PAPER_COST_RATIO = 3.33


def theorem1(*, m: int, k: int, q: float) -> float:
    """The probability that at least `k` of `m` independently drawn paths are good (Theorem 1 of GreedyNAS).

    It is the sum over j = k..m of C(m, j) q^j (1-q)^(m-j), worked out exactly and rounded once. It holds for
    independent draws only: rejecting paths over a budget, or duplicates, changes `q`.

    Args:
        m: how many paths are drawn, at least 1.
        k: how many of them should be good, 0 to `m`.
        q: the probability that one draw is good; see `exploit_q` for draws that partly come from the candidate pool.

    Raises:
        TypeError: an argument is no number, or `m` or `k` no integer.
        ValueError: an argument is out of its range.
    """
    m = check_count("m", m, 1)
    k = check_count("k", k, 0)
    if k > m:
        raise ValueError(f"k: expected at most m = {m}, got {k}")
    good = Fraction(check_probability("q", q))
    return float(sum(math.comb(m, j) * good**j * (1 - good) ** (m - j) for j in range(k, m + 1)))


def exploit_q(q: float, exploit_probability: float) -> float:
    """The probability that a path drawn by ε·U(pool) + (1-ε)·U(space) is good, if every pool path is: ε + (1-ε) q.

    Args:
        q: the share of good paths in the space, in [0, 1].
        exploit_probability: ε, the probability of drawing from the candidate pool, in [0, 1].

    Raises:
        TypeError: an argument is no number.
        ValueError: an argument is outside [0, 1].
    """
    q = check_probability("q", q)
    exploit_probability = check_probability("exploit_probability", exploit_probability)
    return exploit_probability + (1.0 - exploit_probability) * q


def corrected_optimizations(
    training_images: float, evaluated_images: float, cost_ratio: float = PAPER_COST_RATIO
) -> float:
    """The paper's "corrected #optimization": evaluations counted as the training they cost.

    Args:
        training_images: images trained on, each counted once for every path that it trained.
        evaluated_images: images evaluated without gradients, each counted once for every path.
        cost_ratio: what training on one image costs, in evaluations of one image; 3.33 in the paper.

    Returns:
        training_images + evaluated_images / cost_ratio, in training images.

    Raises:
        TypeError: an argument is no number.
        ValueError: a count is negative or not finite, or the ratio is not positive and finite.
    """
    training = _check_images("training_images", training_images)
    evaluated = _check_images("evaluated_images", evaluated_images)
    ratio = check_number("cost_ratio", cost_ratio)
    if not (math.isfinite(ratio) and ratio > 0.0):
        raise ValueError(f"cost_ratio: expected a positive finite number, got {ratio!r}")
    return training + evaluated / ratio


def _check_images(name: str, value: float) -> float:
    count = check_number(name, value)
    if not (math.isfinite(count) and count >= 0.0):
        raise ValueError(f"{name}: expected a finite number of at least 0, got {count!r}")
    return count
