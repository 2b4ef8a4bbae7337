"""The folder of a run: where everything lies, and how a later command finds what an earlier one left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from greedynas.config import Config, TrainConfig, load_config, save_config, to_mapping
from greedynas.data import DataSplits, load_data
from greedynas.option_checks import named_as_options
from greedynas.spaces import Space, get_space
from greedynas.storage import load_tensors
from greedynas.supernet import Supernet
from greedynas_ext.files import remove_temporaries
from greedynas_ext.pool import CandidatePool
from greedynas_ext.strict_json import read_json


@dataclass(frozen=True)
class RunFolder:
    """Names of the files of a run.

    Attributes:
        root: the folder; a search lies in search/<name>, a retraining in retrain/<name> below it.
    """

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration of this stage."""
        return self.root / "config.yaml"

    @property
    def metrics(self) -> Path:
        """JSON lines, a record for each round, generation or epoch."""
        return self.root / "metrics.jsonl"

    @property
    def checkpoint(self) -> Path:
        """All that a resumed run needs."""
        return self.root / "checkpoint.safetensors"

    @property
    def supernet(self) -> Path:
        """The trained supernet's weights and buffers."""
        return self.root / "supernet.safetensors"

    @property
    def network(self) -> Path:
        """The retrained network's weights and buffers."""
        return self.root / "network.safetensors"

    @property
    def pool(self) -> Path:
        """The candidate pool."""
        return self.root / "pool.json"

    @property
    def summary(self) -> Path:
        """Results and counts; written last, so that it marks a stage as finished."""
        return self.root / "summary.json"

    @property
    def report(self) -> Path:
        """What happened, for people."""
        return self.root / "report.md"

    @property
    def pictures(self) -> Path:
        """The report's pictures."""
        return self.root / "pictures"

    def search(self, name: str) -> RunFolder:
        """The folder of a search."""
        return RunFolder(self.root / "search" / name)

    def retraining(self, name: str) -> RunFolder:
        """The folder of a retraining."""
        return RunFolder(self.root / "retrain" / name)

    def names(self, stage: str) -> list[str]:
        """Names of the finished searches ("search") or retrainings ("retrain")."""
        return sorted(path.parent.name for path in (self.root / stage).glob("*/summary.json"))

    @property
    def finished(self) -> bool:
        """Whether the stage ran to its end."""
        return self.summary.exists()

    def open(self, config: Config, resume: bool) -> None:
        """Makes the folder for a new stage, or checks that it holds the stage to be resumed.

        Raises:
            FileExistsError: there is one already and `resume` is not set.
            ValueError: the stage to be resumed was started with another configuration; names the first difference.
        """
        if self.config.exists():
            if not resume:
                raise FileExistsError(f"run: {self.root} holds a run already; --resume continues it")
            before, now = to_mapping(load_config(type(config), self.config)), to_mapping(config)
            for name, value in before.items():
                if value != now[name] and name != "run":
                    raise ValueError(
                        f"{name}: expected {value!r}, with which {self.root} was started, got {now[name]!r}"
                    )
            remove_temporaries(self.root)
            return
        self.root.mkdir(parents=True, exist_ok=True)
        remove_temporaries(self.root)  # a kill before the config was in place leaves one
        save_config(self.config, config)


@dataclass(frozen=True)
class Task:
    """What a supernet is trained on: the data, and the space fitted to it."""

    data: DataSplits
    space: Space

    def new_supernet(self, seed: int) -> Supernet:
        """A supernet in channels_last, in which CPU convolutions of these spaces are 2 to 5 times as fast."""
        return Supernet(self.space, seed=seed).to(memory_format=torch.channels_last)

    def macs_of(self, paths: Tensor) -> list[float]:
        """Multiply-accumulates of paths [m, L] for an image of the data, in millions."""
        macs: list[int] = self.space.macs(paths, self.data.resolution)
        return [value / 1e6 for value in macs]


def load_task(config: TrainConfig) -> Task:
    """The data set and the space of a training, the same at every call."""
    with named_as_options(name="dataset", root="data_root"):
        data = load_data(
            config.dataset,
            seed=config.seed,
            root=config.data_root,
            resolution=config.resolution,
            validation=config.validation,
        )
    with named_as_options(name="space"):
        space = get_space(
            config.space, num_classes=data.num_classes, in_channels=data.in_channels, resolution=data.resolution
        )
    return Task(data, space)


@dataclass(frozen=True)
class TrainedRun:
    """What a finished training left."""

    folder: RunFolder
    config: TrainConfig
    task: Task
    supernet: Supernet
    pool: CandidatePool
    summary: dict[str, Any]


def load_run(root: Path) -> TrainedRun:
    """Opens the folder of a finished training.

    Raises:
        FileNotFoundError: there is none; says what is missing.
        ValueError: a file of it is damaged.
    """
    folder = RunFolder(root)
    if not folder.config.exists():
        raise FileNotFoundError(f"run: no run in {root} (expected {folder.config})")
    if not folder.finished:
        raise FileNotFoundError(f"run: the training in {root} is not finished; `greedynas train --resume` continues it")
    config = load_config(TrainConfig, folder.config)
    task = load_task(config)
    supernet = task.new_supernet(seed=0)
    tensors, _ = load_tensors(folder.supernet)
    load_state(supernet, tensors, folder.supernet)
    pool = CandidatePool.load(folder.pool, cost=lambda path: task.macs_of(torch.tensor([path]))[0])
    return TrainedRun(folder, config, task, supernet, pool, read_json(folder.summary))


def load_state(module: torch.nn.Module, tensors: dict[str, Tensor], source: Path) -> None:
    """Loads weights and buffers by name; all of them or ValueError, which names what does not fit."""
    expected = module.state_dict()
    for name in sorted(set(expected) ^ set(tensors)):
        raise ValueError(f"{source}: {'no' if name in expected else 'unexpected'} tensor {name!r}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
            raise ValueError(
                f"{source}: expected {name!r} as {expected[name].dtype} {list(expected[name].shape)}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
    module.load_state_dict(tensors)
