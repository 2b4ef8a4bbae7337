"""The head of a run's report: the result, what it was got from, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence

from greedynas.markdown import count, duration, macs, params, table
from greedynas.pictures import standard_error
from greedynas.run_results import RetrainingResults, RunResults, SearchResults

_TITLES = {"greedy": "GreedyNAS", "uniform": "Uniform sampling", "fair": "FairNAS sampling"}


def summary(results: RunResults) -> list[str]:
    """Title, headline and table, in Markdown."""
    config, training, space = results.config, results.training, results.space
    seconds = training.seconds_training + training.seconds_filtering
    rows = [
        ("Data", training.data),
        (
            "Space",
            f"{space.name}: {training.space_size:,} paths, {space.num_operations} operations in each of "
            f"{space.num_layers} layers",
        ),
        (
            "Supernet",
            f"{config.sampler} sampling, {training.iterations:,} of {training.planned_iterations:,} rounds in "
            f"{duration(seconds)}",
        ),
        ("Images", f"{count(training.images_trained)} trained, {count(training.images_evaluated)} evaluated"),
        ("Corrected #optimization", _corrected(results)),
        ("Early stopping", _stopping(results)),
        (
            "Learning rate",
            f"cosine over {training.planned_optimizer_steps:,} planned steps; {training.optimizer_steps:,} ran, the "
            f"last at {training.final_learning_rate:.2g}",
        ),
    ]
    if (search := main_search(results)) is not None:
        chosen = search.summary.chosen
        rows.append(
            (
                "Choice",
                f"{search.name}, among {search.summary.paths_evaluated:,} paths: validation loss {chosen.loss:.4f} "
                "nats with the supernet's weights",
            )
        )
    if (retraining := main_retraining(results)) is not None:
        images = retraining.summary.test_images
        rows.append(("Test accuracy", f"{accuracy(retraining)} on {images:,} images after training from scratch"))
    return [f"# {_TITLES[config.sampler]} on {config.dataset}", _headline(results), table(("", "This run"), rows)]


def main_search(results: RunResults) -> SearchResults | None:
    """The search that the report is about: NSGA-II's, where there is one."""
    return min(results.searches, key=lambda s: (s.name != "nsga2", s.summary.method != "nsga2"), default=None)


def main_retraining(results: RunResults) -> RetrainingResults | None:
    """The retraining that the report is about: that of the main search's choice, where there is one."""
    search = main_search(results)
    name = None if search is None else search.name
    return min(
        results.retrainings,
        key=lambda r: (r.config.path is not None, r.config.search != name, r.name != name),
        default=None,
    )


def accuracy(retraining: RetrainingResults) -> str:
    """Test accuracy and its standard error, in percent."""
    fraction, images = retraining.summary.test_accuracy, retraining.summary.test_images
    return f"{100 * fraction:.2f} ± {100 * standard_error(fraction, images):.2f}%"


def operations(results: RunResults, path: Sequence[int]) -> str:
    """A path as names of operations, as `greedynas retrain --path` takes them."""
    return f"`{' '.join(results.space.decode(path))}`"


def _headline(results: RunResults) -> str:
    if (retraining := main_retraining(results)) is not None:
        result = retraining.summary
        return (
            f"**{accuracy(retraining)} test accuracy** with **{macs(result.macs)}** and **{params(result.params)} "
            f"parameters**: {operations(results, result.path)}"
        )
    if (search := main_search(results)) is not None:
        chosen = search.summary.chosen
        return (
            f"Chosen and not yet retrained: **{macs(chosen.macs)}**, **{params(results.space.params(chosen.path))} "
            f"parameters**: {operations(results, chosen.path)}"
        )
    return "A trained supernet; no search of it has finished yet."


def _corrected(results: RunResults) -> str:
    training = results.training
    measured = training.cost_ratio.measured
    if measured is None:
        return f"{count(training.images_trained)} images; nothing was evaluated"
    costs = training.corrected_optimizations
    return (
        f"{count(costs.measured)} images: training on one costs {measured:.2f} evaluations here; "
        f"{count(costs.poster)} with GreedyNAS's {training.cost_ratio.poster:g}"
    )


def _stopping(results: RunResults) -> str:
    config, training = results.config, results.training
    if config.sampler != "greedy":
        return f"none with {config.sampler} sampling"
    if config.stop_threshold is None:
        return "switched off"
    rule = f"α = {config.stop_threshold:.0%}, a look every {training.stop_interval:,} rounds"
    if training.turnover is None:
        return f"did not apply: no two full pools were compared ({rule})"
    verdict = f"stopped after round {training.iterations:,}" if training.stopped_early else "did not apply"
    return f"{verdict}: {training.turnover:.1%} of the pool was new at the last look ({rule})"
