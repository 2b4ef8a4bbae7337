"""What a run folder has on record, read back with every field checked."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from greedynas.config import RetrainConfig, SearchConfig, TrainConfig, load_config
from greedynas.metrics_log import MetricsLog
from greedynas.runs import RunFolder, load_task
from greedynas.spaces import Space
from greedynas_ext.strict_json import read_json

Record = TypeVar("Record")


@dataclass(frozen=True)
class PathDraws:
    """How often a path was drawn from the candidate pool, and whether it is in it still."""

    path: list[int]
    draws: int
    in_pool: bool


@dataclass(frozen=True)
class CostRatio:
    """What training on an image costs, in evaluations of one: as measured in this run, and as GreedyNAS has it."""

    measured: float | None
    poster: float


@dataclass(frozen=True)
class CorrectedOptimizations:
    """Corrected #optimization, in training images, at either cost ratio."""

    measured: float
    poster: float


@dataclass(frozen=True)
class TrainingSummary:
    """Results and counts of a supernet's training (summary.json)."""

    space_size: int
    data: str
    iterations: int
    planned_iterations: int
    planned_optimizer_steps: int
    stopped_early: bool
    stop_interval: int
    turnover: float | None
    final_learning_rate: float
    optimizer_steps: int
    images_trained: int
    images_evaluated: int
    seconds_training: float
    seconds_filtering: float
    cost_ratio: CostRatio
    corrected_optimizations: CorrectedOptimizations
    pool_draws: list[PathDraws]


@dataclass(frozen=True)
class Round:
    """A round of a supernet's training; the last four are None where nothing was filtered."""

    iteration: int
    training_loss: float
    learning_rate: float
    pool: int
    turnover: float | None
    exploit_probability: float | None = None
    from_pool: int | None = None
    filter_losses: list[float] | None = None
    shared_fraction: float | None = None


@dataclass(frozen=True)
class ScoredPath:
    """A path that a search evaluated: loss in nats, accuracy in [0, 1], millions of multiply-accumulates."""

    path: list[int]
    loss: float
    accuracy: float
    macs: float
    generation: int


@dataclass(frozen=True)
class SearchSummary:
    """Results and counts of a search (summary.json)."""

    method: str
    max_macs: float | None
    chosen: ScoredPath
    front: list[ScoredPath]
    paths_evaluated: int
    images_evaluated: int
    first_population_from_pool: int


@dataclass(frozen=True)
class Epoch:
    """An epoch of a retraining."""

    epoch: int
    training_loss: float
    learning_rate: float


@dataclass(frozen=True)
class RetrainingSummary:
    """Results and counts of a retraining (summary.json)."""

    path: list[int]
    test_accuracy: float
    test_images: int
    epochs: int
    images_trained: int
    seconds: float
    macs: float
    params: int


@dataclass(frozen=True)
class SearchResults:
    """A finished search: its summary and every path that it evaluated."""

    name: str
    config: SearchConfig
    summary: SearchSummary
    evaluated: list[ScoredPath]


@dataclass(frozen=True)
class RetrainingResults:
    """A finished retraining: its summary and its epochs."""

    name: str
    config: RetrainConfig
    summary: RetrainingSummary
    epochs: list[Epoch]


@dataclass(frozen=True)
class RunResults:
    """A finished training of a supernet, and the searches and retrainings that have finished since, by name."""

    folder: RunFolder
    config: TrainConfig
    space: Space
    training: TrainingSummary
    rounds: list[Round]
    searches: list[SearchResults]
    retrainings: list[RetrainingResults]


def read_results(root: Path) -> RunResults:
    """Reads what a run folder has on record.

    Raises:
        FileNotFoundError: there is no finished training, or a file of a finished stage is missing.
        ValueError: a file is damaged, or a field of it missing or of the wrong type; names the file.
    """
    folder = RunFolder(root)
    if not folder.config.exists():
        raise FileNotFoundError(f"run: no run in {root} (expected {folder.config})")
    if not folder.finished:
        raise FileNotFoundError(f"run: the training in {root} is not finished; `greedynas train --resume` continues it")
    config = load_config(TrainConfig, folder.config)
    space = load_task(config).space
    training = _read_summary(TrainingSummary, folder)
    _check_paths(space, [draws.path for draws in training.pool_draws], folder.summary)
    return RunResults(
        folder,
        config,
        space,
        training,
        _read_metrics(Round, folder, training.iterations),
        [_read_search(folder.search(name), space) for name in folder.names("search")],
        [_read_retraining(folder.retraining(name), space) for name in folder.names("retrain")],
    )


def _read_search(folder: RunFolder, space: Space) -> SearchResults:
    summary = _read_summary(SearchSummary, folder)
    _check_paths(space, [scored.path for scored in (summary.chosen, *summary.front)], folder.summary)
    evaluated = _read_metrics(ScoredPath, folder, summary.paths_evaluated)
    return SearchResults(folder.root.name, load_config(SearchConfig, folder.config), summary, evaluated)


def _read_retraining(folder: RunFolder, space: Space) -> RetrainingResults:
    summary = _read_summary(RetrainingSummary, folder)
    _check_paths(space, [summary.path], folder.summary)
    if not (0.0 <= summary.test_accuracy <= 1.0 and summary.test_images > 0):
        raise ValueError(
            f"{folder.summary}: test_accuracy, test_images: expected a fraction of at least one image, got "
            f"{summary.test_accuracy} of {summary.test_images}"
        )
    epochs = _read_metrics(Epoch, folder, summary.epochs)
    return RetrainingResults(folder.root.name, load_config(RetrainConfig, folder.config), summary, epochs)


def _read_summary(kind: type[Record], folder: RunFolder) -> Record:
    return _record(kind, read_json(folder.summary), str(folder.summary))


def _read_metrics(kind: type[Record], folder: RunFolder, expected: int) -> list[Record]:
    records = MetricsLog(folder.metrics).read()
    if len(records) != expected:
        raise ValueError(
            f"{folder.metrics}: expected {expected:,} records, as {folder.summary} says, got {len(records):,}"
        )
    return [_record(kind, record, f"{folder.metrics}: line {line}") for line, record in enumerate(records, start=1)]


def _check_paths(space: Space, paths: list[list[int]], file: Path) -> None:
    try:
        if paths:
            space.check_paths(paths)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def _record(kind: type[Record], values: Any, where: str) -> Record:
    """The dataclass `kind` from a JSON object; what it has no field for is left out."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected an object, got {type(values).__name__}")
    hints, arguments = _hints(typing.cast(Any, kind)), {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name in values:
            arguments[field.name] = _value(hints[field.name], values[field.name], f"{where}: {field.name}")
        elif field.default is dataclasses.MISSING:
            raise ValueError(f"{where}: expected {field.name!r}, which is missing")
    return kind(**arguments)


@functools.cache
def _hints(kind: type[Any]) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value`, of JSON, as what the annotation `hint` says."""
    if isinstance(hint, types.UnionType):
        return None if value is None else _value(typing.get_args(hint)[0], value, where)
    if dataclasses.is_dataclass(hint):
        return _record(typing.cast(type[Any], hint), value, where)
    if hint is float and type(value) is int:
        return float(value)
    kind = typing.get_origin(hint) or hint
    if type(value) is not kind:
        raise ValueError(f"{where}: expected {kind.__name__}, got {type(value).__name__} {value!r}")
    if kind is list:
        return [_value(typing.get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    return value
