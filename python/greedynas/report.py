"""The report of a run folder: report.md, and the pictures in it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from greedynas import pictures
from greedynas.architecture_picture import architecture_picture
from greedynas.markdown import count, duration, image, macs, params, table
from greedynas.report_summary import accuracy, main_retraining, main_search, operations, summary
from greedynas.run_results import RetrainingResults, RunResults, SearchResults, read_results
from greedynas.search_picture import search_picture
from greedynas_ext.files import write_bytes

Stage = TypeVar("Stage", SearchResults, RetrainingResults)


def write_report(root: Path) -> Path:
    """Writes report.md and pictures/*.png of a run folder anew, each file whole or not at all.

    The same run folder gives the same bytes. Searches and retrainings that have not finished are left out.

    Args:
        root: the folder of a finished training.

    Returns:
        The report's file.

    Raises:
        FileNotFoundError: there is no finished training, or a file of a finished stage is missing.
        ValueError: a file is damaged; names it.
        OSError: the report cannot be written; an older one stays.
    """
    results = read_results(Path(root))
    report = _Report(results)
    folder = results.folder
    folder.pictures.mkdir(exist_ok=True)
    for name, data in report.pictures.items():
        write_bytes(folder.pictures / name, data)
    write_bytes(folder.report, report.text.encode())  # last: it never shows a picture that is not there
    return folder.report


class _Report:
    """The text of a report and, by name, the pictures that it shows."""

    def __init__(self, results: RunResults) -> None:
        self.results = results
        self.pictures: dict[str, bytes] = {}
        self.searches = _in_order(results.searches, main_search(results))
        self.retrainings = _in_order(results.retrainings, main_retraining(results))
        self.filters = [r for r in results.rounds if r.filter_losses]
        sections = (
            summary(results),
            self._training(),
            self._pool() if self.filters else [],
            self._draws() if results.training.pool_draws else [],
            self._searches() if self.searches else [],
            self._architectures(),
            self._retrainings() if self.retrainings else [],
            self._commands(),
        )
        self.text = "\n\n".join(paragraph for section in sections for paragraph in section) + "\n"

    def _picture(self, title: str, name: str, data: bytes) -> str:
        self.pictures[name] = data
        return image(title, f"pictures/{name}")

    def _training(self) -> list[str]:
        results = self.results
        config, rounds = results.config, results.rounds
        text = ["## Supernet training"]
        last = rounds[-max(1, len(rounds) // 10) :]
        sentence = f"Mean training loss of the last tenth: {np.mean([r.training_loss for r in last]):.3f} nats."
        if config.sampler == "greedy":
            sentence = (
                f"A round draws m = {config.sampled_paths} paths, compares them on {config.filter_images:,} validation "
                f"images and trains the best k = {config.kept_paths}; in the warm-up of {config.warmup_iterations:,} "
                f"rounds it trains {config.kept_paths} uniformly drawn ones. {sentence}"
            )
        elif config.sampler == "uniform":
            sentence = f"A round trains {config.kept_paths} uniformly drawn paths; nothing is filtered. {sentence}"
        else:
            sentence = (
                f"A round trains {results.space.num_operations} paths, in which every operation of every layer "
                f"occurs once, in one step; nothing is filtered. {sentence}"
            )
        text += [sentence, self._picture("Training loss", "training.png", pictures.training_picture(results))]
        if self.filters:
            last = self.filters[-max(1, len(self.filters) // 10) :]
            losses = np.sort([r.filter_losses for r in last], axis=1)
            kept, rejected = losses[:, : config.kept_paths], losses[:, config.kept_paths :]
            means = f"the kept paths' losses average {_mean(kept)}"
            if rejected.size:
                means += f", those of the rejected {_mean(rejected)}"
            text.append(
                f"Over the last tenth of the filters {means}. Bands reach from the lowest to the highest loss (moving "
                "means); filters measure the loss without label smoothing."
            )
        return text

    def _pool(self) -> list[str]:
        config, training = self.results.config, self.results.training
        drawn = len(self.filters) * config.sampled_paths
        from_pool = sum(r.from_pool or 0 for r in self.filters)
        shared = [r.shared_fraction for r in self.filters if r.shared_fraction is not None]
        end = self.filters[-1].exploit_probability or 0.0
        sentence = (
            f"The exploit probability reached {end:.2f} (schedule: {config.schedule}, {config.exploit_start:g} to "
            f"{config.exploit_end:g}); {from_pool:,} of {drawn:,} paths ({from_pool / drawn:.1%}) were drawn from the "
            f"pool, which holds {self.results.rounds[-1].pool:,} of at most {config.pool_size:,} paths."
        )
        if shared:
            sentence += f" Paths that share a prefix saved filters {np.mean(shared):.1%} of their MACs on average."
        rule = (
            f"Turnover is 1 - |P_t ∩ P| / |P|, the share of the pool that is new since the look "
            f"{training.stop_interval:,} rounds before; training stops where it is at most α and the pool is full."
        )
        picture = self._picture(
            "Exploit probability and pool turnover", "pool.png", pictures.pool_picture(self.results)
        )
        return ["## Exploitation", sentence, picture, rule]

    def _draws(self) -> list[str]:
        records = self.results.training.pool_draws
        draws = [r.draws for r in records]
        still = sum(r.in_pool for r in records)
        pool = self.results.rounds[-1].pool
        sentence = (
            f"{sum(draws):,} draws from the pool took {len(draws):,} different paths, the most frequent {max(draws):,} "
            f"times. Of the {pool:,} paths in the pool at the end, {still:,} were drawn at least once."
        )
        picture = self._picture("Draws from the pool", "draws.png", pictures.draws_picture(self.results))
        return ["## Draws from the pool", sentence, picture]

    def _searches(self) -> list[str]:
        searches = self.searches
        baseline = next((s for s in searches if s.summary.method == "random"), None)
        rows, shown = [], []
        for search in searches:
            result, chosen = search.summary, search.summary.chosen
            rows.append(
                (
                    search.name,
                    f"{result.paths_evaluated:,}",
                    count(result.images_evaluated),
                    f"{result.first_population_from_pool:,}",
                    f"{len(result.front):,}",
                    f"{chosen.loss:.4f} nats",
                    f"{chosen.accuracy:.2%}",
                    macs(chosen.macs),
                )
            )
            behind = baseline if result.method != "random" else None
            data = search_picture(search, behind)
            shown.append(self._picture(f"Search {search.name}", f"search-{search.name}.png", data))
        header = ("search", "paths", "images", "from the pool", "on its front", "lowest loss", "accuracy", "cost")
        budgets = sorted({s.summary.max_macs for s in searches if s.summary.max_macs is not None})
        within = f" within {' or '.join(f'{budget:g}' for budget in budgets)} M MACs" if budgets else ""
        note = (
            "Loss and accuracy are those on validation images with the supernet's weights; the choice is the path of "
            f"the lowest loss{within}."
        )
        return ["## Search", note, table(header, rows, right=range(1, 8)), *shown]

    def _architectures(self) -> list[str]:
        """A picture for each path that a search chose or that was retrained."""
        space = self.results.space
        origins: dict[tuple[int, ...], list[str]] = {}
        names: dict[tuple[int, ...], str] = {}
        for search in self.searches:
            path = tuple(search.summary.chosen.path)
            origins.setdefault(path, []).append(search.name)
            names.setdefault(path, f"search-{search.name}")
        titles = {path: f"Chosen by {' and '.join(found)}" for path, found in origins.items()}
        for retraining in self.retrainings:
            path = tuple(retraining.summary.path)
            titles.setdefault(path, f"Retrained as {retraining.name}")
            names.setdefault(path, f"retrain-{retraining.name}")
        text = ["## Architecture"] if titles else []
        for path, title in titles.items():
            cost = f"{macs(space.macs(path) / 1e6)}, {params(space.params(path))} parameters"
            data = architecture_picture(space, path, f"{title}: {cost}")
            text += [
                f"{title}: {operations(self.results, path)}",
                self._picture(title, f"{names[path]}-architecture.png", data),
            ]
        return text

    def _retrainings(self) -> list[str]:
        retrainings = self.retrainings
        rows = [
            (
                r.name,
                "given path" if r.config.path is not None else f"search {r.config.search}",
                accuracy(r),
                macs(r.summary.macs),
                params(r.summary.params),
                f"{r.summary.epochs:,}",
                count(r.summary.images_trained),
                duration(r.summary.seconds),
            )
            for r in retrainings
        ]
        header = ("retraining", "path from", "test accuracy", "cost", "parameters", "epochs", "images", "time")
        images = " or ".join(sorted({f"{r.summary.test_images:,}" for r in retrainings}))
        note = (
            f"From scratch, on training and validation images together; the {images} test images are read once by "
            "each, at its end. ± is one standard error of a fraction of so many images."
        )
        picture = self._picture("Retraining", "retraining.png", pictures.retraining_picture(retrainings))
        return ["## Retraining", note, table(header, rows, right=range(2, 8)), picture]

    def _commands(self) -> list[str]:
        folder = self.results.folder
        lines = [f"greedynas train --config {shlex.quote(str(folder.config))} --run NEW"]
        for search in self.searches:
            lines.append(f"greedynas search --config {shlex.quote(str(folder.search(search.name).config))} --run NEW")
        for retraining in self.retrainings:
            config = folder.retraining(retraining.name).config
            lines.append(f"greedynas retrain --config {shlex.quote(str(config))} --run NEW")
        if not self.searches:
            lines.append(f"greedynas search --run {shlex.quote(str(folder.root))}  # comes next")
        files = (
            "`config.yaml` holds every option of a stage, `metrics.jsonl` its course, `summary.json` its results; "
            "`pool.json` the candidate pool, `supernet.safetensors` and `retrain/*/network.safetensors` the weights."
        )
        return ["## To repeat it", files, "```sh\n" + "\n".join(lines) + "\n```"]


def _in_order(stages: Sequence[Stage], main: Stage | None) -> list[Stage]:
    """The stage that the summary speaks of first, the others by name."""
    return sorted(stages, key=lambda stage: (stage is not main, stage.name))


def _mean(losses: npt.NDArray[np.float64]) -> str:
    """The mean of the finite ones, with its unit."""
    known = losses[np.isfinite(losses)]
    return f"{known.mean():.3f} nats" if known.size else "no finite loss"
