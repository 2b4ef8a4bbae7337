"""The demo's report: what the greedy supernet bought, beside its baselines."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from greedynas.drawing import SERIES, new_figure, picture
from greedynas.run_results import read_results
from greedynas.runs import RunFolder
from greedynas.search_picture import best_losses
from greedynas_ext.files import write_bytes
from greedynas_ext.strict_json import read_json

_PICTURES = {
    "training.png": "Training loss",
    "pool.png": "Exploit probability and pool turnover",
    "draws.png": "Draws from the pool",
    "search-nsga2.png": "Search",
    "search-nsga2-architecture.png": "Architecture",
    "retraining.png": "Retraining",
}


@dataclass(frozen=True)
class Arm:
    """One way to an architecture: a supernet, a search in it, and retrainings of what was found.

    Attributes:
        label: for tables and legends.
        run: the supernet's folder.
        search: name of the search.
        retrainings: folders of the winner trained from scratch.
    """

    label: str
    run: RunFolder
    search: str
    retrainings: Sequence[RunFolder]

    def figures(self) -> dict[str, Any]:
        """Costs and results from the folders' summaries."""
        training = read_json(self.run.summary)
        found = read_json(self.run.search(self.search).summary)
        retrained = [read_json(folder.summary) for folder in self.retrainings]
        return {"training": training, "found": found, "retrained": retrained}


def write_comparison(root: Path, arms: Sequence[Arm]) -> Path:
    """Writes report.md and comparison.png in `root`; returns the report's path.

    Args:
        root: folder that holds the runs' folders.
        arms: what to compare; the first is the greedy one, whose measured cost ratio counts for all.

    Raises:
        FileNotFoundError, ValueError: a result is missing or damaged; names the file.
    """
    figures = [arm.figures() for arm in arms]
    write_bytes(root / "comparison.png", _picture(arms, figures))
    report = root / "report.md"
    write_bytes(report, _text(root, arms, figures).encode())
    return report


def _accuracies(figures: dict[str, Any]) -> list[float]:
    return [summary["test_accuracy"] for summary in figures["retrained"]]


