"""Training a supernet: greedily (You et al., "GreedyNAS", CVPR 2020), uniformly, or with FairNAS's strict fairness."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from greedynas.checkpoints import load_checkpoint, save_checkpoint
from greedynas.config import TrainConfig
from greedynas.data import BatchStream, ValidationSampler
from greedynas.learning_rates import cosine
from greedynas.metrics_log import MetricsLog
from greedynas.option_checks import check_training, named_as_options, use_threads
from greedynas.progress import Reporter
from greedynas.runs import RunFolder, Task, load_task
from greedynas.storage import save_tensors
from greedynas.theory import PAPER_COST_RATIO, corrected_optimizations
from greedynas_ext import CandidatePool, ExploitSchedule, FairSampler, PathFilter
from greedynas_ext.strict_json import write_json


@dataclass
class Counts:
    """What a training has cost so far; the seconds are of this machine, the rest repeats exactly."""

    optimizer_steps: int = 0
    images_trained: int = 0
    images_evaluated: int = 0
    seconds_training: float = 0.0
    seconds_filtering: float = 0.0

    @property
    def cost_ratio(self) -> float | None:
        """Measured cost of a training image over that of an evaluated image; None where nothing was evaluated."""
        if not self.images_evaluated or not self.images_trained or self.seconds_filtering == 0.0:
            return None
        per_trained = self.seconds_training / self.images_trained
        return per_trained / (self.seconds_filtering / self.images_evaluated)

    def corrected(self, cost_ratio: float | None) -> float:
        """Corrected #optimization: training images, and evaluated images at their share of the cost."""
        if cost_ratio is None:
            return float(self.images_trained)
        return corrected_optimizations(self.images_trained, self.images_evaluated, cost_ratio)


