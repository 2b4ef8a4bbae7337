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
from greedynas_ext import evaluate_paths
from greedynas_ext.pool import CandidatePool
from greedynas_ext.samplers import FairSampler, GreedySampler, UniformSampler
from greedynas_ext.schedules import ExploitSchedule
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
        space = task.space
        num_choices = [space.num_operations] * space.num_layers
        budget = {"cost": task.macs_of, "max_cost": config.max_macs, "reject": config.draw_within_budget}
        self.supernet = task.new_supernet(config.seed).train()
        self.pool = CandidatePool(
            config.pool_size,
            max_cost=config.max_macs,
            cost=lambda path: task.macs_of(torch.tensor([path]))[0],
            num_choices=num_choices,
        )
        self._uniform = UniformSampler(num_choices, **budget)  # type: ignore[arg-type]
        with named_as_options(max_cost="max_macs"):
            self._uniform.sample(1, torch.Generator())  # a budget that leaves no path shows before anything is written
        self._greedy = GreedySampler(num_choices, self.pool, **budget)  # type: ignore[arg-type]
        self._fair = FairSampler(num_choices)
        self.schedule = ExploitSchedule(
            config.schedule,
            start=config.exploit_start,
            end=config.exploit_end,
            warmup_steps=config.warmup_iterations if config.sampler == "greedy" else 0,
            total_steps=config.iterations,
        )
        self._batches = BatchStream(task.data.train, config.batch_size, seed=config.seed, augment=config.augment)
        self._validation = None
        if config.sampler == "greedy":
            with named_as_options(size="filter_images"):
                self._validation = ValidationSampler(task.data.validation, config.filter_images, seed=config.seed)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.optimizer = torch.optim.SGD(
            self.supernet.parameters(),
            lr=config.learning_rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            nesterov=config.momentum > 0,
        )
        self.counts = Counts()
        self.iteration = 0
        self.turnover: float | None = None  # at the last look at the pool
        self.stopped_early = False
        self.pool_draws: Counter[tuple[int, ...]] = Counter()  # how often each path was drawn from the pool
        self._compared_pool: frozenset[tuple[int, ...]] = frozenset()  # P_t of the stopping rule

    @property
    def steps_per_iteration(self) -> int:
        """Optimizer steps of a round."""
        return 1 if self.config.sampler == "fair" else self.config.kept_paths

    @property
    def planned_steps(self) -> int:
        """Optimizer steps without early stopping: the horizon of the learning rate."""
        return self.config.iterations * self.steps_per_iteration

    @property
    def stop_interval(self) -> int:
        """t: rounds between two looks at the pool."""
        return self.config.stop_interval or math.ceil(3 * self.config.pool_size / self.config.sampled_paths)

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        return self.stopped_early or self.iteration >= self.config.iterations

    def run_iteration(self) -> dict[str, Any]:
        """One round; returns its record."""
        record: dict[str, Any] = {"iteration": self.iteration}
        if self.config.sampler == "fair":
            kept = self._fair.sample(self.generator)
            losses = self._fair_step(kept)
        else:
            if self.config.sampler == "uniform" or self.schedule.in_warmup(self.iteration):
                kept = self._uniform.sample(self.config.kept_paths, self.generator)
            else:
                kept = self._filter(record)
            losses = [self._step(path) for path in kept]
        if not all(map(math.isfinite, losses)):
            raise FloatingPointError(
                f"training: the loss became {losses} in round {self.iteration}; a lower learning_rate may help"
            )
        self.iteration += 1
        self._look_at_pool()
        record.update(
            trained_paths=kept.tolist(),
            training_loss=sum(losses) / len(losses),
            learning_rate=self.learning_rate(self.counts.optimizer_steps - 1),
            pool=len(self.pool),
            turnover=self.turnover,
            optimizer_steps=self.counts.optimizer_steps,
            images_trained=self.counts.images_trained,
            images_evaluated=self.counts.images_evaluated,
            seconds_training=self.counts.seconds_training,
            seconds_filtering=self.counts.seconds_filtering,
        )
        return record

    def _filter(self, record: dict[str, Any]) -> Tensor:
        """Multi-path sampling with rejection: the k best of m drawn paths, int64 [k, L]."""
        assert self._validation is not None
        since = time.perf_counter()
        probability = self.schedule(self.iteration)
        drawn = self._greedy.sample(self.config.sampled_paths, probability, self.generator)
        images, targets = self._validation.random_subset(self.iteration)
        images = images.contiguous(memory_format=torch.channels_last)
        evaluation = evaluate_paths(
            self.supernet, drawn.paths, images, targets, k=self.config.kept_paths, max_memory=self.config.max_memory
        )
        assert evaluation.top_k is not None
        self.pool_draws.update(tuple(path) for path in drawn.paths[drawn.from_pool].tolist())
        self.pool.update(drawn.paths, evaluation.losses)
        self.counts.images_evaluated += len(drawn.paths) * len(images)
        self.counts.seconds_filtering += time.perf_counter() - since
        record.update(
            exploit_probability=probability,
            from_pool=int(drawn.from_pool.sum()),
            drawn_paths=drawn.paths.tolist(),
            filter_losses=evaluation.losses.tolist(),
            shared_fraction=evaluation.plan.shared_fraction,
        )
        return drawn.paths[evaluation.top_k]

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

    def _look_at_pool(self) -> None:
        """The stopping rule: every t rounds past the warm-up, stop if at most alpha of a full pool is new."""
        past_warmup = self.iteration - self.config.warmup_iterations
        if self.config.sampler != "greedy" or past_warmup <= 0 or past_warmup % self.stop_interval:
            return
        if self._compared_pool:
            self.turnover = self.pool.turnover(self._compared_pool)
            threshold = self.config.stop_threshold
            self.stopped_early = threshold is not None and self.pool.full and self.turnover <= threshold
        self._compared_pool = self.pool.snapshot() if self.pool.full else frozenset()

    def save(self, folder: RunFolder, records: int) -> None:
        """Writes a checkpoint; `records` of the metrics belong to it."""
        state = {
            "iteration": self.iteration,
            "records": records,
            "counts": vars(self.counts),
            "turnover": self.turnover,
            "stopped_early": self.stopped_early,
            "pool": self.pool.to_json(),
            "compared_pool": sorted(self._compared_pool),
            "pool_draws": sorted(self.pool_draws.items()),
        }
        save_checkpoint(folder.checkpoint, {"supernet": self.supernet}, self.optimizer, self.generator, state)

    def restore(self, folder: RunFolder) -> int:
        """Continues from the checkpoint; returns how many records of the metrics belong to it."""
        state = load_checkpoint(folder.checkpoint, {"supernet": self.supernet}, self.optimizer, self.generator)
        try:
            self.iteration = int(state["iteration"])
            self.counts = Counts(**state["counts"])
            self.turnover, self.stopped_early = state["turnover"], bool(state["stopped_early"])
            self.pool = CandidatePool.from_json(
                state["pool"], cost=lambda path: self.task.macs_of(torch.tensor([path]))[0]
            )
            self._greedy.pool = self.pool
            self._compared_pool = frozenset(map(tuple, state["compared_pool"]))
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
            "stopped_early": self.stopped_early and self.iteration < config.iterations,
            "stop_interval": self.stop_interval,
            "turnover": self.turnover,
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
