"""Training the network of one path from scratch; the test set is read once, at the end."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greedynas.checkpoints import load_checkpoint, save_checkpoint
from greedynas.config import RetrainConfig
from greedynas.data import BatchStream
from greedynas.data.seeds import derive_seed
from greedynas.learning_rates import cosine, exponential, with_warmup
from greedynas.metrics_log import MetricsLog
from greedynas.network import Network
from greedynas.option_checks import check_retraining, named_as_options, use_threads
from greedynas.progress import Reporter
from greedynas.rmsprop import TensorFlowRMSprop
from greedynas.runs import RunFolder, Task, TrainedRun, load_run
from greedynas.storage import save_tensors
from greedynas_ext.strict_json import read_json, write_json


class NetworkTrainer:
    """Trains one standalone network, epoch by epoch."""

    def __init__(self, config: RetrainConfig, task: Task, path: Tensor) -> None:
        check_retraining(config)
        self.config, self.task, self.path = config, task, path
        network = Network(task.space, path, seed=config.seed, dropout=config.dropout).train()
        self.network: Network = network.to(memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.network) if config.ema_decay else None
        self.batches = BatchStream(
            task.data.train_and_validation, config.batch_size, seed=config.seed, augment=config.augment
        )
        self.optimizer = self._make_optimizer()
        self.generator = torch.Generator().manual_seed(config.seed)
        self.epoch = 0
        self.seconds = 0.0

    def _make_optimizer(self) -> torch.optim.Optimizer:
        decayed = [p for p in self.network.parameters() if p.dim() > 1]
        plain = [p for p in self.network.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": self.config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        if self.config.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.config.learning_rate, momentum=0.9, nesterov=True)
        return TensorFlowRMSprop(groups, lr=self.config.learning_rate)

    def learning_rate(self, step: int) -> float:
        """The learning rate of optimizer step `step`, counted from 0."""
        config, per_epoch = self.config, self.batches.batches_per_epoch
        total, warmup = config.epochs * per_epoch, round(config.warmup_epochs * per_epoch)
        if step < warmup:
            return with_warmup(step, warmup, config.learning_rate)
        if config.optimizer == "sgd":
            return cosine(step - warmup, total - warmup, config.learning_rate, 0.0)
        return exponential(step / per_epoch, config.learning_rate)

    def run_epoch(self) -> dict[str, Any]:
        """One pass over the training images; returns its record."""
        since = time.perf_counter()
        start = self.epoch * self.batches.batches_per_epoch
        total, count = 0.0, 0
        # Dropout draws from the global generator; a seed of its own for each epoch makes every epoch repeatable.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed("dropout", self.config.seed, self.epoch))
            steps = range(start, start + self.batches.batches_per_epoch)
            for step, (images, targets) in zip(steps, self.batches.iterate(start, steps.stop), strict=True):
                total += self._step(step, images, targets) * len(images)
                count += len(images)
        self.epoch += 1
        self.seconds += time.perf_counter() - since
        if not math.isfinite(total):
            raise FloatingPointError(
                f"retraining: the loss became {total / count} in epoch {self.epoch - 1}; a lower learning_rate may help"
            )
        return {
            "epoch": self.epoch - 1,
            "training_loss": total / count,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "images_trained": self.epoch * count,
            "seconds": self.seconds,
        }

    def _step(self, step: int, images: Tensor, targets: Tensor) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.network(images), targets, label_smoothing=self.config.label_smoothing)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if self.average is not None:
            update_average(self.average, self.network, self.config.ema_decay, step)
        return loss.item()

    @property
    def tested(self) -> Network:
        """The network whose accuracy counts: the moving average where there is one."""
        return self.network if self.average is None else self.average

    def save(self, folder: RunFolder) -> None:
        """Writes a checkpoint."""
        state = {"epoch": self.epoch, "seconds": self.seconds}
        save_checkpoint(folder.checkpoint, self._modules(), self.optimizer, self.generator, state)

    def restore(self, folder: RunFolder) -> None:
        """Continues from the checkpoint."""
        state = load_checkpoint(folder.checkpoint, self._modules(), self.optimizer, self.generator)
        try:
            self.epoch, self.seconds = int(state["epoch"]), float(state["seconds"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder.checkpoint}: expected the state of a retraining, got {error!r}") from error

    def _modules(self) -> dict[str, nn.Module]:
        """What a checkpoint holds."""
        return {"network": self.network} if self.average is None else {"network": self.network, "average": self.average}


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float, step: int) -> None:
    """Moves `average` towards `network`; early steps decay less, as in TensorFlow's moving average."""
    decay = min(decay, (1 + step) / (10 + step))
    for mean, value in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - decay)
        else:
            mean.copy_(value)


@torch.no_grad()
def accuracy(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, int]:
    """(fraction of images classified right, number of images) in evaluation mode; the mode is put back."""
    was_training = network.training
    network.eval()
    try:
        correct = count = 0
        for images, targets in batches:
            correct += int((network(images).argmax(1) == targets).sum())
            count += len(images)
    finally:
        network.train(was_training)
    return correct / count, count


def retrain(config: RetrainConfig, *, resume: bool = False) -> RunFolder:
    """Retrains in a run folder; its result is in retrain/<name>/summary.json.

    Raises:
        FileNotFoundError: there is no finished training or search.
        FileExistsError, ValueError: as `RunFolder.open`, and for values that cannot be.
        FloatingPointError: the training diverged.
    """
    check_retraining(config)
    use_threads(config.threads)
    run = load_run(config.run)
    path = _path_of(config, run)
    trainer = NetworkTrainer(config, run.task, path)
    folder = run.folder.retraining(config.name or config.search)
    folder.open(config, resume)
    if folder.finished:
        return folder
    metrics = MetricsLog(folder.metrics)
    if folder.checkpoint.exists():
        trainer.restore(folder)
    metrics.truncate_after(trainer.epoch)
    with Reporter("retrain", config.epochs, done=trainer.epoch) as reporter:
        while trainer.epoch < config.epochs:
            record = trainer.run_epoch()
            metrics.append(record)
            reporter.advance({"loss": f"{record['training_loss']:.3f}"})
            if trainer.epoch % config.checkpoint_interval == 0 or trainer.epoch == config.epochs:
                metrics.sync()
                trainer.save(folder)
    save_tensors(folder.network, trainer.tested.state_dict(), {"path": path.tolist()})
    data, space = run.task.data, run.task.space
    test_accuracy, test_images = accuracy(trainer.tested, data.test.batches(1000))
    summary = {
        "path": path.tolist(),
        "names": space.decode(path),
        "test_accuracy": test_accuracy,
        "test_images": test_images,
        "epochs": config.epochs,
        "images_trained": trainer.epoch * trainer.batches.batches_per_epoch * config.batch_size,
        "seconds": trainer.seconds,
        "macs": run.task.macs_of(path[None])[0],
        "params": space.params(path),
    }
    write_json(folder.summary, summary)
    return folder


def _path_of(config: RetrainConfig, run: TrainedRun) -> Tensor:
    if config.path is not None:
        with named_as_options(names="path"):
            return run.task.space.encode(config.path.split())
    found = run.folder.search(config.search)
    if not found.finished:
        names = ", ".join(run.folder.names("search")) or "none"
        raise FileNotFoundError(f"search: no finished search {config.search!r} in {config.run}; there are: {names}")
    return torch.tensor(read_json(found.summary)["chosen"]["path"])
