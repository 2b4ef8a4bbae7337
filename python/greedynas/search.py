"""Searching the best path of a trained supernet: NSGA-II whose first population comes from the candidate pool.

pymoo's NSGA-II (Deb et al., 2002) is driven by ask and tell, so that a whole population is one call of
`evaluate_paths`. A search is repeated from its seed; a resumed one replays what is on record without evaluating it.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.evaluator import Evaluator
from pymoo.core.mutation import Mutation
from pymoo.core.problem import Problem
from pymoo.operators.crossover.ux import UniformCrossover
from pymoo.problems.static import StaticProblem
from torch import Tensor

from greedynas.config import SearchConfig
from greedynas.data.seeds import derive_seed
from greedynas.metrics_log import MetricsLog
from greedynas.option_checks import check_search, named_as_options, use_threads
from greedynas.progress import Reporter
from greedynas.runs import RunFolder, TrainedRun, load_run
from greedynas_ext import evaluate_paths
from greedynas_ext.samplers import UniformSampler
from greedynas_ext.strict_json import write_json

_WORST = 1e6  # stands for the loss of a path whose loss is not finite: NSGA-II needs an order
_RECORD = {"path", "loss", "accuracy", "macs", "generation"}
Path = tuple[int, ...]


class CategoricalMutation(Mutation):  # type: ignore[misc]
    """Each gene, with probability `gene_probability`, becomes another of its values, uniformly."""

    def __init__(self, gene_probability: float) -> None:
        super().__init__()
        self._gene_probability = gene_probability

    def _do(self, problem: Problem, X: Any, *args: Any, random_state: Any = None, **kwargs: Any) -> Any:
        mutate = random_state.random(X.shape) < self._gene_probability
        # Adding 1..C-1 modulo C is a uniform draw among the other values.
        offsets = random_state.integers(1, np.maximum(problem.xu - problem.xl, 1) + 1, size=X.shape)
        count = problem.xu - problem.xl + 1
        return np.where(mutate, (X + offsets) % count, X)


class PathScores:
    """Losses and costs of paths, evaluated at most once each and kept on record."""

    def __init__(self, run: TrainedRun, config: SearchConfig, log: MetricsLog) -> None:
        self._run, self._config, self._log = run, config, log
        data = run.task.data
        self._calibration, self.calibration_images = None, 0
        if config.bn == "recalibrated":
            self.calibration_images = min(config.calibration_images, len(data.train))
            self._calibration = data.train.calibration(self.calibration_images, seed=config.seed)
        self.images = len(data.validation) if config.validation_images is None else config.validation_images
        # A random part, since images in folders come class by class.
        generator = torch.Generator().manual_seed(derive_seed("search", config.seed))
        self._indices = torch.randperm(len(data.validation), generator=generator)[: self.images]
        self._known: dict[Path, dict[str, Any]] = {}
        for record in log.read():
            if set(record) != _RECORD:
                raise ValueError(f"{log.path}: expected records of {', '.join(sorted(_RECORD))}, got {sorted(record)}")
            self._known[tuple(record["path"])] = record
        self.seen: set[Path] = set()
        self.order: list[Path] = []  # evaluated paths of this search, in order

    def score(self, paths: Sequence[Path], generation: int) -> list[dict[str, Any]]:
        """Records of `paths`: path, loss (nats), accuracy, macs (millions), generation."""
        if not all(path in self._known for path in paths):
            # What a kill left of this generation goes: rounding may depend on which paths are evaluated together.
            self._log.truncate_after(lambda record: bool(record["generation"] < generation))
            fresh = [path for path in dict.fromkeys(paths) if self._generation(path) in (None, generation)]
            evaluation = evaluate_paths(
                self._run.supernet,
                torch.tensor(fresh),
                self._batches(),
                bn=self._config.bn,
                calibration=self._calibration,
                max_memory=self._config.max_memory,
            )
            macs = self._run.task.macs_of(torch.tensor(fresh))
            for path, loss, accuracy, cost in zip(
                fresh, evaluation.losses.tolist(), evaluation.accuracy.tolist(), macs, strict=True
            ):
                record = {"path": list(path), "loss": loss, "accuracy": accuracy, "macs": cost}
                self._known[path] = {**record, "generation": generation}
                self._log.append(self._known[path])
        for path in paths:
            if path not in self.seen:
                self.seen.add(path)
                self.order.append(path)
        return [self._known[path] for path in paths]

    def _generation(self, path: Path) -> int | None:
        """In which generation a path was evaluated; None if it was not."""
        return self._known[path]["generation"] if path in self._known else None

    def records(self) -> list[dict[str, Any]]:
        """Records of all paths that this search evaluated, in order."""
        return [self._known[path] for path in self.order]

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for part in torch.split(self._indices, self._config.batch_size):
            yield self._run.task.data.validation.batch(part)


def search(config: SearchConfig, *, resume: bool = False) -> RunFolder:
    """Searches in a run folder; its result is in search/<name>/summary.json.

    Raises:
        FileNotFoundError: there is no finished training.
        FileExistsError, ValueError: as `RunFolder.open`, and for values that cannot be.
    """
    check_search(config)
    use_threads(config.threads)
    run = load_run(config.run)
    budget = config.max_macs if config.max_macs is not None else run.config.max_macs
    if config.validation_images is not None and config.validation_images > len(run.task.data.validation):
        raise ValueError(
            f"validation_images: expected 1 to {len(run.task.data.validation)} (all of them), "
            f"got {config.validation_images}"
        )
    generator = torch.Generator().manual_seed(config.seed)
    with named_as_options(max_cost="max_macs"):
        if config.method == "nsga2":
            population, from_pool = first_population(run, config.population, budget, generator)
        else:
            _sampler(run, budget).sample(1, torch.Generator())  # a budget that leaves no path shows here
    folder = run.folder.search(config.name or config.method)
    folder.open(config, resume)
    if folder.finished:
        return folder
    scores = PathScores(run, config, MetricsLog(folder.metrics))
    with Reporter(f"search ({config.method})", config.generations) as reporter:
        if config.method == "nsga2":
            history = _nsga2(run, config, budget, population, scores, reporter)
            history[0]["from_pool"] = from_pool
        else:
            history = _random(run, config, budget, generator, scores, reporter)
    within = [r for r in scores.records() if (budget is None or r["macs"] <= budget) and np.isfinite(r["loss"])]
    if not within:
        raise ValueError(
            f"max_macs: no evaluated path lies within {budget} million multiply-accumulates with a finite loss"
        )
    chosen = min(within, key=lambda r: (r["loss"], r["path"]))
    summary = {
        "method": config.method,
        "max_macs": budget,
        "chosen": {**chosen, "names": run.task.space.decode(chosen["path"])},
        "front": pareto_front(within),
        "history": history,
        "paths_evaluated": len(scores.records()),
        "images_evaluated": len(scores.records()) * scores.images,
        "images_calibrated": len(scores.records()) * scores.calibration_images,
        "first_population_from_pool": history[0].get("from_pool", 0),
    }
    write_json(folder.summary, summary)
    return folder


def pareto_front(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records than which none has both a lower loss and lower MACs, cheapest first."""
    front: list[dict[str, Any]] = []
    for record in sorted(records, key=lambda r: (r["macs"], r["loss"])):
        if not front or record["loss"] < front[-1]["loss"]:
            front.append(record)
    return front


