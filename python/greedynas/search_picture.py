"""The picture of a search: its paths, its Pareto front, its choice, and how the lowest loss fell."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from greedynas.drawing import BLUE, DASHED, GREY, LIGHT, RED, SKY, head, new_figure, picture, shortened, thousands
from greedynas.run_results import SearchResults


@picture
def search_picture(search: SearchResults, baseline: SearchResults | None = None) -> Figure:
    """Every path that a search evaluated, its Pareto front and its choice; and how the best loss fell.

    Args:
        search: the search.
        baseline: another one, drawn behind it.
    """
    figure = new_figure(3.7)
    plane, curve = figure.subplots(1, 2, width_ratios=[2.1, 1.0])
    if baseline is not None:
        _draw_paths(plane, baseline, LIGHT, GREY, "s")
    _draw_paths(plane, search, SKY, BLUE, "o")
    chosen, budget = search.summary.chosen, search.summary.max_macs
    if budget is not None:
        plane.axvline(budget, color=RED, linewidth=1.1, linestyle=DASHED)
        plane.annotate(
            f"budget {budget:g} M",
            (budget, 1.0),
            xycoords=plane.get_xaxis_transform(),
            xytext=(4, -4),
            textcoords="offset points",
            rotation=90,
            va="top",
            color=RED,
            size=8,
            bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1.0},
        )
    plane.plot(
        chosen.macs,
        chosen.loss,
        color=RED,
        marker="*",
        markersize=16,
        markeredgecolor="white",
        linestyle="none",
        label="chosen",
        zorder=5,
    )
    plane.set(xlabel="M MACs", ylabel="validation loss (nats)")
    _limit_losses(plane, [s for s in (search, baseline) if s is not None])
    head(plane, "Evaluated paths, Pareto front and choice", columns=3)
    drawn: list[npt.NDArray[np.float64]] = []
    for other, colour in ((baseline, GREY), (search, BLUE)):
        if other is not None:
            best = best_losses(other)
            drawn.append(best[np.isfinite(best)])
            paths = np.arange(1, len(best) + 1)
            curve.plot(paths, best, color=colour, drawstyle="steps-post", label=shortened(other.name))
    curve.set(xlabel="paths evaluated", xlim=(0, None))
    if drawn := [best for best in drawn if len(best)]:
        # The first few paths of a random draw may be far worse, and would press the rest onto the floor.
        curve.set_ylim(
            0.9 * min(best.min() for best in drawn),
            1.08 * max(best[9:].max(initial=0.0) or best.max() for best in drawn),
        )
    curve.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    head(curve, "Lowest loss so far", columns=2)
    thousands(curve)
    return figure


def best_losses(search: SearchResults) -> npt.NDArray[np.float64]:
    """The lowest loss within the budget among the first 1, 2, ... paths that a search evaluated; NaN before any."""
    budget = search.summary.max_macs
    losses = [s.loss if budget is None or s.macs <= budget else math.nan for s in search.evaluated]
    best = np.minimum.accumulate(np.nan_to_num(losses, nan=np.inf))
    return np.where(np.isfinite(best), best, np.nan)


def _draw_paths(axes: Axes, search: SearchResults, light: str, dark: str, marker: str) -> None:
    known = [s for s in search.evaluated if math.isfinite(s.loss)]
    axes.scatter(
        [s.macs for s in known], [s.loss for s in known], s=11, color=light, marker=marker, alpha=0.6, linewidth=0
    )
    front = search.summary.front
    axes.plot(
        [s.macs for s in front],
        [s.loss for s in front],
        color=dark,
        marker=marker,
        markersize=4.0,
        linewidth=1.2,
        drawstyle="steps-post",
        label=f"{shortened(search.name)} ({len(search.evaluated):,} paths)",
    )


def _limit_losses(axes: Axes, searches: Sequence[SearchResults]) -> None:
    """Leaves the few worst paths out of the picture, which would press all others onto its floor."""
    losses = np.array([s.loss for search in searches for s in search.evaluated if math.isfinite(s.loss)])
    low = min(losses.min(), *(search.summary.chosen.loss for search in searches))
    high = max(np.quantile(losses, 0.97), *(s.loss for search in searches for s in search.summary.front))
    margin = 0.06 * (high - low) or 0.01
    axes.set_ylim(low - margin, high + margin)
    if above := int((losses > high + margin).sum()):
        axes.text(0.01, 0.99, f"{above} worse paths above", transform=axes.transAxes, va="top", color=GREY, size=7.5)
