"""Ways to draw paths for supernet training: uniform, strictly fair, and greedy from the candidate pool.

Every draw takes its randomness from the generator it is given and from nothing else, so that its state and, for the
greedy sampler, the pool repeat it exactly.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from greedynas_ext.checks import check_count, check_generator, check_number, check_probability
from greedynas_ext.path_checks import check_num_choices
from greedynas_ext.pool import CandidatePool

# The costs of m paths, int64 [m, L], in the unit of the budget.
PathsCost = Callable[[torch.Tensor], Sequence[float] | torch.Tensor]

_MAX_ROUND = 4096  # paths drawn at once while the sampler looks for some within the budget


def check_costs(costs: Any, m: int) -> torch.Tensor:
    """Returns what a `PathsCost` gave for m paths as float64 [m], without NaN.

    Raises:
        TypeError, ValueError: it is no m numbers.
    """
    checked = torch.as_tensor(costs, dtype=torch.float64, device="cpu")
    if checked.shape != (m,):
        raise ValueError(f"cost: expected it to return {m} costs for {m} paths, got {list(checked.shape)}")
    if checked.isnan().any():
        raise ValueError("cost: expected numbers, got nan")
    return checked


@dataclass(frozen=True)
class DrawnPaths:
    """Paths drawn by `GreedySampler`.

    Attributes:
        paths: int64 [m, L].
        from_pool: bool [m]: which of them came from the candidate pool.
    """

    paths: torch.Tensor  # [m, L]
    from_pool: torch.Tensor  # [m]


class UniformSampler:
    """Draws paths independently and uniformly from the space, or from its part within a budget.

    Args:
        num_choices: how many operations each layer has.
        cost: the costs of paths int64 [m, L]; needed with `reject`.
        max_cost: the budget; needed with `reject`.
        reject: whether paths over the budget are drawn anew. The draws stay independent, but the share of good paths
            (`q` of Theorem 1) is then that among the paths within the budget. Without it they are drawn like all
            others, and only the candidate pool keeps them out.
        max_tries: how many paths may be drawn for each one that is asked for before `sample` gives up.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of its range, or `reject` is without `cost` or `max_cost`.
    """

    def __init__(
        self,
        num_choices: Sequence[int],
        *,
        cost: PathsCost | None = None,
        max_cost: float | None = None,
        reject: bool = False,
        max_tries: int = 10_000,
    ) -> None:
        self.num_choices = check_num_choices(num_choices)
        self.max_tries = check_count("max_tries", max_tries, 1)
        self.max_cost = None if max_cost is None else check_number("max_cost", max_cost)
        if self.max_cost is not None and not (math.isfinite(self.max_cost) and self.max_cost > 0.0):
            raise ValueError(f"max_cost: expected a positive finite number or None, got {max_cost!r}")
        self._budget: tuple[PathsCost, float] | None = None
        if reject:
            if cost is None or self.max_cost is None:
                missing = "cost" if cost is None else "max_cost"
                raise ValueError(f"{missing}: expected one, needed with reject=True, got None")
            self._budget = cost, self.max_cost

    def sample(self, m: int, generator: torch.Generator) -> torch.Tensor:
        """Draws `m` paths.

        Returns:
            int64 [m, L].

        Raises:
            TypeError: `m` is no integer or `generator` no generator.
            ValueError: `m` is below 1, the generator not on the CPU, a cost NaN, or the budget so small that
                `max_tries` draws a path did not find `m` within it; the error says how rare they are.
        """
        m = check_count("m", m, 1)
        check_generator(generator)
        return self._draw(m, generator) if self._budget is None else self._draw_within(m, generator, *self._budget)

    def _draw(self, m: int, generator: torch.Generator) -> torch.Tensor:
        columns = [torch.randint(choices, (m,), generator=generator) for choices in self.num_choices]
        return torch.stack(columns, dim=1)

    def _draw_within(self, m: int, generator: torch.Generator, cost: PathsCost, max_cost: float) -> torch.Tensor:
        """Rejection sampling in rounds that double, so that a tight budget does not cost one call a path.

        The first `m` paths within the budget are taken in the order they were drawn: those behind them are dropped
        whatever they are, so the ones taken are independent and uniform.
        """
        kept: list[torch.Tensor] = []
        found = drawn = 0
        cheapest = math.inf
        limit, size = self.max_tries * m, m
        while found < m:
            if drawn == limit:
                raise ValueError(
                    f"max_cost: expected a budget that leaves {m} paths to draw, got {max_cost!r}: "
                    f"{found} of {drawn} uniformly drawn paths were within it (acceptance {found / drawn:.2g}); "
                    f"the cheapest cost {cheapest:g}"
                )
            paths = self._draw(min(size, limit - drawn), generator)
            costs = check_costs(cost(paths), len(paths))
            within = paths[costs <= max_cost]
            kept.append(within)
            found += len(within)
            drawn += len(paths)
            cheapest = min(cheapest, costs.min().item())
            size = max(m - found, min(2 * size, _MAX_ROUND))
        return torch.cat(kept)[:m]


class FairSampler:
    """Draws as many paths as a layer has operations, so that each operation of each layer is in exactly one.

    This is the strict fairness of FairNAS (Chu et al., ICCV 2021): one random permutation a layer.

    Args:
        num_choices: how many operations each layer has; the same number in all.

    Raises:
        TypeError: `num_choices` is no sequence of ints.
        ValueError: it is empty, or its layers differ.
    """

    def __init__(self, num_choices: Sequence[int]) -> None:
        self.num_choices = check_num_choices(num_choices)
        if len(set(self.num_choices)) > 1:
            raise ValueError(
                "num_choices: expected the same number of operations in every layer (strict fairness needs it), "
                f"got {list(self.num_choices)}"
            )

    def sample(self, generator: torch.Generator) -> torch.Tensor:
        """Draws one path for each of the C operations of a layer.

        Returns:
            int64 [C, L]; each column is a permutation of 0..C-1.

        Raises:
            TypeError: `generator` is no generator.
            ValueError: the generator is not on the CPU.
        """
        check_generator(generator)
        return torch.stack([torch.randperm(choices, generator=generator) for choices in self.num_choices], dim=1)


class GreedySampler:
    """Draws paths from (1-ε)·U(space) + ε·U(pool), the exploration and exploitation of GreedyNAS (You et al., 2020).

    The paths of one draw are independent, as Theorem 1 asks: a path may come twice.

    Args:
        num_choices: how many operations each layer has.
        pool: the candidate pool; it is read anew at every draw.
        cost: as for `UniformSampler`, as are the following.
        max_cost: the budget.
        reject: whether paths over it are drawn anew; those in the pool are within the pool's own budget.
        max_tries: how many paths may be drawn for each one that is asked for.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of its range, or the pool was made for other `num_choices`.
    """

    def __init__(
        self,
        num_choices: Sequence[int],
        pool: CandidatePool,
        *,
        cost: PathsCost | None = None,
        max_cost: float | None = None,
        reject: bool = False,
        max_tries: int = 10_000,
    ) -> None:
        self._uniform = UniformSampler(num_choices, cost=cost, max_cost=max_cost, reject=reject, max_tries=max_tries)
        if not isinstance(pool, CandidatePool):
            raise TypeError(f"pool: expected a CandidatePool, got {type(pool).__name__}")
        if pool.num_choices not in (None, self.num_choices):
            raise ValueError(f"pool: expected one for {self.num_choices} choices, got one for {pool.num_choices}")
        self.pool = pool

    @property
    def num_choices(self) -> tuple[int, ...]:
        """How many operations each layer has."""
        return self._uniform.num_choices

    def sample(self, m: int, exploit_probability: float, generator: torch.Generator) -> DrawnPaths:
        """Draws `m` paths, each from the pool with probability `exploit_probability`, else uniformly.

        While the pool is empty all are drawn uniformly.

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: `m` is below 1, the probability outside [0, 1], the pool of another space, or as for
                `UniformSampler.sample`.
        """
        m = check_count("m", m, 1)
        exploit_probability = check_probability("exploit_probability", exploit_probability)
        check_generator(generator)
        # float64, for float32 knows 2^24 values only; drawn even when unused, so that the stream does not depend on ε
        from_pool = torch.rand(m, generator=generator, dtype=torch.float64) < exploit_probability
        if not len(self.pool):
            from_pool = torch.zeros(m, dtype=torch.bool)
        exploited = int(from_pool.sum())
        paths = torch.empty(m, len(self.num_choices), dtype=torch.int64)
        if exploited < m:
            paths[~from_pool] = self._uniform.sample(m - exploited, generator)
        if exploited:
            drawn = self.pool.sample(exploited, generator)
            if drawn.shape[1] != len(self.num_choices):
                raise ValueError(f"pool: expected paths of {len(self.num_choices)} layers, got {drawn.shape[1]}")
            paths[from_pool] = drawn
        return DrawnPaths(paths, from_pool)
