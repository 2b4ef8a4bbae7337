"""`PathFilter`: multi-path sampling with rejection, and the candidate pool, for a training loop that exists already."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from greedynas_ext import arguments
from greedynas_ext.arguments import Batch, Chain, SupernetLike
from greedynas_ext.checks import check_count, check_generator, check_number, describe
from greedynas_ext.evaluate import check_options, evaluate_paths
from greedynas_ext.path_checks import PathTuple, check_paths
from greedynas_ext.pool import CandidatePool
from greedynas_ext.results import PathEvaluation
from greedynas_ext.samplers import DrawnPaths, GreedySampler, PathsCost, UniformSampler, check_costs
from greedynas_ext.schedules import ExploitSchedule

# Images with targets beside them, batches of both, or what gives a batch when a filter needs one.
ValidationImages: TypeAlias = Tensor | Iterable[Batch] | Callable[[], Batch]

_FORMAT = "greedynas.path_filter"
_VERSION = 1


@dataclass(frozen=True)
class FilterRound:
    """What one call of `PathFilter.draw` evaluated.

    Attributes:
        drawn: the m drawn paths, and which of them came from the pool.
        exploit_probability: ε, with which each was drawn from the pool.
        evaluation: their losses; `evaluation.top_k` names those that were returned.
    """

    drawn: DrawnPaths
    exploit_probability: float
    evaluation: PathEvaluation


class PathFilter:
    """Says which paths of a supernet to train next: those that GreedyNAS would (You et al., CVPR 2020).

        paths_to_train = PathFilter(supernet, m=10, k=5, schedule=schedule, generator=generator)
        for step in range(steps):
            for path in paths_to_train.draw(validation_images, validation_targets):
                ...  # one optimizer step of this path, as before
            if paths_to_train.steady:
                break

    Each call of `draw` is a round. In the warm-up of the schedule it draws k paths uniformly and evaluates nothing.
    After it, it draws m paths from (1-ε)·U(space) + ε·U(pool), compares their losses on the same validation images,
    enters all of them into the pool, and returns the k of lowest loss. Every t rounds past the warm-up it looks how
    much of the pool is new; where that is at most α in a full pool, `steady` says that training may stop.

    Args:
        supernet: as for `evaluate_paths`; it is read anew at every draw, and never changed.
        m: paths drawn for each comparison, at least 1.
        k: paths kept, 1 <= k <= m.
        pool_size: paths that the candidate pool holds at most.
        schedule: the exploit probability of each round, with the length of the warm-up.
        generator: of all draws, on the CPU; nothing else is random.
        max_cost: the budget, in the unit of `cost`; paths over it never enter the pool.
        cost: the costs of paths int64 [m, L] as m numbers; needed with `max_cost`.
        reject: never draw paths over the budget either; see `UniformSampler`.
        stop_threshold: α, in [0, 1) (0.08 in the authors' code); None: never steady.
        stop_interval: t; None: the rounds in which three times as many paths are drawn as the pool holds.
        bn: as for `evaluate_paths`, as are the following.
        calibration: images for bn="recalibrated".
        label_smoothing: of the losses that are compared.
        precision: "fp32", "bf16", "fp16" (on GPUs) or None.
        max_memory: bytes for activations and working memory.
        micro_batch: evaluate at most this many images at once.
        fused: whether fused kernels must (True) or must not (False) be used.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; for `max_cost` also where
            `reject` leaves no path to draw.
    """

    def __init__(
        self,
        supernet: SupernetLike,
        m: int = 10,
        k: int = 5,
        *,
        pool_size: int = 1000,
        schedule: ExploitSchedule,
        generator: torch.Generator,
        max_cost: float | None = None,
        cost: PathsCost | None = None,
        reject: bool = False,
        stop_threshold: float | None = 0.08,
        stop_interval: int | None = None,
        bn: Literal["batch", "running", "recalibrated"] = "batch",
        calibration: Tensor | None = None,
        label_smoothing: float = 0.0,
        precision: Literal["fp32", "bf16", "fp16"] | None = None,
        max_memory: int | None = None,
        micro_batch: int | None = None,
        fused: bool | None = None,
    ) -> None:
        num_choices = list(Chain.of(supernet).sizes)
        self.supernet = supernet
        self.m, self.k = check_count("m", m, 1), check_count("k", k, 1)
        if self.k > self.m:
            raise ValueError(f"k: expected at most m = {self.m} (the number of paths drawn), got {self.k}")
        if not isinstance(schedule, ExploitSchedule):
            raise TypeError(f"schedule: expected an ExploitSchedule, got {type(schedule).__name__}")
        self.schedule = schedule
        self.generator = check_generator(generator)
        pool_size = check_count("pool_size", pool_size, 1)
        self._cost = None if cost is None else _cost_of_one(cost)
        self._pool = CandidatePool(pool_size, max_cost=max_cost, cost=self._cost, num_choices=num_choices)
        self._uniform = UniformSampler(num_choices, cost=cost, max_cost=max_cost, reject=reject)
        self._greedy = GreedySampler(num_choices, self._pool, cost=cost, max_cost=max_cost, reject=reject)
        self._uniform.sample(1, torch.Generator())  # a budget that leaves no path shows here
        self.stop_threshold = _check_threshold(stop_threshold)
        if stop_interval is None:
            stop_interval = math.ceil(3 * pool_size / self.m)
        self.stop_interval = check_stop_interval(stop_interval, self.m, pool_size)
        check_options(bn, calibration, label_smoothing, max_memory)
        arguments.check_precision(precision, None)
        arguments.check_positive("micro_batch", micro_batch)
        self._options: dict[str, Any] = {
            "bn": bn,
            "calibration": calibration,
            "label_smoothing": label_smoothing,
            "precision": precision,
            "max_memory": max_memory,
            "micro_batch": micro_batch,
            "fused": fused,
        }
        self._step = 0
        self._turnover: float | None = None
        self._steady = False
        self._compared_pool: frozenset[PathTuple] = frozenset()  # P_t of the stopping rule
        self._last: FilterRound | None = None

    @property
    def pool(self) -> CandidatePool:
        """The candidate pool."""
        return self._pool

    @property
    def step(self) -> int:
        """How many rounds were drawn."""
        return self._step

    @property
    def exploit_probability(self) -> float:
        """ε of the next round; 0 in the warm-up."""
        return self.schedule(self._step)

    @property
    def turnover(self) -> float | None:
        """The share of the pool that was new at the last look at it; None before two looks at a full pool."""
        return self._turnover

    @property
    def steady(self) -> bool:
        """The stopping rule: whether at most α of the pool was new at the last look, and the pool full."""
        return self._steady

    @property
    def last(self) -> FilterRound | None:
        """What the last round evaluated; None where that was one of the warm-up, or there was none."""
        return self._last

    def draw(self, images: ValidationImages, targets: Tensor | None = None) -> Tensor:
        """The paths to train in this round.

        A draw that raises an error can be repeated: it is as if it had not been asked for.

        Args:
            images: validation images and, with a tensor, their targets, as for `evaluate_paths`; or a function
                without arguments that returns (images, targets). In the warm-up neither is looked at.
            targets: int64 [N] classes, with `images` as a tensor.

        Returns:
            int64 [k, L]: in the warm-up as drawn, after it lowest loss first. The draws are independent: a path may
            come twice.

        Raises:
            TypeError, ValueError, RuntimeError: as `evaluate_paths` and the samplers.

        Warns:
            RuntimeWarning: as `evaluate_paths`.
        """
        before = self.generator.get_state()
        try:
            if self.schedule.in_warmup(self._step):
                last, kept = None, self._uniform.sample(self.k, self.generator)
            else:
                last, kept = self._filter(images, targets)
        except BaseException:
            self.generator.set_state(before)
            raise
        self._last = last
        self._step += 1
        self._look_at_pool()
        return kept

    def _filter(self, images: ValidationImages, targets: Tensor | None) -> tuple[FilterRound, Tensor]:
        probability = self.schedule(self._step)
        drawn = self._greedy.sample(self.m, probability, self.generator)
        if callable(images):
            if targets is not None:
                raise TypeError("targets: expected None beside a function that returns (images, targets), got a value")
            images, targets = _batch_of(images)
        evaluation = evaluate_paths(self.supernet, drawn.paths, images, targets, k=self.k, **self._options)
        assert evaluation.top_k is not None
        self._pool.update(drawn.paths, evaluation.losses)
        return FilterRound(drawn, probability, evaluation), drawn.paths[evaluation.top_k.cpu()]

    def _look_at_pool(self) -> None:
        past_warmup = self._step - self.schedule.warmup_steps
        if past_warmup <= 0 or past_warmup % self.stop_interval:
            return
        if self._compared_pool:
            self._turnover = self._pool.turnover(self._compared_pool)
            threshold = self.stop_threshold
            self._steady = threshold is not None and self._pool.full and self._turnover <= threshold
        self._compared_pool = self._pool.snapshot() if self._pool.full else frozenset()

    def state_dict(self) -> dict[str, Any]:
        """All that the next draws depend on beside the arguments and the supernet, in types that JSON holds."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "step": self._step,
            "pool": self._pool.to_json(),
            "compared_pool": sorted(map(list, self._compared_pool)),
            "turnover": self._turnover,
            "steady": self._steady,
            "generator": self.generator.get_state().numpy().tobytes().hex(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` returned: with the same supernet and images, the draws are the same.

        Raises:
            ValueError: `state` is none of a filter with these arguments; says what was expected and what came.
                Nothing has changed then.
        """
        try:
            loaded = self._checked(state)
        except (TypeError, ValueError) as error:
            raise ValueError(f"state: expected what state_dict returned; {error}") from error
        self.generator.set_state(loaded.pop("generator"))
        vars(self).update(loaded, _last=None)
        self._greedy.pool = self._pool

    def _checked(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The attributes that `state` gives, and the generator's state."""
        if not isinstance(state, Mapping):
            raise TypeError(f"got {describe(state)}")
        keys = set(self.state_dict())
        if set(state) != keys:
            wrong = ", ".join(sorted(map(str, set(state) ^ keys)))
            raise ValueError(f"keys: expected {', '.join(sorted(keys))}; missing or unknown: {wrong}")
        if (state["format"], state["version"]) != (_FORMAT, _VERSION):
            came = f"{state['format']!r} version {state['version']!r}"
            raise ValueError(f"format: expected {_FORMAT!r} version {_VERSION}, got {came}")
        pool = CandidatePool.from_json(state["pool"], cost=self._cost)
        for name in ("capacity", "max_cost", "num_choices"):
            mine, its = getattr(self._pool, name), getattr(pool, name)
            if mine != its:
                raise ValueError(f"pool.{name}: expected {mine}, got {its}")
        assert pool.num_choices is not None
        compared = check_paths("compared_pool", state["compared_pool"], len(pool.num_choices), pool.num_choices)
        if not isinstance(state["steady"], bool):
            raise TypeError(f"steady: expected a bool, got {describe(state['steady'])}")
        return {
            "_step": check_count("step", state["step"], 0),
            "_pool": pool,
            "_compared_pool": frozenset(compared),
            "_turnover": None if state["turnover"] is None else check_number("turnover", state["turnover"]),
            "_steady": state["steady"],
            "generator": _generator_state(state["generator"]),
        }


def check_stop_interval(stop_interval: Any, m: int, pool_size: int) -> int:
    """Returns `stop_interval`, the rounds between two looks at the pool, as an int.

    Raises:
        TypeError: it is no integer.
        ValueError: it is below 1, or so small that every pool looks steady.
    """
    rounds = check_count("stop_interval", stop_interval, 1)
    if rounds * m <= pool_size:
        raise ValueError(
            f"stop_interval: expected more than {pool_size}/{m} rounds (pool size over paths drawn), in which the "
            f"whole pool could be new, got {rounds}; with fewer the pool looks steady at once"
        )
    return rounds


def _generator_state(text: Any) -> Tensor:
    try:
        state = torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
        torch.Generator().set_state(state)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"generator: expected the state of a CPU generator in hexadecimal, got {error}") from error
    return state


def _cost_of_one(cost: PathsCost) -> Callable[[PathTuple], float]:
    return lambda path: check_costs(cost(torch.tensor([path])), 1).item()


def _batch_of(function: Callable[[], Batch]) -> Batch:
    batch = function()
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise TypeError(f"images: expected the function to return (images, targets), got {describe(batch)}")
    return batch[0], batch[1]


def _check_threshold(value: Any) -> float | None:
    if value is None:
        return None
    threshold = check_number("stop_threshold", value)
    if not 0.0 <= threshold < 1.0:
        raise ValueError(f"stop_threshold: expected a value in [0, 1) or None, got {threshold!r}")
    return threshold
