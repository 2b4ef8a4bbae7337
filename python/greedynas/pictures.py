"""Pictures of a run's training and retraining: losses, pool, draws and accuracies, each as a PNG file's bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from greedynas.drawing import (
    BLUE,
    DASHED,
    FAINT,
    GREY,
    LIGHT,
    ORANGE,
    RED,
    SERIES,
    SKY,
    head,
    new_figure,
    picture,
    shortened,
    thousands,
)
from greedynas.run_results import RetrainingResults, RunResults

Values = npt.NDArray[np.float64]


def smoothed(values: Sequence[float] | Values, reach: int) -> Values:
    """A moving mean over each value and `reach` of its neighbours on either side; NaN counts for nothing.

    Towards the ends both sides shrink alike, so that a steep beginning is not averaged away.

    Args:
        values: [n].
        reach: how many neighbours, at least 0.

    Returns:
        [n]; NaN where there is no number around.
    """
    array = np.asarray(values, dtype=np.float64)
    known = np.isfinite(array)
    place = np.arange(len(array))
    either_side = np.minimum(np.minimum(place, place[::-1]), reach)
    counts = np.concatenate([[0], np.cumsum(known)])
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, array, 0.0))])
    first, last = place - either_side, place + either_side + 1
    number = counts[last] - counts[first]
    means: Values = np.where(number > 0, sums[last] - sums[first], np.nan) / np.maximum(number, 1)
    return means


def _reach(results: RunResults) -> int:
    return max(4, len(results.rounds) // 60)


@picture
def training_picture(results: RunResults) -> Figure:
    """Training loss and learning rate over the rounds, and the losses that each filter kept and rejected."""
    rounds = results.rounds
    filtered = [r for r in rounds if r.filter_losses]
    figure = new_figure(3.6)
    grid = figure.add_gridspec(2, 2 if filtered else 1, height_ratios=[3.4, 1.0])
    steps = np.array([r.iteration + 1 for r in rounds])
    loss = figure.add_subplot(grid[0, 0])
    rate = figure.add_subplot(grid[1, 0], sharex=loss)
    _shade_warmup(results, loss, rate)
    losses = [r.training_loss for r in rounds]
    loss.plot(steps, losses, color=SKY, linewidth=0.7, alpha=0.7, label="a round")
    loss.plot(steps, smoothed(losses, _reach(results)), color=BLUE, linewidth=1.8, label="moving mean")
    loss.set_ylabel("nats")
    head(loss, "Training loss", columns=3)
    loss.tick_params(labelbottom=False)
    rate.plot(steps, [r.learning_rate for r in rounds], color=GREY)
    rate.set(ylabel="learning\nrate", xlabel="round", ylim=(0, 1.08 * results.config.learning_rate))
    rate.set_yticks([0.0, results.config.learning_rate])
    thousands(rate)
    if filtered:
        _draw_filter(results, figure.add_subplot(grid[:, 1], sharex=loss))
    for axes in figure.axes:
        axes.set_xlim(0, len(rounds))
    return figure


def _draw_filter(results: RunResults, axes: Axes) -> None:
    """The spread of the k losses that a filter keeps, and of those that it rejects."""
    filtered = [r for r in results.rounds if r.filter_losses]
    kept, reach = results.config.kept_paths, _reach(results)
    steps = [r.iteration + 1 for r in filtered]
    losses = np.sort(np.array([r.filter_losses for r in filtered], dtype=np.float64), axis=1)  # NaN comes last
    losses[~np.isfinite(losses)] = np.nan
    _shade_warmup(results, axes)
    for part, colour, light, label in (
        (losses[:, kept:], GREY, LIGHT, f"{losses.shape[1] - kept} rejected"),
        (losses[:, :kept], BLUE, SKY, f"{kept} kept and trained"),
    ):
        if part.shape[1] == 0:
            continue
        known = np.isfinite(part)
        low = np.where(known, part, np.inf).min(1)
        high = np.where(known, part, -np.inf).max(1)
        mean = np.where(known, part, 0.0).sum(1) / np.where(known.any(1), known.sum(1), np.nan)
        axes.fill_between(
            steps, smoothed(low, reach), smoothed(high, reach), color=light, alpha=0.45, linewidth=0, label="_"
        )
        axes.plot(steps, smoothed(mean, reach), color=colour, label=label)
    axes.set(ylabel="nats", xlabel="round")
    head(axes, "Filter: losses of the paths drawn", columns=3)
    thousands(axes)


def _shade_warmup(results: RunResults, *panels: Axes) -> None:
    if results.config.sampler != "greedy" or not results.config.warmup_iterations:
        return
    end = min(results.config.warmup_iterations, len(results.rounds))
    for axes in panels:
        axes.axvspan(0, end, color=FAINT, linewidth=0, label="warm-up", zorder=0)


@picture
def pool_picture(results: RunResults) -> Figure:
    """Exploit probability, pool turnover with its threshold, and the size of the pool over the rounds."""
    config, rounds = results.config, results.rounds
    steps = [r.iteration + 1 for r in rounds]
    figure = new_figure(3.7)
    share, size = figure.subplots(2, 1, sharex=True, height_ratios=[3.4, 1.0])
    _shade_warmup(results, share, size)
    drawn = [math.nan if r.from_pool is None else r.from_pool / config.sampled_paths for r in rounds]
    share.plot(steps, [r.exploit_probability or 0.0 for r in rounds], color=BLUE, label="exploit probability", zorder=3)
    share.plot(steps, smoothed(drawn, _reach(results)), color=SKY, linewidth=2.4, label="drawn from the pool")
    if looks := _looks(results):
        share.plot(*zip(*looks, strict=True), color=ORANGE, marker="o", markersize=4.5, label="pool turnover")
    if results.training.stopped_early and looks:
        share.plot(*looks[-1], color=RED, marker="o", markersize=8, linestyle="none", label="stop", clip_on=False)
    if config.stop_threshold is not None:
        share.axhline(config.stop_threshold, color=RED, linewidth=1.1, linestyle=DASHED)
        share.annotate(
            f"α = {config.stop_threshold:g}",
            (0.0, config.stop_threshold),
            xycoords=share.get_yaxis_transform(),
            xytext=(4, 3),
            textcoords="offset points",
            color=RED,
            size=8,
        )
    share.set(ylim=(0, 1.02))
    share.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    head(share, "Exploitation and the stopping rule", columns=5)
    size.fill_between(steps, [r.pool for r in rounds], color=SKY, alpha=0.5, linewidth=0)
    size.plot(steps, [r.pool for r in rounds], color=BLUE)
    size.set(ylabel="paths in\nthe pool", xlabel="round", ylim=(0, config.pool_size * 1.15), xlim=(0, len(rounds)))
    size.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    thousands(size, y=True)
    return figure


def _looks(results: RunResults) -> list[tuple[int, float]]:
    """(rounds run, turnover) at each look at the pool: the records in between repeat the last."""
    config, interval = results.config, results.training.stop_interval
    return [
        (r.iteration + 1, r.turnover)
        for r in results.rounds
        if r.turnover is not None and (r.iteration + 1 - config.warmup_iterations) % interval == 0
    ]


@picture
def draws_picture(results: RunResults) -> Figure:
    """How often paths were drawn from the pool: number of paths by draws, and draws by rank."""
    records = results.training.pool_draws
    draws = np.array([r.draws for r in records])
    still = np.array([r.in_pool for r in records])
    figure = new_figure(3.0)
    histogram, ranks = figure.subplots(1, 2, width_ratios=[1.3, 1.0])
    width = max(1, math.ceil(draws.max() / 40))
    edges = np.arange(0, draws.max() + width, width) + 0.5
    histogram.hist(
        [draws[still], draws[~still]],
        bins=list(edges),
        stacked=True,
        color=[BLUE, LIGHT],
        rwidth=0.85,
        label=["in the pool at the end", "fallen out since"],
    )
    unit = "draws" if width == 1 else f"draws (in bins of {width})"
    histogram.set(xlabel=unit, ylabel="paths", xlim=(edges[0] - 0.02 * edges[-1], edges[-1]))
    histogram.grid(False, axis="x")
    histogram.xaxis.set_major_locator(MaxNLocator(integer=True))
    thousands(histogram, y=True)
    head(histogram, "Paths by how often they were drawn from the pool", columns=2)
    ranks.plot(np.arange(1, len(draws) + 1), np.sort(draws)[::-1], color=BLUE, drawstyle="steps-mid")
    ranks.yaxis.set_major_locator(MaxNLocator(integer=True))
    head(ranks, "Draws by rank")
    ranks.set(xlabel="rank of the path", ylabel="draws", xscale="log", ylim=(0, None))
    ranks.minorticks_off()
    thousands(ranks, x=False, y=True)
    ranks.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    return figure


@picture
def retraining_picture(retrainings: Sequence[RetrainingResults]) -> Figure:
    """Training loss of each retraining over its epochs, and its test accuracy with one standard error."""
    figure = new_figure(3.0)
    loss, accuracy = figure.subplots(1, 2, width_ratios=[1.5, 1.0])
    for number, retraining in enumerate(retrainings):
        colour, summary = SERIES[number % len(SERIES)], retraining.summary
        epochs = [e.epoch + 1 for e in retraining.epochs]
        loss.plot(epochs, [e.training_loss for e in retraining.epochs], color=colour)
        error = standard_error(summary.test_accuracy, summary.test_images)
        accuracy.errorbar(summary.test_accuracy, number, xerr=error, color=colour, marker="o", capsize=3)
        accuracy.text(summary.test_accuracy, number - 0.16, f"{summary.test_accuracy:.2%}", ha="center", color=colour)
    loss.set(title="Training loss", xlabel="epoch", ylabel="nats")
    loss.xaxis.set_major_locator(MaxNLocator(integer=True))
    accuracy.set(
        title="Test accuracy ± standard error",
        yticks=range(len(retrainings)),
        yticklabels=[shortened(r.name) for r in retrainings],
        ylim=(len(retrainings) - 0.4, -0.6),
    )
    for tick, number in zip(accuracy.get_yticklabels(), range(len(retrainings)), strict=True):
        tick.set(color=SERIES[number % len(SERIES)], fontweight="bold")
    accuracy.margins(x=0.15)
    accuracy.xaxis.set_major_locator(MaxNLocator(5))
    accuracy.xaxis.set_major_formatter(PercentFormatter(1.0))
    accuracy.grid(False, axis="y")
    return figure


def standard_error(fraction: float, count: int) -> float:
    """Standard error of a fraction that was measured on `count` images."""
    return math.sqrt(fraction * (1.0 - fraction) / count)
