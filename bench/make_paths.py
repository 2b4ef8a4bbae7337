"""Makes greedynas_ext/bench/paths/<space>-{pool,population}.json: pool and NSGA-II population of a trained supernet.

Run: python bench/make_paths.py mbv2-7 [--data-root DIR]     (mbv2-7: about 15 minutes on one core; mini-16: two)

What prefixes the paths of a real run share depends on its pool and its search, so both are recorded from one. The run
folders stay in runs/bench, and bench/rank_fidelity.py uses the mini-28 supernet from there.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

from greedynas.config import SearchConfig, TrainConfig, to_mapping
from greedynas.metrics_log import MetricsLog
from greedynas.runs import RunFolder
from greedynas.search import search
from greedynas.training import train
from greedynas_ext.bench.inputs import PATHS
from greedynas_ext.files import write_bytes
from greedynas_ext.strict_json import read_json

RUNS = Path(__file__).resolve().parents[1] / "runs" / "bench"

# The budget of mbv2-7 is the quantile (5.7% of the space) that 330M at 224x224, the budget of GreedyNAS, leaves.
# Paths are drawn within it, since a short run would find too few of them otherwise.
TRAINING: dict[str, dict[str, Any]] = {
    "mbv2-7": {
        "dataset": "fashion-mnist",
        "resolution": 32,
        "validation": 2000,
        "iterations": 1000,
        "warmup_iterations": 200,
        "filter_images": 200,
        "learning_rate": 0.1,
        "max_macs": 6.57,
        "draw_within_budget": True,
    },
    "mini-28": {
        "dataset": "fashion-mnist",
        "validation": 2000,
        "iterations": 250,
        "warmup_iterations": 60,
        "filter_images": 200,
        "pool_size": 100,
        "learning_rate": 0.1,
    },
    "mini-16": {},  # the defaults fit it: digits, 400 rounds
}
SEARCH: dict[str, dict[str, Any]] = {
    "mbv2-7": {"validation_images": 1000},
    "mini-28": {"validation_images": 500},
    "mini-16": {},
}


def configs(
    name: str, runs: Path = RUNS, data_root: Path | None = None, seed: int = 0
) -> tuple[TrainConfig, SearchConfig]:
    """The training and the search behind the files of a space."""
    training = {"pool_size": 200, "stop_threshold": None, "seed": seed, "threads": 1, **TRAINING[name]}
    run = runs / name
    if training.get("dataset") == "fashion-mnist":
        training["data_root"] = data_root
    return (
        TrainConfig(run=run, space=name, **training),
        SearchConfig(run=run, population=50, generations=10, seed=seed, threads=1, **SEARCH[name]),
    )


def last_population(records: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    """Records of the last generation that evaluated `size` new paths: what one call of `evaluate_paths` got."""
    generations: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        generations.setdefault(record["generation"], []).append(record)
    complete = [number for number, members in generations.items() if len(members) == size]
    if not complete:
        raise ValueError(f"records: expected a generation with {size} new paths, got none")
    return generations[max(complete)]


def write_paths(file: Path, space: str, origin: dict[str, Any], paths: list[list[int]], losses: list[float]) -> None:
    """Writes a file of paths with their losses, a path a line."""
    entries = ",\n".join(
        f"    {json.dumps({'path': path, 'loss': round(loss, 6)})}" for path, loss in zip(paths, losses, strict=True)
    )
    head = f'  "space": {json.dumps(space)},\n  "origin": {json.dumps(origin)}'
    write_bytes(file, f'{{\n{head},\n  "entries": [\n{entries}\n  ]\n}}\n'.encode())


def make(training: TrainConfig, searching: SearchConfig, folder: Path) -> None:
    """Trains and searches, or what is left of it, and writes the two files of the space into `folder`."""
    name = training.space
    run = train(training, resume=True)
    summary = read_json(run.summary)
    searched = search(searching, resume=True)
    origin = {
        "command": f"python bench/make_paths.py {name}",
        "date": datetime.date.today().isoformat(),
        "seed": training.seed,
        "data": summary["data"],
        "iterations": summary["iterations"],
        "optimizer_steps": summary["optimizer_steps"],
        "training": _options(training),
    }
    pool = read_json(run.pool)["entries"]
    write_paths(
        folder / f"{name}-pool.json",
        name,
        origin,
        [entry["path"] for entry in pool],
        [entry["loss"] for entry in pool],
    )
    population = last_population(list(MetricsLog(RunFolder(searched.root).metrics).read()), searching.population)
    write_paths(
        folder / f"{name}-population.json",
        name,
        {**origin, "generation": population[0]["generation"], "search": _options(searching)},
        [record["path"] for record in population],
        [record["loss"] for record in population],
    )


def _options(config: TrainConfig | SearchConfig) -> dict[str, Any]:
    """The options that are not of this machine."""
    return {name: value for name, value in to_mapping(config).items() if name not in ("run", "data_root")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spaces", nargs="+", choices=sorted(TRAINING), metavar="space", help=", ".join(TRAINING))
    parser.add_argument("--data-root", type=Path, help="folder of Fashion-MNIST's files")
    parser.add_argument("--runs", type=Path, default=RUNS, help="folder of the run folders")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in options.spaces:
        make(*configs(name, options.runs, options.data_root, options.seed), PATHS)
        print(f"wrote {PATHS}/{name}-pool.json and {name}-population.json")


if __name__ == "__main__":
    main()
