"""The candidate pool of GreedyNAS: the best paths seen so far (You et al., CVPR 2020)."""

import math
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from sortedcontainers import SortedList

from greedynas_ext.checks import check_count, check_generator, check_number, describe
from greedynas_ext.files import PathLike
from greedynas_ext.path_checks import PathTuple, check_losses, check_num_choices, check_path, check_paths
from greedynas_ext.strict_json import read_json, write_json

PathCost = Callable[[PathTuple], float]

_FORMAT = "greedynas.candidate_pool"
_VERSION = 1
_KEYS = {"format", "version", "capacity", "max_cost", "num_choices", "entries"}
_ENTRY_KEYS = {"path", "loss", "evaluations"}


class CandidatePool:
    """At most `capacity` different paths, lowest loss first.

    Its rules are those of the authors' code: every evaluated path enters and the worst falls out; the score of a path
    that is evaluated again becomes the mean of the old score and the new loss; a path that costs more than `max_cost`
    never enters. Beyond them: a loss that is NaN or infinite never enters, and a path in the pool that comes to one
    falls out, for its old score no longer tells what it does. Equal losses are ordered by the paths themselves, so
    the pool never depends on the order of insertion among them. Adding a path takes O(log n) steps.

    Args:
        capacity: the most paths it holds, at least 1.
        max_cost: the budget, in the unit of `cost` (multiply-accumulates, say); None for none.
        cost: the cost of one path, given as a tuple of operation indices; needed with `max_cost`.
        num_choices: how many operations each layer has; then lengths and indices of all paths are checked against it,
            else all must be of one length and no index negative.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument is out of its range, or `max_cost` is without `cost`.
    """

    def __init__(
        self,
        capacity: int = 1000,
        *,
        max_cost: float | None = None,
        cost: PathCost | None = None,
        num_choices: Sequence[int] | None = None,
    ) -> None:
        self._capacity = check_count("capacity", capacity, 1)
        self._max_cost = _check_budget(max_cost)
        if self._max_cost is not None and cost is None:
            raise ValueError("cost: expected a function that gives the cost of a path, needed with max_cost, got None")
        self._cost = cost
        self._num_choices = None if num_choices is None else check_num_choices(num_choices)
        self._order = SortedList()  # of (loss, path)
        self._entries: dict[PathTuple, tuple[float, int]] = {}  # path -> (loss, evaluations)

    @property
    def capacity(self) -> int:
        """The most paths it holds."""
        return self._capacity

    @property
    def max_cost(self) -> float | None:
        """The budget that no path in it exceeds, or None."""
        return self._max_cost

    @property
    def num_choices(self) -> tuple[int, ...] | None:
        """How many operations each layer has, or None where it was not told."""
        return self._num_choices

    @property
    def full(self) -> bool:
        """Whether it holds `capacity` paths."""
        return len(self) == self._capacity

    @property
    def paths(self) -> torch.Tensor:
        """The paths, int64 [n, L], best first."""
        return self._to_tensor([path for _, path in self._order])

    @property
    def losses(self) -> torch.Tensor:
        """Their scores, float64 [n], lowest first."""
        return torch.tensor([loss for loss, _ in self._order], dtype=torch.float64)

    @property
    def evaluations(self) -> torch.Tensor:
        """How often each was evaluated since it last entered, int64 [n], in the order of `paths`."""
        return torch.tensor([self._entries[path][1] for _, path in self._order], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, path: Sequence[int] | torch.Tensor) -> bool:
        return check_path("path", path, None, None) in self._entries

    def __repr__(self) -> str:
        best = f", best loss {self._order[0][0]:.6g}" if self._order else ""
        return f"CandidatePool({len(self)} of {self._capacity} paths{best})"

    def add(self, path: Sequence[int] | torch.Tensor, loss: float | torch.Tensor) -> bool:
        """Enters the outcome of one evaluation.

        Args:
            path: int64 [L], or a sequence of ints.
            loss: its loss; NaN and infinities keep or throw the path out.

        Returns:
            Whether the path is in the pool now.

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: the path has another length than the others or an index out of range, or costs NaN.
        """
        checked = check_path("path", path, self._num_layers, self._num_choices)
        score = check_number("loss", loss)
        return self._add(checked, score, self._is_affordable(checked))

    def update(
        self,
        paths: torch.Tensor | Sequence[Sequence[int]],
        losses: torch.Tensor | Sequence[float],
    ) -> torch.Tensor:
        """Enters the outcomes of several evaluations, one after the other; bad arguments change nothing.

        Args:
            paths: int64 [m, L], or nested sequences of ints.
            losses: floating point [m], or a sequence of numbers.

        Returns:
            bool [m]: which of the paths are in the pool after all of them were entered.

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: an argument has the wrong shape, or a path an index out of range or a cost of NaN.
        """
        checked = check_paths("paths", paths, self._num_layers, self._num_choices)
        scores = check_losses(losses)
        if len(checked) != len(scores):
            raise ValueError(f"losses: expected one for each of {len(checked)} paths, got {len(scores)}")
        affordable = [self._is_affordable(path) for path in checked]
        for path, score, fits in zip(checked, scores, affordable, strict=True):
            self._add(path, score, fits)
        return torch.tensor([path in self._entries for path in checked], dtype=torch.bool)

    def snapshot(self) -> frozenset[PathTuple]:
        """The set of paths it holds now, for `turnover`."""
        return frozenset(self._entries)

    def turnover(self, snapshot: AbstractSet[PathTuple]) -> float:
        """The share of the pool that has come in since `snapshot`: 1 - |P_t ∩ P| / |P|, P being the pool as it is now.

        Training may stop where it is at most α (0.08 in the authors' code), with a full pool and past the warm-up. The
        poster prints π = |P_t ∩ P| / |P| ≤ α, the complement, which taken literally would stop when the pool has
        *changed*; this is the form of the authors' code. An empty pool has turnover 1: it never counts as steady.
        """
        if not self._entries:
            return 1.0
        return sum(path not in snapshot for path in self._entries) / len(self)

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        """Draws `n` of its paths uniformly, independently and with replacement.

        Returns:
            int64 [n, L].

        Raises:
            TypeError: `n` is no integer or `generator` no generator.
            ValueError: the pool is empty, `n` negative, or the generator not on the CPU.
        """
        n = check_count("n", n, 0)
        check_generator(generator)
        if not self._entries:
            raise ValueError("pool: cannot sample from it while it is empty")
        picks: list[int] = torch.randint(len(self), (n,), generator=generator).tolist()
        return self._to_tensor([self._order[pick][1] for pick in picks])

    def to_json(self) -> dict[str, Any]:
        """The whole pool in types that JSON holds; `from_json` gives back the same, bit for bit, but for `cost`."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "capacity": self._capacity,
            "max_cost": self._max_cost,
            "num_choices": None if self._num_choices is None else list(self._num_choices),
            "entries": [
                {"path": list(path), "loss": loss, "evaluations": self._entries[path][1]} for loss, path in self._order
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], *, cost: PathCost | None = None) -> "CandidatePool":
        """Builds the pool that `to_json` described, after checking that it is one.

        Args:
            data: what `to_json` returned.
            cost: as for the constructor; the entries are checked against the budget with it. Without it a pool that
                has a budget can be read and sampled, but takes no further paths.

        Raises:
            ValueError: `data` is no pool, or breaks a rule of the pool; the error says which and where.
        """
        try:
            return cls._from_json(data, cost)
        except (TypeError, ValueError) as error:
            raise ValueError(f"no valid candidate pool: {error}") from error

    def save(self, path: PathLike) -> None:
        """Writes it to a JSON file, atomically.

        Raises:
            OSError: the write failed; an older file is as it was.
        """
        write_json(path, self.to_json(), indent=None)

    @classmethod
    def load(cls, path: PathLike, *, cost: PathCost | None = None) -> "CandidatePool":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged or holds no valid pool; the error names it and says what is wrong.
        """
        data = read_json(path)
        try:
            return cls.from_json(data, cost=cost)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @property
    def _num_layers(self) -> int | None:
        if self._num_choices is not None:
            return len(self._num_choices)
        return len(self._order[0][1]) if self._order else None

    def _to_tensor(self, paths: list[PathTuple]) -> torch.Tensor:
        return torch.tensor(paths, dtype=torch.int64).reshape(len(paths), self._num_layers or 0)

    def _add(self, path: PathTuple, loss: float, affordable: bool) -> bool:
        known = self._entries.pop(path, None)
        evaluations = 1
        if known is not None:
            self._order.remove((known[0], path))
            loss, evaluations = _mean(known[0], loss), known[1] + 1
        if not (affordable and math.isfinite(loss)):
            return False
        self._entries[path] = (loss, evaluations)
        self._order.add((loss, path))
        if len(self) > self._capacity:
            _, worst = self._order.pop()
            del self._entries[worst]
        return path in self._entries

    def _is_affordable(self, path: PathTuple) -> bool:
        if self._max_cost is None:
            return True
        if self._cost is None:
            raise ValueError("cost: expected a function, needed to add to a pool with max_cost, got None")
        cost = check_number("cost of a path", self._cost(path))
        if math.isnan(cost):
            raise ValueError(f"cost: expected a number for path {list(path)}, got nan")
        return cost <= self._max_cost

    @classmethod
    def _from_json(cls, data: Any, cost: PathCost | None) -> "CandidatePool":
        _check_keys("pool", data, _KEYS)
        if data["format"] != _FORMAT or data["version"] != _VERSION:
            raise ValueError(
                f"format: expected {_FORMAT!r} version {_VERSION}, got {data['format']!r} version {data['version']!r}"
            )
        pool = cls(data["capacity"], num_choices=data["num_choices"])
        pool._max_cost, pool._cost = _check_budget(data["max_cost"]), cost
        entries = data["entries"]
        if not isinstance(entries, list) or len(entries) > pool._capacity:
            found = len(entries) if isinstance(entries, list) else describe(entries)
            raise ValueError(f"entries: expected a list of at most {pool._capacity} (its capacity), got {found}")
        for i, entry in enumerate(entries):
            name = f"entries[{i}]"
            _check_keys(name, entry, _ENTRY_KEYS)
            path = check_path(f"{name}.path", entry["path"], pool._num_layers, pool._num_choices)
            loss = check_number(f"{name}.loss", entry["loss"])
            if not math.isfinite(loss):
                raise ValueError(f"{name}.loss: expected a finite number, got {loss!r}")
            if path in pool._entries:
                raise ValueError(f"{name}.path: expected every path once, got {list(path)} again")
            if pool._order and (loss, path) < pool._order[-1]:
                raise ValueError(f"{name}: expected entries sorted by loss, then path; it belongs before the last one")
            if cost is not None and not pool._is_affordable(path):
                raise ValueError(f"{name}.path: expected a cost of at most {pool._max_cost!r}, got {cost(path)!r}")
            pool._entries[path] = (loss, check_count(f"{name}.evaluations", entry["evaluations"], 1))
            pool._order.add((loss, path))
        return pool


def _check_budget(max_cost: Any) -> float | None:
    if max_cost is None:
        return None
    budget = check_number("max_cost", max_cost)
    if not (math.isfinite(budget) and budget > 0.0):
        raise ValueError(f"max_cost: expected a positive finite number or None, got {max_cost!r}")
    return budget


def _check_keys(name: str, data: Any, keys: set[str]) -> None:
    if not isinstance(data, Mapping):
        raise ValueError(f"{name}: expected an object, got {describe(data)}")
    if missing := sorted(keys - set(data)):
        raise ValueError(f"{name}: expected the keys {', '.join(sorted(keys))}; {', '.join(missing)} missing")
    if unknown := sorted(set(data) - keys):
        raise ValueError(f"{name}: expected no other keys than {', '.join(sorted(keys))}, got {', '.join(unknown)}")


def _mean(a: float, b: float) -> float:
    mean = (a + b) / 2
    return mean if math.isfinite(mean) else a / 2 + b / 2  # where only the sum overflows
