import dataclasses
from pathlib import Path

import pytest
import torch

from greedynas.config import EvaluateConfig, RetrainConfig, SearchConfig, TrainConfig
from greedynas.option_checks import (
    check_evaluation,
    check_retraining,
    check_search,
    check_training,
    named_as_options,
    use_threads,
)

RUN = Path("run")


def training(**options):
    settings = {
        "iterations": 600,
        "warmup_iterations": 100,
        "sampled_paths": 10,
        "kept_paths": 5,
        "pool_size": 200,
        "exploit_start": 0.0,
        "exploit_end": 0.8,
    }
    return TrainConfig(run=RUN, **(settings | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, r"^iterations: expected at least 1, got 0"),
        ({"checkpoint_interval": 0}, r"^checkpoint_interval: expected at least 1"),
        ({"batch_size": 0}, r"^batch_size: expected at least 1"),
        ({"kept_paths": 0}, r"^kept_paths: expected at least 1"),
        ({"kept_paths": 11}, r"^kept_paths: expected 1 <= kept_paths <= sampled_paths=10, got 11"),
        ({"sampled_paths": 0, "kept_paths": 1}, r"^sampled_paths: expected at least 1"),
        ({"filter_images": 0}, r"^filter_images: expected at least 1"),
        ({"pool_size": 0}, r"^pool_size: expected at least 1"),
        ({"warmup_iterations": -1}, r"^warmup_iterations: expected at least 0"),
        (
            {"iterations": 600, "warmup_iterations": 601},
            r"^warmup_iterations: expected at most iterations=600, got 601",
        ),
        ({"iterations": 50, "warmup_iterations": 100}, r"^warmup_iterations: expected at most iterations=50, got 100"),
        ({"exploit_end": 1.1}, r"^exploit_end: expected a probability in \[0, 1\], got 1\.1"),
        ({"exploit_start": -0.1}, r"^exploit_start: expected a probability"),
        ({"exploit_start": 0.9}, r"^exploit_start: expected at most exploit_end=0\.8, got 0\.9"),
        ({"stop_threshold": 1.0}, r"^stop_threshold: expected a value in \[0, 1\), got 1\.0"),
        ({"stop_interval": 20}, r"^stop_interval: expected more than 200/10 rounds.*20"),
        ({"stop_interval": 0}, r"^stop_interval: expected at least 1"),
        ({"learning_rate": -0.1}, r"^learning_rate: expected a finite number of at least 0, got -0\.1"),
        ({"learning_rate": float("nan")}, r"^learning_rate: expected a finite number"),
        ({"final_learning_rate": float("inf")}, r"^final_learning_rate: expected a finite number"),
        ({"weight_decay": -1.0}, r"^weight_decay: expected"),
        ({"momentum": 1.0}, r"^momentum: expected a value in \[0, 1\)"),
        ({"label_smoothing": 1.5}, r"^label_smoothing: expected a probability in \[0, 1\], got 1\.5"),
        ({"max_macs": 0.0}, r"^max_macs: expected a positive number of millions or none, got 0\.0"),
        ({"max_macs": float("nan")}, r"^max_macs: expected a positive number"),
        ({"draw_within_budget": True}, r"^max_macs: expected a budget, needed with draw_within_budget, got none"),
        (
            {"draw_within_budget": True, "max_macs": 1.0, "sampler": "fair"},
            r"^draw_within_budget: expected false with the fair sampler",
        ),
        ({"max_memory": 0}, r"^max_memory: expected at least 1"),
        ({"threads": 0}, r"^threads: expected at least 1"),
        ({"resolution": -8}, r"^resolution: expected at least 1"),
        ({"seed": -1}, r"^seed: expected 0 to 4294967295, got -1"),
        ({"seed": 2**32}, r"^seed: expected 0 to 4294967295"),
        ({"sampler": "best"}, r"^sampler: expected one of greedy, uniform, fair, got 'best'"),
    ],
)
def test_training_options(options, message):
    with pytest.raises(ValueError, match=message):
        check_training(training(**options))


@pytest.mark.parametrize("sampler", ["uniform", "fair"])
def test_options_of_the_filter_do_not_bind_other_samplers(sampler):
    # A short uniform run must not fail over the length of a warm-up that it does not have.
    check_training(training(sampler=sampler, iterations=5, sampled_paths=1, stop_interval=1))


