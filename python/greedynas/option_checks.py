"""Checks of options before anything is read or written: each error names the option as the user knows it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch

from greedynas.config import EvaluateConfig, RetrainConfig, SearchConfig, TrainConfig, check_types
from greedynas_ext.checks import check_count, check_probability
from greedynas_ext.path_filter import check_stop_interval

_LARGEST_SEED = 2**32 - 1  # what every generator takes, numpy's too


def check_training(config: TrainConfig) -> None:
    """Checks the options of a training.

    Raises:
        TypeError, ValueError: naming the option, what was expected and what came.
    """
    check_types(config)
    for name in ("iterations", "checkpoint_interval", "batch_size", "kept_paths"):
        check_count(name, getattr(config, name), 1)
    _check_common(config)
    for name in ("learning_rate", "final_learning_rate", "weight_decay"):
        _check_not_negative(name, getattr(config, name))
    _check_fraction("momentum", config.momentum)
    check_probability("label_smoothing", config.label_smoothing)
    _check_budget(config.max_macs)
    if config.draw_within_budget and config.max_macs is None:
        raise ValueError("max_macs: expected a budget, needed with draw_within_budget, got none")
    if config.draw_within_budget and config.sampler == "fair":
        raise ValueError("draw_within_budget: expected false with the fair sampler, which leaves no operation out")
    if config.sampler == "greedy":
        _check_greedy(config)


def _check_greedy(config: TrainConfig) -> None:
    for name in ("sampled_paths", "filter_images", "pool_size"):
        check_count(name, getattr(config, name), 1)
    if config.kept_paths > config.sampled_paths:
        raise ValueError(
            f"kept_paths: expected 1 <= kept_paths <= sampled_paths={config.sampled_paths}, got {config.kept_paths}"
        )
    if check_count("warmup_iterations", config.warmup_iterations, 0) > config.iterations:
        raise ValueError(
            f"warmup_iterations: expected at most iterations={config.iterations}, got {config.warmup_iterations}"
        )
    start = check_probability("exploit_start", config.exploit_start)
    if check_probability("exploit_end", config.exploit_end) < start:
        raise ValueError(f"exploit_start: expected at most exploit_end={config.exploit_end}, got {start}")
    if config.stop_threshold is not None:
        _check_fraction("stop_threshold", config.stop_threshold)
    if config.stop_interval is not None:
        check_stop_interval(config.stop_interval, config.sampled_paths, config.pool_size)


def check_search(config: SearchConfig) -> None:
    """Checks the options of a search; errors as `check_training`."""
    check_types(config)
    check_count("population", config.population, 2)
    for name in ("generations", "calibration_images", "batch_size"):
        check_count(name, getattr(config, name), 1)
    _check_common(config)
    _check_budget(config.max_macs)
    check_probability("crossover_probability", config.crossover_probability)
    if config.mutation_probability is not None:
        check_probability("mutation_probability", config.mutation_probability)
    _check_name("name", config.name)


def check_retraining(config: RetrainConfig) -> None:
    """Checks the options of a retraining; errors as `check_training`."""
    check_types(config)
    for name in ("epochs", "checkpoint_interval", "batch_size"):
        check_count(name, getattr(config, name), 1)
    _check_common(config)
    for name in ("learning_rate", "warmup_epochs", "weight_decay"):
        _check_not_negative(name, getattr(config, name))
    for name in ("dropout", "ema_decay"):
        _check_fraction(name, getattr(config, name))
    check_probability("label_smoothing", config.label_smoothing)
    _check_name("search", config.search)
    _check_name("name", config.name)


def check_evaluation(config: EvaluateConfig) -> None:
    """Checks the options of an evaluation; errors as `check_training`."""
    check_types(config)
    for name in ("top", "calibration_images", "batch_size"):
        check_count(name, getattr(config, name), 1)
    _check_common(config)


def use_threads(threads: int | None) -> None:
    """Makes torch use so many CPU threads; None leaves its choice."""
    if threads is not None:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def named_as_options(**options: str) -> Iterator[None]:
    """Makes errors about an argument name the option that it came from.

    Args:
        options: argument=option, as in `max_cost="max_macs"`.
    """
    try:
        yield
    except (TypeError, ValueError, FileNotFoundError) as error:
        argument, colon, rest = str(error).partition(":")
        if not colon or argument not in options:
            raise
        raise type(error)(f"{options[argument]}:{rest}") from error


def _check_common(config: Any) -> None:
    """Options that several commands have."""
    for name in ("max_memory", "threads", "resolution", "stop_interval", "validation_images"):
        value = getattr(config, name, None)
        if value is not None:
            check_count(name, value, 1)
    seed = getattr(config, "seed", 0)
    if not 0 <= seed <= _LARGEST_SEED:
        raise ValueError(f"seed: expected 0 to {_LARGEST_SEED}, got {seed}")


def _check_not_negative(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0.0):
        raise ValueError(f"{name}: expected a finite number of at least 0, got {value}")


def _check_fraction(name: str, value: float) -> None:
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name}: expected a value in [0, 1), got {value}")


def _check_budget(max_macs: float | None) -> None:
    if max_macs is not None and not (math.isfinite(max_macs) and max_macs > 0.0):
        raise ValueError(f"max_macs: expected a positive number of millions or none, got {max_macs}")


def _check_name(option: str, name: str | None) -> None:
    """A name is that of a folder directly below search/ or retrain/."""
    if name is not None and (not name or name in (".", "..") or "/" in name or "\0" in name):
        raise ValueError(f"{option}: expected the plain name of a folder, got {name!r}")
