"""What each command can be told: dataclasses that the command line, YAML files and run folders share."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from greedynas_ext.files import write_bytes


@dataclass(frozen=True)
class TrainConfig:
    """Train a supernet. The defaults fit the digits; --config fashion-mnist and --config imagenet fit those."""

    run: Path
    """Folder of the run; it is made, and must not hold another run unless resumed."""
    space: str = "mini-16"
    """Search space: mbv2-7, mbv2-se-13, macro, mini-28 or mini-16."""
    dataset: str = "digits"
    """Images: digits, fashion-mnist, imagefolder or imagenet."""
    data_root: Path | None = None
    """Folder of the images, where the data set needs one."""
    resolution: int | None = None
    """Height and width of the images in pixels; none: those of the data set."""
    validation: int | float | None = None
    """Images held out of the training set for filtering and search: a number or a fraction; none: the data set's
    default (digits: 0.2, fashion-mnist: 10000, imagenet: 50000)."""
    augment: bool = True
    """Augment training images (shifts for digits, crops and flips elsewhere)."""
    seed: int = 0
    """Seed of everything random."""

    sampler: Literal["greedy", "uniform", "fair"] = "greedy"
    """How paths are chosen: greedy filtering, uniformly at random, or FairNAS's strict fairness."""
    iterations: int = 400
    """Rounds at most; each is a filter and k optimizer steps (fair: one step over a path per operation)."""
    sampled_paths: int = 10
    """m: paths drawn for each filter."""
    kept_paths: int = 5
    """k: paths kept and trained, one optimizer step each."""
    filter_images: int = 100
    """Validation images on which a filter compares losses (ImageNet: 1000)."""
    warmup_iterations: int = 75
    """Rounds of uniform sampling without a filter before the greedy ones."""
    schedule: Literal["linear", "cosine"] = "linear"
    """How the exploit probability grows after the warm-up."""
    exploit_start: float = 0.0
    """Exploit probability (of drawing from the pool) at the end of the warm-up."""
    exploit_end: float = 0.8
    """Exploit probability in the last round."""
    pool_size: int = 200
    """Paths that the candidate pool holds at most (ImageNet: 1000)."""
    max_macs: float | None = None
    """Budget in millions of multiply-accumulates for an image; paths over it never enter the pool."""
    draw_within_budget: bool = False
    """Never draw paths over the budget either (which changes the share of good paths, q, of Theorem 1)."""
    stop_threshold: float | None = 0.08
    """alpha: stop when at most this fraction of the pool is new after `stop_interval` rounds; none: never."""
    stop_interval: int | None = None
    """t: rounds between two looks at the pool; none: three times what it takes to draw a pool of new paths."""

    batch_size: int = 64
    """Training images of an optimizer step (ImageNet: 1024)."""
    learning_rate: float = 0.4
    """Learning rate at the first optimizer step; it falls on a cosine over all planned steps (ImageNet: 0.12)."""
    final_learning_rate: float = 1e-5
    """Learning rate at the last planned optimizer step."""
    momentum: float = 0.9
    """Nesterov momentum of SGD."""
    weight_decay: float = 4e-5
    """Weight decay of SGD."""
    label_smoothing: float = 0.1
    """Label smoothing of the training loss; filters compare losses without it."""
    max_memory: int | None = None
    """Bytes of activations that a filter may keep; none: depth-first evaluation, no limit."""
    checkpoint_interval: int = 50
    """Rounds between checkpoints: as many are lost at most when a run is killed."""
    threads: int | None = None
    """CPU threads; none: torch's choice. Runs repeat bit for bit for one number of threads."""


@dataclass(frozen=True)
class SearchConfig:
    """Search the best path of a trained supernet."""

    run: Path
    """Folder of a finished `train`."""
    method: Literal["nsga2", "random"] = "nsga2"
    """NSGA-II from the candidate pool, or random search as a baseline."""
    name: str | None = None
    """Name of the search, a folder below search/; none: the method."""
    population: int = 50
    """Paths of a generation."""
    generations: int = 20
    """Generations, the first one included; random search evaluates as many paths."""
    crossover_probability: float = 0.9
    """Probability that two parents are crossed (uniformly, gene by gene)."""
    mutation_probability: float | None = None
    """Probability that a choice mutates into another; none: one choice of a path on average."""
    max_macs: float | None = None
    """Budget in millions of multiply-accumulates for an image; none: that of the training."""
    cost_objective: bool = True
    """Minimise multiply-accumulates as a second objective, which gives a Pareto front."""
    bn: Literal["recalibrated", "batch", "running"] = "recalibrated"
    """Statistics of batch normalisation: from calibration images, from the batch, or the running ones."""
    calibration_images: int = 200
    """Training images that recalibrate batch normalisation, at most all of them (ImageNet: 1000)."""
    validation_images: int | None = None
    """Validation images on which paths are compared; none: all."""
    batch_size: int = 1000
    """Validation images evaluated at once."""
    max_memory: int | None = None
    """Bytes of activations that an evaluation may keep; none: depth-first evaluation, no limit."""
    seed: int = 0
    """Seed of the search."""
    threads: int | None = None
    """CPU threads; none: torch's choice."""