def test_boundaries_of_training_options_pass():
    check_training(training(iterations=100, warmup_iterations=100, sampled_paths=5, kept_paths=5))
    check_training(training(stop_interval=21, seed=2**32 - 1, stop_threshold=0.0, label_smoothing=1.0))
    check_training(training(exploit_start=0.8, exploit_end=0.8, momentum=0.0))


def test_wrong_type():
    with pytest.raises(TypeError, match=r"^iterations: expected int, got float 3\.0"):
        check_training(training(iterations=3.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"population": 1}, r"^population: expected at least 2, got 1"),
        ({"generations": 0}, r"^generations: expected at least 1"),
        ({"calibration_images": 0}, r"^calibration_images: expected at least 1"),
        ({"validation_images": 0}, r"^validation_images: expected at least 1"),
        ({"batch_size": 0}, r"^batch_size: expected at least 1"),
        ({"max_macs": -1.0}, r"^max_macs: expected a positive number"),
        ({"crossover_probability": 1.2}, r"^crossover_probability: expected a probability in \[0, 1\], got 1\.2"),
        ({"mutation_probability": -0.2}, r"^mutation_probability: expected a probability"),
        ({"seed": -3}, r"^seed: expected"),
        ({"method": "annealing"}, r"^method: expected one of nsga2, random, got 'annealing'"),
        ({"name": "../up"}, r"^name: expected the plain name of a folder, got '\.\./up'"),
        ({"name": ".."}, r"^name: expected the plain name"),
        ({"name": ""}, r"^name: expected the plain name of a folder, got ''"),
    ],
)
def test_search_options(options, message):
    with pytest.raises(ValueError, match=message):
        check_search(SearchConfig(run=RUN, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, r"^epochs: expected at least 1"),
        ({"batch_size": 0}, r"^batch_size: expected at least 1"),
        ({"checkpoint_interval": 0}, r"^checkpoint_interval: expected at least 1"),
        ({"learning_rate": float("inf")}, r"^learning_rate: expected a finite number"),
        ({"warmup_epochs": -1.0}, r"^warmup_epochs: expected a finite number of at least 0"),
        ({"weight_decay": -1.0}, r"^weight_decay: expected"),
        ({"dropout": 1.0}, r"^dropout: expected a value in \[0, 1\)"),
        ({"ema_decay": 1.0}, r"^ema_decay: expected a value in \[0, 1\), got 1\.0"),
        ({"label_smoothing": -0.1}, r"^label_smoothing: expected a probability"),
        ({"optimizer": "adam"}, r"^optimizer: expected one of sgd, rmsprop, got 'adam'"),
        ({"search": "a/b"}, r"^search: expected the plain name"),
        ({"name": "/etc"}, r"^name: expected the plain name"),
    ],
)
def test_retraining_options(options, message):
    with pytest.raises(ValueError, match=message):
        check_retraining(RetrainConfig(run=RUN, **options))


@pytest.mark.parametrize("option", ["top", "calibration_images", "batch_size", "threads"])
def test_evaluation_options(option):
    with pytest.raises(ValueError, match=f"^{option}: expected at least 1, got 0"):
        check_evaluation(EvaluateConfig(run=RUN, **{option: 0}))


def test_defaults_pass():
    check_training(TrainConfig(run=RUN))
    check_search(SearchConfig(run=RUN))
    check_retraining(RetrainConfig(run=RUN))
    check_evaluation(EvaluateConfig(run=RUN))


def test_configs_are_not_changed_by_a_check():
    config = training()
    before = dataclasses.asdict(config)
    check_training(config)
    assert dataclasses.asdict(config) == before


@pytest.mark.parametrize("kind", [TypeError, ValueError, FileNotFoundError])
def test_errors_of_arguments_name_the_option(kind):
    with pytest.raises(kind, match=r"^filter_images: 9 exceeds"), named_as_options(size="filter_images"):
        raise kind("size: 9 exceeds")


@pytest.mark.parametrize("text", ["other: 9 exceeds", "size of it", ""])
def test_other_errors_pass_as_they_are(text):
    error = ValueError(text)
    with pytest.raises(ValueError) as caught, named_as_options(size="filter_images"):  # noqa: PT011
        raise error
    assert caught.value is error


def test_threads():
    before = torch.get_num_threads()
    try:
        use_threads(1)
        assert torch.get_num_threads() == 1
        use_threads(None)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
