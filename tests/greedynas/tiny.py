"""A search space so small that a training takes a second, and configs that use it."""

from greedynas import spaces
from greedynas.config import RetrainConfig, SearchConfig, TrainConfig
from greedynas.spaces import Layer, Operation, Space

SPACE = Space(
    name="tiny",
    in_channels=1,
    num_classes=10,
    resolution=8,
    stem_channels=4,
    stem_stride=1,
    fixed=(),
    layers=(Layer(4, 6, 2), Layer(6, 6, 1), Layer(6, 8, 2), Layer(8, 8, 1)),
    operations=tuple(Operation.parse(name) for name in ("e3k3", "e3k5", "id")),
    head_channels=12,
    activation="relu6",
)
MEDIAN_MACS = 0.018  # millions; about half of the 81 paths cost less


def register() -> None:
    spaces._SPACES["tiny"] = SPACE


# What matters to a test stands here and not in the defaults, which change as better ones are found.


def train_config(run, **options):
    settings = {
        "space": "tiny",
        "iterations": 10,
        "sampled_paths": 6,
        "kept_paths": 2,
        "filter_images": 16,
        "warmup_iterations": 3,
        "pool_size": 8,
        "batch_size": 8,
        "stop_interval": 3,
        "checkpoint_interval": 4,
        "learning_rate": 0.05,
        "final_learning_rate": 1e-5,
        "momentum": 0.9,
        "weight_decay": 4e-5,
        "label_smoothing": 0.1,
        "schedule": "linear",
        "exploit_start": 0.0,
        "exploit_end": 0.8,
        "stop_threshold": 0.08,
        "threads": 1,
    }
    return TrainConfig(run=run, **(settings | options))


def search_config(run, **options):
    settings = {
        "population": 6,
        "generations": 3,
        "crossover_probability": 0.9,
        "mutation_probability": None,
        "calibration_images": 40,
        "validation_images": 50,
        "batch_size": 1000,
        "threads": 1,
    }
    return SearchConfig(run=run, **(settings | options))


def retrain_config(run, **options):
    settings = {
        "epochs": 3,
        "batch_size": 128,
        "checkpoint_interval": 2,
        "warmup_epochs": 1.0,
        "learning_rate": 0.05,
        "weight_decay": 1e-4,
        "label_smoothing": 0.1,
        "dropout": 0.2,
        "ema_decay": 0.0,
        "threads": 1,
    }
    return RetrainConfig(run=run, **(settings | options))


def contents(root):
    """Every file below a folder with its bytes and its time of change: equal if nothing was touched."""
    return {
        str(path.relative_to(root)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
