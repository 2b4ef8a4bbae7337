"""GreedyNAS on handwritten digits, beside random search and uniform sampling at equal cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from greedynas._checks import check_count
from greedynas.comparison import Arm, write_comparison
from greedynas.config import RetrainConfig, SearchConfig, TrainConfig
from greedynas.report import write_report
from greedynas.retraining import retrain
from greedynas.runs import RunFolder
from greedynas.search import search
from greedynas.storage import read_json
from greedynas.training import train


@dataclass(frozen=True)
class DemoConfig:
    """GreedyNAS on scikit-learn's digits: supernet, search, retraining; random search and uniform sampling beside it.

    Stages that are finished are kept, so that an interrupted demo goes on where it was; another --run starts afresh.
    """

    run: Path = Path("runs/demo")
    """Folder of the demo."""
    iterations: int = 450
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
    epochs: int = 25
    """Passes over the training images when a network is trained from scratch."""
    retrainings: int = 3
    """Networks trained from scratch of each winner, with different seeds."""
    seed: int = 0
    """Seed of everything random."""


def demo(config: DemoConfig) -> Path:
    """Runs the demo, or what is left of it; returns the path of its report.

    Raises:
        ValueError: an option cannot be, or differs from that with which the demo was begun.
    """
    check_count("retrainings", config.retrainings, 1)
    if check_count("iterations", config.iterations, 1) <= config.warmup_iterations:
        raise ValueError(
            f"warmup_iterations: expected less than iterations={config.iterations}, so that some rounds are greedy, "
            f"got {config.warmup_iterations}"
        )
    console = Console(stderr=True)

    def say(text: str) -> None:
        console.print(f"[bold]{text}[/bold]", highlight=False)

    say("1/4 greedy: a supernet trained on promising paths, NSGA-II from its candidate pool")
    greedy = train(_training(config, "greedy"), resume=True)
    searches = {"method": "nsga2", "population": config.population, "generations": config.generations}
    search(SearchConfig(greedy.root, seed=config.seed, **searches), resume=True)  # type: ignore[arg-type]

    say("2/4 random search in the same supernet, as many paths")
    searches["method"] = "random"
    search(SearchConfig(greedy.root, seed=config.seed, **searches), resume=True)  # type: ignore[arg-type]

    say("3/4 uniform: a supernet trained on uniformly drawn paths at the same corrected cost")
    uniform = train(_training(config, "uniform", _equal_rounds(greedy)), resume=True)
    searches["method"] = "nsga2"
    search(SearchConfig(uniform.root, seed=config.seed, **searches), resume=True)  # type: ignore[arg-type]

    say("4/4 the three winners, trained from scratch and tested")
    arms = [
        Arm("greedy supernet, NSGA-II from the pool", greedy, "nsga2", _retrain(config, greedy, "nsga2")),
        Arm("greedy supernet, random search", greedy, "random", _retrain(config, greedy, "random")),
        Arm("uniform supernet, NSGA-II", uniform, "nsga2", _retrain(config, uniform, "nsga2")),
    ]
    for folder in (greedy, uniform):
        write_report(folder.root)
    return write_comparison(config.run, arms)


def _training(config: DemoConfig, sampler: str, iterations: int | None = None) -> TrainConfig:
    return TrainConfig(
        run=config.run / sampler,
        sampler=sampler,  # type: ignore[arg-type]
        iterations=config.iterations if iterations is None else iterations,
        warmup_iterations=config.warmup_iterations if sampler == "greedy" else 0,
        pool_size=config.pool_size,
        max_macs=config.max_macs,
        seed=config.seed,
    )


def _equal_rounds(greedy: RunFolder) -> int:
    """Rounds of uniform sampling that cost what the greedy training did, by the cost ratio measured in it."""
    summary: dict[str, Any] = read_json(greedy.summary)
    images_per_round = float(summary["images_trained"] / summary["iterations"])
    corrected = float(summary["corrected_optimizations"]["measured"])
    return max(1, round(corrected / images_per_round))


def _retrain(config: DemoConfig, run: RunFolder, searched: str) -> Sequence[RunFolder]:
    return [
        retrain(
            RetrainConfig(
                run.root, search=searched, name=f"{searched}-{number}", epochs=config.epochs, seed=config.seed + number
            ),
            resume=True,
        )
        for number in range(config.retrainings)
    ]
