"""GreedyNAS on handwritten digits, beside random search and uniform sampling at equal cost."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from greedynas.comparison import Arm, write_comparison
from greedynas.config import RetrainConfig, SearchConfig, TrainConfig
from greedynas.progress import Reporter, silence
from greedynas.report import write_report
from greedynas.retraining import retrain
from greedynas.runs import RunFolder
from greedynas.search import search
from greedynas.training import train
from greedynas_ext.checks import check_count
from greedynas_ext.strict_json import read_json


@dataclass(frozen=True)
class DemoConfig:
    """GreedyNAS on scikit-learn's digits: supernet, search, retraining; random search and uniform sampling beside it.

    Stages that are finished are kept, so that an interrupted demo goes on where it was; another --run starts afresh.
    """

    run: Path = Path("runs/demo")
    """Folder of the demo."""
    iterations: int = 400
    """Rounds of the greedy supernet at most."""
    warmup_iterations: int = 75
    """Rounds of uniform sampling before the greedy ones."""
    pool_size: int = 200
    """Paths that the candidate pool holds at most."""
    max_macs: float = 1.0
    """Budget in millions of multiply-accumulates for an image."""
    population: int = 50
    """Paths of a generation."""
    generations: int = 12
    """Generations of NSGA-II; random search evaluates as many paths."""
    epochs: int = 20
    """Passes over the training images when a network is trained from scratch."""
    retrainings: int = 3
    """Networks trained from scratch of each winner, with different seeds."""
    seed: int = 0
    """Seed of everything random."""
    threads: int = 1
    """CPU threads of a stage: networks this small gain nothing from more. Searches and retrainings run side by side."""


def demo(config: DemoConfig) -> Path:
    """Runs the demo, or what is left of it; returns the path of its report.

    Raises:
        ValueError: an option cannot be, or differs from that with which the demo was begun.
    """
    check_count("retrainings", config.retrainings, 1)
    check_count("threads", config.threads, 1)
    if check_count("iterations", config.iterations, 1) <= config.warmup_iterations:
        raise ValueError(
            f"warmup_iterations: expected less than iterations={config.iterations}, so that some rounds are greedy, "
            f"got {config.warmup_iterations}"
        )
    console = Console(stderr=True)

    def say(text: str) -> None:
        console.print(f"[bold]{text}[/bold]", highlight=False)

    say("1/4 greedy: a supernet trained on promising paths")
    greedy = train(_training(config, "greedy"), resume=True)
    say("2/4 uniform: a supernet trained on uniformly drawn paths, at the same corrected cost")
    uniform = train(_training(config, "uniform", _equal_rounds(greedy)), resume=True)

    say("3/4 searches: NSGA-II in both, and random search in the greedy one, over as many paths")
    arms = {
        "greedy supernet, NSGA-II from the pool": (greedy, "nsga2"),
        "greedy supernet, random search": (greedy, "random"),
        "uniform supernet, NSGA-II": (uniform, "nsga2"),
    }
    searches = [(run.search(name), _search(config, run, name)) for run, name in arms.values()]
    _in_parallel("search", search, searches, config.threads)

    say("4/4 the three winners, trained from scratch and tested")
    retrainings = [
        (run.retraining(f"{name}-{number}"), _retraining(config, run, name, number))
        for run, name in arms.values()
        for number in range(config.retrainings)
    ]
    _in_parallel("retrain", retrain, retrainings, config.threads)

    for folder in (greedy, uniform):
        write_report(folder.root)
    return write_comparison(
        config.run,
        [
            Arm(label, run, name, [run.retraining(f"{name}-{number}") for number in range(config.retrainings)])
            for label, (run, name) in arms.items()
        ],
    )


def _in_parallel(
    label: str, stage: Callable[..., RunFolder], jobs: Sequence[tuple[RunFolder, Any]], threads: int
) -> None:
    """Runs a stage for each config, in as many processes as there are CPUs for them, which changes no result.

    Args:
        label: for the progress.
        stage: `search` or `retrain`.
        jobs: for each the folder of its result, and its config.
        threads: CPU threads of each.
    """
    left = []
    for folder, config in jobs:
        if folder.finished:
            stage(config, resume=True)  # makes sure that it was done with this config
        else:
            left.append(config)
    if not left:
        return
    processes = min(len(left), max(1, len(os.sched_getaffinity(0)) // threads))
    context = multiprocessing.get_context("spawn")
    with (
        Reporter(label, len(jobs), done=len(jobs) - len(left)) as reporter,
        ProcessPoolExecutor(processes, context, initializer=silence) as executor,
    ):
        try:
            for future in as_completed([executor.submit(stage, config, resume=True) for config in left]):
                future.result()
                reporter.advance({})
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)  # else all that is left would be run first
            raise


def _training(config: DemoConfig, sampler: str, iterations: int | None = None) -> TrainConfig:
    return TrainConfig(
        run=config.run / sampler,
        sampler=sampler,  # type: ignore[arg-type]
        iterations=config.iterations if iterations is None else iterations,
        warmup_iterations=config.warmup_iterations if sampler == "greedy" else 0,
        pool_size=config.pool_size,
        max_macs=config.max_macs,
        seed=config.seed,
        threads=config.threads,
    )


def _equal_rounds(greedy: RunFolder) -> int:
    """Rounds of uniform sampling that cost what the greedy training did, by the cost ratio measured in it."""
    summary: dict[str, Any] = read_json(greedy.summary)
    images_per_round = float(summary["images_trained"] / summary["iterations"])
    corrected = float(summary["corrected_optimizations"]["measured"])
    return max(1, round(corrected / images_per_round))


def _search(config: DemoConfig, run: RunFolder, method: str) -> SearchConfig:
    return SearchConfig(
        run=run.root,
        method=method,  # type: ignore[arg-type]
        population=config.population,
        generations=config.generations,
        seed=config.seed,
        threads=config.threads,
    )


def _retraining(config: DemoConfig, run: RunFolder, searched: str, number: int) -> RetrainConfig:
    return RetrainConfig(
        run=run.root,
        search=searched,
        name=f"{searched}-{number}",
        epochs=config.epochs,
        seed=config.seed + number,
        threads=config.threads,
    )