class SupernetTrainer:
    """One training run, round by round.

    A round of the greedy sampler draws m paths, compares their losses on one random batch of validation images, and
    trains the best k, each for one optimizer step on a training batch of its own. In a round of the warm-up, and of
    the uniform sampler, k uniformly drawn paths are trained; in one of the fair sampler one path per operation on one
    batch, in one step. Operations that a step does not select have no gradient, so that neither momentum nor weight
    decay moves them.
    """

    def __init__(self, config: TrainConfig, task: Task) -> None:
        self.config, self.task = config, task
        check_training(config)
        self.supernet = task.new_supernet(config.seed).train()
        self.generator = torch.Generator().manual_seed(config.seed)
        greedy = config.sampler == "greedy"  # else all is warm-up, and what filtering takes is not looked at
        schedule = ExploitSchedule(
            config.schedule,
            start=config.exploit_start,
            end=config.exploit_end,
            warmup_steps=config.warmup_iterations if greedy else config.iterations,
            total_steps=config.iterations,
        )
        with named_as_options(max_cost="max_macs"):  # a budget that leaves no path shows before anything is written
            self.filter = PathFilter(
                self.supernet,
                max(config.sampled_paths, config.kept_paths),
                config.kept_paths,
                pool_size=config.pool_size,
                schedule=schedule,
                generator=self.generator,
                max_cost=config.max_macs,
                cost=task.macs_of,
                reject=config.draw_within_budget,
                stop_threshold=config.stop_threshold,
                stop_interval=config.stop_interval if greedy else None,
                max_memory=config.max_memory,
            )
        self._fair = FairSampler([task.space.num_operations] * task.space.num_layers)
        self._batches = BatchStream(task.data.train, config.batch_size, seed=config.seed, augment=config.augment)
        self._validation = None
        if config.sampler == "greedy":
            with named_as_options(size="filter_images"):
                self._validation = ValidationSampler(task.data.validation, config.filter_images, seed=config.seed)
        self.optimizer = torch.optim.SGD(
            self.supernet.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.momentum > 0,
        )
        self.counts = Counts()
        self.iteration = 0
        self.pool_draws: Counter[tuple[int, ...]] = Counter()  # how often each path was drawn from the pool

    @property
    def pool(self) -> CandidatePool:
        """The candidate pool; empty but with the greedy sampler."""
        return self.filter.pool

    @property
    def steps_per_iteration(self) -> int:
        """Optimizer steps of a round."""
        return 1 if self.config.sampler == "fair" else self.config.kept_paths

    @property
    def planned_steps(self) -> int:
        """Optimizer steps without early stopping: the horizon of the learning rate."""
        return self.config.iterations * self.steps_per_iteration

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        return self.filter.steady or self.iteration >= self.config.iterations

    def run_iteration(self) -> dict[str, Any]:
        """One round; returns its record."""
        record: dict[str, Any] = {"iteration": self.iteration}
        if self.config.sampler == "fair":
            kept = self._fair.sample(self.generator)
            losses = self._fair_step(kept)
        else:
            kept = self._filter(record)
            losses = [self._step(path) for path in kept]
        if not all(map(math.isfinite, losses)):
            raise FloatingPointError(
                f"training: the loss became {losses} in round {self.iteration}; a lower learning_rate may help"
            )
        self.iteration += 1
        record.update(
            trained_paths=kept.tolist(),
            training_loss=sum(losses) / len(losses),
            learning_rate=self.learning_rate(self.counts.optimizer_steps - 1),
            pool=len(self.pool),
            turnover=self.filter.turnover,
            optimizer_steps=self.counts.optimizer_steps,
            images_trained=self.counts.images_trained,
            images_evaluated=self.counts.images_evaluated,
            seconds_training=self.counts.seconds_training,
            seconds_filtering=self.counts.seconds_filtering,
        )
        return record

    def _filter(self, record: dict[str, Any]) -> Tensor:
        """The paths to train in this round, int64 [k, L]; writes down what was evaluated."""
        since = time.perf_counter()
        kept = self.filter.draw(self._validation_batch)
        last = self.filter.last
        if last is None:
            return kept
        paths, from_pool = last.drawn.paths, last.drawn.from_pool
        self.pool_draws.update(tuple(path) for path in paths[from_pool].tolist())
        self.counts.images_evaluated += len(paths) * self.config.filter_images
        self.counts.seconds_filtering += time.perf_counter() - since
        record.update(
            exploit_probability=last.exploit_probability,
            from_pool=int(from_pool.sum()),
            drawn_paths=paths.tolist(),
            filter_losses=last.evaluation.losses.tolist(),
            shared_fraction=last.evaluation.plan.shared_fraction,
        )
        return kept

    def _validation_batch(self) -> tuple[Tensor, Tensor]:
        assert self._validation is not None
        images, targets = self._validation.random_subset(self.iteration)
        return images.contiguous(memory_format=torch.channels_last), targets

    def _step(self, path: Tensor) -> float:
        """One optimizer step of one path on the next training batch; returns the loss."""
        since = time.perf_counter()
        images, targets = self._next_batch()
        self._start_step()
        loss = F.cross_entropy(self.supernet(images, path), targets, label_smoothing=self.config.label_smoothing)
        loss.backward()  # type: ignore[no-untyped-call]
        return self._finish_step([loss.item()], len(images), since)[0]

    def _fair_step(self, paths: Tensor) -> list[float]:
        """One optimizer step of all paths on one batch, their gradients summed; returns the losses."""
        since = time.perf_counter()
        images, targets = self._next_batch()
        self._start_step()
        losses = []
        for path in paths:
            loss = F.cross_entropy(self.supernet(images, path), targets, label_smoothing=self.config.label_smoothing)
            loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.item())
        return self._finish_step(losses, len(images), since)

    def _next_batch(self) -> tuple[Tensor, Tensor]:
        images, targets = self._batches.batch(self.counts.optimizer_steps)
        return images.contiguous(memory_format=torch.channels_last), targets

    def learning_rate(self, step: int) -> float:
        """The learning rate of optimizer step `step`, counted from 0."""
        return cosine(step, self.planned_steps, self.config.learning_rate, self.config.final_learning_rate)

    def _start_step(self) -> None:
        # None and not zero: a zero gradient would let momentum and weight decay move what this step leaves out.
        self.optimizer.zero_grad(set_to_none=True)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.counts.optimizer_steps)

    def _finish_step(self, losses: list[float], images: int, since: float) -> list[float]:
        self.optimizer.step()
        self.counts.optimizer_steps += 1
        self.counts.images_trained += images * len(losses)
        self.counts.seconds_training += time.perf_counter() - since
        return losses

    def save(self, folder: RunFolder, records: int) -> None:
        """Writes a checkpoint; `records` of the metrics belong to it."""
        filtering = self.filter.state_dict()
        state = {
            "iteration": self.iteration,
            "records": records,
            "counts": vars(self.counts),
            "turnover": filtering["turnover"],
            "stopped_early": filtering["steady"],
            "pool": filtering["pool"],
            "compared_pool": filtering["compared_pool"],
            "pool_draws": sorted(self.pool_draws.items()),
        }
        save_checkpoint(folder.checkpoint, {"supernet": self.supernet}, self.optimizer, self.generator, state)

    def restore(self, folder: RunFolder) -> int:
        """Continues from the checkpoint; returns how many records of the metrics belong to it."""
        state = load_checkpoint(folder.checkpoint, {"supernet": self.supernet}, self.optimizer, self.generator)
        try:
            self.iteration = int(state["iteration"])
            self.counts = Counts(**state["counts"])
            filtering = {key: state[key] for key in ("turnover", "pool", "compared_pool")}
            # The rest is as it stands: the generator has been restored.
            filtering |= {"step": self.iteration, "steady": state["stopped_early"]}
            self.filter.load_state_dict(self.filter.state_dict() | filtering)
            self.pool_draws = Counter({tuple(path): int(draws) for path, draws in state["pool_draws"]})
            return int(state["records"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder.checkpoint}: expected the state of a training, got {error!r}") from error

    def summary(self) -> dict[str, Any]:
        """Results and counts of the run."""
        counts, config = self.counts, self.config
        return {
            "space": self.task.space.name,
            "space_size": self.task.space.size,
            "data": self.task.data.description,
            "sampler": config.sampler,
            "iterations": self.iteration,
            "planned_iterations": config.iterations,
            "planned_optimizer_steps": self.planned_steps,
            "stopped_early": self.filter.steady and self.iteration < config.iterations,
            "stop_interval": config.stop_interval or self.filter.stop_interval,
            "turnover": self.filter.turnover,
            "final_learning_rate": self.learning_rate(max(0, counts.optimizer_steps - 1)),
            **vars(counts),
            "cost_ratio": {"measured": counts.cost_ratio, "poster": PAPER_COST_RATIO},
            "corrected_optimizations": {
                "measured": counts.corrected(counts.cost_ratio),
                "poster": counts.corrected(PAPER_COST_RATIO),
            },
            "pool_draws": [
                {"path": list(path), "draws": draws, "in_pool": path in self.pool}
                for path, draws in sorted(self.pool_draws.items(), key=lambda item: (-item[1], item[0]))
            ],
        }


def train(config: TrainConfig, *, resume: bool = False) -> RunFolder:
    """Trains a supernet in a run folder, from the beginning or from its last checkpoint.

    Killed at any moment and resumed, it ends at the same weights, pool and choices as undisturbed (bit for bit on one
    machine and number of threads).

    Raises:
        FileExistsError, ValueError: as `RunFolder.open`, and for values that cannot be.
        FloatingPointError: the training diverged.
    """
    check_training(config)
    use_threads(config.threads)
    folder = RunFolder(config.run)
    trainer = SupernetTrainer(config, load_task(config))
    folder.open(config, resume)
    if folder.finished:
        return folder
    metrics = MetricsLog(folder.metrics)
    records = trainer.restore(folder) if folder.checkpoint.exists() else 0
    metrics.truncate_after(records)
    with Reporter(f"train ({config.sampler})", config.iterations, done=trainer.iteration) as reporter:
        while not trainer.done:
            record = trainer.run_iteration()
            metrics.append(record)
            records += 1
            reporter.advance(_figures(record))
            if trainer.iteration % config.checkpoint_interval == 0:
                metrics.sync()
                trainer.save(folder, records)
    metrics.sync()
    trainer.save(folder, records)
    save_tensors(folder.supernet, trainer.supernet.state_dict(), {"space": trainer.task.space.name})
    trainer.pool.save(folder.pool)
    write_json(folder.summary, trainer.summary())
    return folder


def _figures(record: dict[str, Any]) -> dict[str, str]:
    seconds = record["seconds_training"] + record["seconds_filtering"]
    images = record["images_trained"] + record["images_evaluated"]
    turnover = record["turnover"]
    return {
        "loss": f"{record['training_loss']:.3f}",
        "exploit": f"{record.get('exploit_probability', 0.0):.2f}",
        "turnover": "-" if turnover is None else f"{turnover:.2f}",
        "images/s": f"{images / seconds:,.0f}" if seconds else "-",
    }