def _text(root: Path, arms: Sequence[Arm], figures: Sequence[dict[str, Any]]) -> str:
    first = figures[0]["training"]
    ratio = first["cost_ratio"]["measured"]
    pool = read_json(arms[0].run.pool)
    lines = [
        "# GreedyNAS on handwritten digits",
        "",
        f"Data: {first['data']}. Space `{first['space']}`: {first['space_size']:,} paths, "
        f"{first['space_size'] // pool['capacity']:,} times the candidate pool. "
        f"Budget: {figures[0]['found']['max_macs']:g}M multiply-accumulates for an image.",
        "",
        "## What greedy bought",
        "",
        "![Search progress and test accuracy](comparison.png)",
        "",
        "| | images trained | evaluated | corrected cost | supernet | best loss found | M MACs | test accuracy |",
        "|:--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for arm, arm_figures in zip(arms, figures, strict=True):
        training, chosen = arm_figures["training"], arm_figures["found"]["chosen"]
        corrected = training["images_trained"] + training["images_evaluated"] / ratio
        seconds = training["seconds_training"] + training["seconds_filtering"]
        accuracies = _accuracies(arm_figures)
        lines.append(
            f"| {arm.label} | {training['images_trained']:,} | {training['images_evaluated']:,} | {corrected:,.0f} "
            f"| {seconds:.0f} s | {chosen['loss']:.4f} | {chosen['macs']:.2f} | {_spread(accuracies)} |"
        )
    lines += [
        "",
        f"Corrected cost is training images plus evaluated images / {ratio:.2f}, the cost ratio measured in this run "
        f"(GreedyNAS: {first['cost_ratio']['poster']}). Losses found are validation losses in each arm's own supernet, "
        f"in nats: they compare between searches of one supernet, not between supernets. Test accuracy is of networks "
        f"trained from scratch, mean (lowest to highest) of {len(figures[0]['retrained'])} seeds; "
        f"one of {figures[0]['retrained'][0]['test_images']} test images is "
        f"{1 / figures[0]['retrained'][0]['test_images']:.2%}.",
        "",
        _verdict(arms, figures),
        "",
        "## The runs",
        "",
    ]
    for folder in dict.fromkeys(arm.run for arm in arms):
        lines.append(f"- [{folder.root.name}]({folder.root.relative_to(root)}/report.md): its report, with pictures")
    run = arms[0].run
    lines += [
        "",
        "The greedy supernet's training, its pool and the chosen architecture:",
        "",
    ]
    for name, text in _PICTURES.items():
        if (run.pictures / name).exists():
            lines += [f"![{text}]({(run.pictures / name).relative_to(root)})", ""]
    lines += [f"Made by `greedynas demo --run {root}`; every folder holds the configuration that repeats it.", ""]
    return "\n".join(lines)


def _spread(accuracies: Sequence[float]) -> str:
    mean = statistics.fmean(accuracies)
    return f"{mean:.2%} ({min(accuracies):.2%} to {max(accuracies):.2%})"


def _verdict(arms: Sequence[Arm], figures: Sequence[dict[str, Any]]) -> str:
    """What the test accuracies say, in words that the figures carry."""
    greedy = _accuracies(figures[0])
    sentences = []
    for arm, arm_figures in zip(arms[1:], figures[1:], strict=True):
        others = _accuracies(arm_figures)
        difference = statistics.fmean(greedy) - statistics.fmean(others)
        overlap = min(greedy) <= max(others) and min(others) <= max(greedy)
        certainty = "the seeds' ranges overlap, so this run cannot tell them apart" if overlap else "beyond the seeds"
        if len(greedy) == len(others) == 1:
            certainty = "with one seed each, this run cannot tell what is chance"
        sentences.append(
            f"Against *{arm.label}* the difference in mean test accuracy is {100 * difference:+.2f} points: "
            f"{certainty}."
        )
    return " ".join(sentences)


@picture
def _picture(arms: Sequence[Arm], figures: Sequence[dict[str, Any]]) -> Figure:
    """Left: lowest loss against paths evaluated, for each search; right: test accuracies."""
    figure = new_figure(3.0)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    curves = []
    for number, (arm, arm_figures) in enumerate(zip(arms, figures, strict=True)):
        colour = SERIES[number % len(SERIES)]
        (found,) = (done for done in read_results(arm.run.root).searches if done.name == arm.search)
        curves.append(best_losses(found))
        left.plot(np.arange(1, len(curves[-1]) + 1), curves[-1], color=colour, drawstyle="steps-post", label=arm.label)
        accuracies = sorted(100 * accuracy for accuracy in _accuracies(arm_figures))
        # Equal accuracies stand above each other.
        heights = [number - 0.12 * accuracies[:i].count(accuracy) for i, accuracy in enumerate(accuracies)]
        right.plot(accuracies, heights, "o", color=colour, alpha=0.7, markersize=6, markeredgewidth=0)
        right.plot(statistics.fmean(accuracies), number + 0.22, "^", color=colour, markersize=6)
    # What the first few paths of a random draw had would press the rest onto the floor.
    top = 1.08 * max(np.nanmax(curve[min(9, len(curve) - 1) :]) for curve in curves)
    left.set_ylim(0.9 * min(np.nanmin(curve) for curve in curves), top)
    left.set(xlabel="paths evaluated", ylabel="nats", xlim=(0, None), title="Lowest validation loss so far")
    left.legend(loc="upper right")
    right.set_yticks(range(len(arms)), [arm.label.replace(", ", ",\n") for arm in arms])
    right.set(ylim=(len(arms) - 0.5, -0.5), xlabel="%, each seed and (triangle) their mean", title="Test accuracy")
    return figure