@dataclass(frozen=True)
class RetrainConfig:
    """Train the chosen path from scratch, and read the test set once."""

    run: Path
    """Folder of a finished `train` and `search`."""
    search: str = "nsga2"
    """Name of the search whose choice is trained."""
    path: str | None = None
    """Another path instead, as names of operations: "e3k5 id e6k3 ..."."""
    name: str | None = None
    """Name of the retraining, a folder below retrain/; none: that of the search."""
    epochs: int = 30
    """Passes over the training and validation images (GreedyNAS on ImageNet: 450)."""
    batch_size: int = 64
    """Training images of an optimizer step."""
    optimizer: Literal["sgd", "rmsprop"] = "sgd"
    """SGD with a cosine, or TensorFlow's RMSprop with exponential decay (x0.97 every 2.4 epochs), as on ImageNet."""
    learning_rate: float = 0.05
    """Learning rate after the warm-up (rmsprop on ImageNet: 0.064 for 1,024 images)."""
    warmup_epochs: float = 3.0
    """Epochs over which the learning rate rises from 0."""
    weight_decay: float = 1e-4
    """Weight decay of convolutions and the classifier; biases and batch normalisations have none."""
    label_smoothing: float = 0.1
    """Label smoothing of the training loss."""
    dropout: float = 0.2
    """Dropout before the classifier."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights that is tested (ImageNet: 0.9999); 0 tests the weights."""
    augment: bool = True
    """Augment training images."""
    checkpoint_interval: int = 10
    """Epochs between checkpoints."""
    seed: int = 0
    """Seed of initialisation, batches, augmentation and dropout."""
    threads: int | None = None
    """CPU threads; none: torch's choice."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate paths of a trained supernet on its validation images and print their losses."""

    run: Path
    """Folder of a finished `train`."""
    paths: Path | None = None
    """File of paths, one a line, as names of operations ("e3k5 id e6k3 ..."); none: the best of the pool."""
    top: int = 10
    """How many paths of the pool to evaluate where no file is given."""
    bn: Literal["recalibrated", "batch", "running"] = "recalibrated"
    """Statistics of batch normalisation."""
    calibration_images: int = 200
    """Training images that recalibrate batch normalisation, at most all of them (ImageNet: 1000)."""
    batch_size: int = 1000
    """Validation images evaluated at once."""
    threads: int | None = None
    """CPU threads; none: torch's choice."""


Config = TypeVar("Config", TrainConfig, SearchConfig, RetrainConfig, EvaluateConfig)


def to_mapping(config: Any) -> dict[str, Any]:
    """The fields of a config as plain values."""
    return {
        field.name: str(value) if isinstance(value := getattr(config, field.name), Path) else value
        for field in dataclasses.fields(config)
    }


def from_mapping(kind: type[Config], values: Mapping[str, Any], source: str) -> Config:
    """A config of `kind` from plain values; fields left out keep their defaults.

    Raises:
        ValueError: a key is unknown, a required one missing, or a value is of the wrong type; names `source`.
    """
    annotations = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(values) - set(fields), key=str)
    if unknown:
        raise ValueError(f"{source}: unknown key {unknown[0]!r}; expected some of {', '.join(fields)}")
    missing = [name for name, f in fields.items() if f.default is dataclasses.MISSING and name not in values]
    if missing:
        raise ValueError(f"{source}: expected a value for {missing[0]!r}")
    try:
        return kind(**{name: _convert(name, annotations[name], value) for name, value in values.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error


def check_types(config: Any) -> None:
    """Checks that every field holds what its annotation says, for a config that was made in Python.

    Raises:
        TypeError, ValueError: a value is of the wrong type, or none of the choices; names the field.
    """
    for name, annotation in typing.get_type_hints(type(config)).items():
        _convert(name, annotation, getattr(config, name))


def _convert(name: str, annotation: Any, value: Any) -> Any:
    if typing.get_origin(annotation) is Literal:
        if value not in typing.get_args(annotation):
            raise ValueError(f"{name}: expected one of {', '.join(typing.get_args(annotation))}, got {value!r}")
        return value
    allowed = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    for candidate in allowed:
        if candidate is Path and isinstance(value, str | Path):
            return Path(value)
        if candidate is float and isinstance(value, int) and not isinstance(value, bool) and int not in allowed:
            return float(value)
        if type(value) is candidate:
            return value
    expected = " or ".join("none" if a is types.NoneType else a.__name__ for a in allowed)
    raise TypeError(f"{name}: expected {expected}, got {type(value).__name__} {value!r}")


def save_config(path: Path, config: Any) -> None:
    """Writes the resolved config as YAML, atomically."""
    write_bytes(path, yaml.safe_dump(to_mapping(config), sort_keys=False).encode())


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which as YAML 1.2 also reads 1e-5 as a number and not as text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it holds no YAML mapping.
    """
    if not path.is_file():
        raise FileNotFoundError(f"config: no file {path}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected YAML, {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of options, got {type(values).__name__}")
    return values


def load_config(kind: type[Config], path: Path) -> Config:
    """A config that `save_config` wrote.

    Raises:
        FileNotFoundError, ValueError: as `read_yaml` and `from_mapping`.
    """
    return from_mapping(kind, read_yaml(path), str(path))