def first_population(
    run: TrainedRun, size: int, budget: float | None, generator: torch.Generator
) -> tuple[Tensor, int]:
    """Distinct paths [size, L] and how many are from the pool: its best that fit the budget, then random ones."""
    paths: dict[Path, None] = {}
    if len(run.pool):
        pool = run.pool.paths
        macs = run.task.macs_of(pool)
        fitting = [p for p, cost in zip(pool.tolist(), macs, strict=True) if budget is None or cost <= budget]
        paths = dict.fromkeys(tuple(path) for path in fitting[:size])
    from_pool = len(paths)
    if from_pool < size:
        paths.update(dict.fromkeys(_draw_new(_sampler(run, budget), size - from_pool, paths, generator)))
    if len(paths) < size:
        raise ValueError(f"population: expected at most the {len(paths)} distinct paths that were found, got {size}")
    return torch.tensor(list(paths)), from_pool


def _draw_new(sampler: UniformSampler, count: int, taken: Container[Path], generator: torch.Generator) -> list[Path]:
    """`count` different paths that are not `taken`; fewer where a thousand times as many draws find no more."""
    new: dict[Path, None] = {}
    for _ in range(1000):
        if len(new) >= count:
            break
        drawn: Iterator[Path] = map(tuple, sampler.sample(count, generator).tolist())
        new.update(dict.fromkeys(path for path in drawn if path not in taken))
    return list(new)[:count]


