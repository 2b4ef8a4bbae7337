"""The demo's report: what the greedy supernet bought, beside its baselines."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from greedynas.runs import RunFolder
from greedynas.storage import MetricsLog, read_json, write_bytes

_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")


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
    """Writes report.md and comparison.png in `root`; returns the report's path."""
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
    for picture in sorted(run.pictures.glob("*.png")):
        lines += [f"![{picture.stem}]({picture.relative_to(root)})", ""]
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
        sentences.append(
            f"Against *{arm.label}* the difference in mean test accuracy is {100 * difference:+.2f} points: "
            f"{certainty}."
        )
    return " ".join(sentences)


def _picture(arms: Sequence[Arm], figures: Sequence[dict[str, Any]]) -> bytes:
    """Left: best loss against paths evaluated, for each search; right: test accuracies."""
    figure = Figure(figsize=(9.0, 3.4), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for number, (arm, arm_figures) in enumerate(zip(arms, figures, strict=True)):
        colour = _COLOURS[number % len(_COLOURS)]
        budget = arm_figures["found"]["max_macs"]
        best, curve = float("inf"), []
        for record in MetricsLog(arm.run.search(arm.search).metrics).read():
            if budget is None or record["macs"] <= budget:
                best = min(best, record["loss"])
            curve.append(best)
        left.plot(range(1, len(curve) + 1), curve, color=colour, label=arm.label, linewidth=1.6)
        accuracies = _accuracies(arm_figures)
        right.plot(
            [100 * a for a in accuracies], [number] * len(accuracies), "o", color=colour, alpha=0.65, markersize=7
        )
        right.plot(100 * statistics.fmean(accuracies), number, "|", color=colour, markersize=22, markeredgewidth=2.5)
    left.set_xlabel("paths evaluated")
    left.set_ylabel("best validation loss (nats)")
    left.legend(frameon=False, fontsize=8)
    right.set_yticks(range(len(arms)), [arm.label.replace(", ", ",\n") for arm in arms], fontsize=8)
    right.set_ylim(len(arms) - 0.5, -0.5)
    right.set_xlabel("test accuracy from scratch (%)")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