def _sampler(run: TrainedRun, budget: float | None) -> UniformSampler:
    space = run.task.space
    choices = [space.num_operations] * space.num_layers
    return UniformSampler(choices, cost=run.task.macs_of, max_cost=budget, reject=budget is not None)


def _nsga2(
    run: TrainedRun,
    config: SearchConfig,
    budget: float | None,
    population: Tensor,
    scores: PathScores,
    reporter: Reporter,
) -> list[dict[str, Any]]:
    space = run.task.space
    problem = Problem(
        n_var=space.num_layers,
        n_obj=2 if config.cost_objective else 1,
        n_ieq_constr=0 if budget is None else 1,
        xl=0,
        xu=space.num_operations - 1,
        vtype=int,
    )
    mutation = config.mutation_probability
    algorithm = NSGA2(
        pop_size=config.population,
        sampling=population.numpy(),
        crossover=UniformCrossover(prob=config.crossover_probability),
        mutation=CategoricalMutation(1.0 / space.num_layers if mutation is None else mutation),
        eliminate_duplicates=True,
    )
    algorithm.setup(problem, termination=("n_gen", config.generations), seed=config.seed, verbose=False)
    history: list[dict[str, Any]] = []
    while algorithm.has_next():
        asked = algorithm.ask()
        if asked is None or len(asked) == 0:
            break  # the space is exhausted: no offspring is new
        paths: list[Path] = [tuple(int(gene) for gene in genes) for genes in asked.get("X")]
        records = scores.score(paths, len(history))
        Evaluator().eval(StaticProblem(problem, **_figures_of(records, config.cost_objective, budget)), asked)
        algorithm.tell(infills=asked)
        history.append(_generation(len(history), scores, budget))
        _report(reporter, history[-1])
    return history


def _figures_of(
    records: Sequence[dict[str, Any]], cost_objective: bool, budget: float | None
) -> dict[str, npt.NDArray[np.float64]]:
    losses = np.nan_to_num([r["loss"] for r in records], nan=_WORST, posinf=_WORST)
    macs = np.array([r["macs"] for r in records])
    figures = {"F": np.stack([losses, macs], 1) if cost_objective else losses[:, None]}
    if budget is not None:
        figures["G"] = (macs - budget)[:, None]
    return figures


def _random(
    run: TrainedRun,
    config: SearchConfig,
    budget: float | None,
    generator: torch.Generator,
    scores: PathScores,
    reporter: Reporter,
) -> list[dict[str, Any]]:
    sampler = _sampler(run, budget)
    history: list[dict[str, Any]] = []
    for number in range(config.generations):
        # New ones only, so that the baseline sees as many paths as NSGA-II at the least.
        paths = _draw_new(sampler, config.population, scores.seen, generator)
        if not paths and history:
            break  # the space is exhausted
        scores.score(paths, number)
        history.append(_generation(number, scores, budget))
        _report(reporter, history[-1])
    return history


def _generation(number: int, scores: PathScores, budget: float | None) -> dict[str, Any]:
    losses = [r["loss"] for r in scores.records() if (budget is None or r["macs"] <= budget) and np.isfinite(r["loss"])]
    return {"generation": number, "best_loss": min(losses, default=None), "paths": len(scores.order)}


def _report(reporter: Reporter, entry: dict[str, Any]) -> None:
    best = entry["best_loss"]
    reporter.advance({"best loss": "-" if best is None else f"{best:.4f}", "paths": str(entry["paths"])})
