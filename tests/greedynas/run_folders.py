"""Run folders as `train`, `search` and `retrain` leave them, made up in a second: no network is trained.

A path's loss is a made-up sum over its operations, so that pools, fronts and draws look like those of real runs; pool,
samplers, schedule and costs are the real ones.
"""

from collections import Counter

import torch

from greedynas.config import RetrainConfig, SearchConfig, TrainConfig
from greedynas.learning_rates import cosine
from greedynas.metrics_log import MetricsLog
from greedynas.runs import RunFolder
from greedynas.search import pareto_front
from greedynas.spaces import get_space
from greedynas.theory import corrected_optimizations
from greedynas_ext.pool import CandidatePool
from greedynas_ext.samplers import GreedySampler, UniformSampler
from greedynas_ext.schedules import ExploitSchedule
from greedynas_ext.strict_json import write_json

DESCRIPTION = "digits: 1,150 training, 287 validation and 360 test images of 1x8x8, 10 classes"
MEASURED_RATIO = 9.87


class MadeUpLosses:
    def __init__(self, space, seed):
        generator = torch.Generator().manual_seed(seed)
        self.space = space
        self.terms = torch.rand(space.num_layers, space.num_operations, generator=generator) ** 2
        self.generator = generator

    def __call__(self, paths, progress=1.0, noise=0.03):
        total = self.terms.gather(1, paths.T).mean(0)
        macs = torch.tensor(self.macs(paths))
        loss = 0.1 + 0.5 * total + 0.12 / (macs / macs.mean()) + 2.2 * 0.5 ** (12 * progress)
        return (loss * (1 + noise * torch.randn(len(paths), generator=self.generator))).double()

    def macs(self, paths):
        return [value / 1e6 for value in self.space.macs(paths)]


def make_training(root, *, rounds=300, max_macs=None, seed=0, **options):
    settings = {"warmup_iterations": rounds // 10, "pool_size": 100, "filter_images": 200, "batch_size": 64}
    config = TrainConfig(run=root, iterations=rounds, max_macs=max_macs, seed=seed, **(settings | options))
    folder = RunFolder(root)
    folder.open(config, resume=False)
    space = get_space(config.space, num_classes=10, in_channels=1, resolution=config.resolution or 8)
    losses = MadeUpLosses(space, seed)
    choices = [space.num_operations] * space.num_layers
    pool = CandidatePool(
        config.pool_size,
        max_cost=max_macs,
        cost=lambda path: space.macs(path) / 1e6,
        num_choices=choices,
    )
    sampler = GreedySampler(choices, pool)
    schedule = ExploitSchedule(
        config.schedule,
        start=config.exploit_start,
        end=config.exploit_end,
        warmup_steps=config.warmup_iterations,
        total_steps=rounds,
    )
    steps_each = 1 if config.sampler == "fair" else config.kept_paths
    images_each = config.batch_size * (space.num_operations if config.sampler == "fair" else config.kept_paths)
    interval = config.stop_interval or -(-3 * config.pool_size // config.sampled_paths)
    log, draws, before, turnover, evaluated = MetricsLog(folder.metrics), Counter(), frozenset(), None, 0
    stopped = False
    for iteration in range(rounds):
        record = {"iteration": iteration}
        progress = iteration / rounds
        if config.sampler == "greedy" and not schedule.in_warmup(iteration):
            drawn = sampler.sample(config.sampled_paths, schedule(iteration), losses.generator)
            filtered = losses(drawn.paths, progress)
            pool.update(drawn.paths, filtered)
            draws.update(tuple(path) for path in drawn.paths[drawn.from_pool].tolist())
            evaluated += config.sampled_paths * config.filter_images
            record |= {
                "exploit_probability": schedule(iteration),
                "from_pool": int(drawn.from_pool.sum()),
                "filter_losses": filtered.tolist(),
                "shared_fraction": 0.08 + 0.3 * progress,
            }
            past = iteration + 1 - config.warmup_iterations
            if past % interval == 0:
                turnover = pool.turnover(before) if before else turnover
                threshold = config.stop_threshold
                stopped = bool(before) and threshold is not None and turnover <= threshold
                before = pool.snapshot() if pool.full else frozenset()
        random = UniformSampler(choices).sample(config.kept_paths, losses.generator)
        trained = float(losses(random, progress, noise=0.1).mean()) + 0.4
        steps = (iteration + 1) * steps_each
        record |= {
            "training_loss": trained,
            "learning_rate": cosine(steps - 1, rounds * steps_each, config.learning_rate, config.final_learning_rate),
            "pool": len(pool),
            "turnover": turnover,
            "optimizer_steps": steps,
            "images_trained": (iteration + 1) * images_each,
            "images_evaluated": evaluated,
            "seconds_training": 0.05 * (iteration + 1),
            "seconds_filtering": evaluated * 5e-5,
        }
        log.append(record)
        if stopped:
            break
    trained_images, done = record["images_trained"], iteration + 1
    ratio = MEASURED_RATIO if evaluated else None
    pool.save(folder.pool)
    summary = {
        "space": space.name,
        "space_size": space.size,
        "data": DESCRIPTION,
        "sampler": config.sampler,
        "iterations": done,
        "planned_iterations": rounds,
        "planned_optimizer_steps": rounds * steps_each,
        "stopped_early": stopped,
        "stop_interval": interval,
        "turnover": turnover,
        "final_learning_rate": record["learning_rate"],
        "optimizer_steps": done * steps_each,
        "images_trained": trained_images,
        "images_evaluated": evaluated,
        "seconds_training": 0.05 * done,
        "seconds_filtering": evaluated * 5e-5,
        "cost_ratio": {"measured": ratio, "poster": 3.33},
        "corrected_optimizations": {
            "measured": corrected_optimizations(trained_images, evaluated, ratio) if ratio else float(trained_images),
            "poster": corrected_optimizations(trained_images, evaluated, 3.33),
        },
        "pool_draws": [
            {"path": list(path), "draws": count, "in_pool": path in pool} for path, count in draws.most_common()
        ],
    }
    write_json(folder.summary, summary)
    return folder


def make_search(run, *, name=None, method="nsga2", population=20, generations=10, max_macs=None, seed=0, bad_losses=0):
    config = SearchConfig(
        run=run.root, method=method, name=name, population=population, generations=generations, max_macs=max_macs
    )
    folder = run.search(name or method)
    folder.open(config, resume=False)
    space = get_space("mini-16", num_classes=10, in_channels=1, resolution=8)
    losses = MadeUpLosses(space, 0)
    generator = torch.Generator().manual_seed(seed)
    sampler = UniformSampler([space.num_operations] * space.num_layers)
    log, records, history = MetricsLog(folder.metrics), {}, []
    parents = None
    for generation in range(generations):
        paths = sampler.sample(population, generator)
        if method == "nsga2" and parents is not None:
            mutate = torch.rand(paths.shape, generator=generator) < 0.2
            picks = torch.randint(len(parents), (population,), generator=generator)
            paths = torch.where(mutate, paths, parents[picks])
        for path, loss, macs in zip(
            paths.tolist(), losses(paths, noise=0.01).tolist(), losses.macs(paths), strict=True
        ):
            if tuple(path) in records:
                continue
            loss = float("nan") if len(records) < bad_losses else loss
            record = {"path": path, "loss": loss, "accuracy": 1 - loss / 3, "macs": macs, "generation": generation}
            records[tuple(path)] = record
            log.append(record)
        within = [r for r in records.values() if r["loss"] == r["loss"] and (max_macs is None or r["macs"] <= max_macs)]
        best = min((r["loss"] for r in within), default=1e6)
        history.append({"generation": generation, "best_loss": best, "paths": len(records)})
        front = pareto_front(within)
        parents = torch.tensor([r["path"] for r in (*front, *sorted(within, key=lambda r: r["loss"])[:10])])
    if method == "nsga2":
        history[0]["from_pool"] = population
    chosen = min(within, key=lambda r: (r["loss"], r["path"]))
    summary = {
        "method": method,
        "max_macs": max_macs,
        "chosen": {**chosen, "names": space.decode(chosen["path"])},
        "front": front,
        "history": history,
        "paths_evaluated": len(records),
        "images_evaluated": len(records) * 287,
        "first_population_from_pool": history[0].get("from_pool", 0),
    }
    write_json(folder.summary, summary)
    return folder


def make_retraining(run, *, search="nsga2", name=None, path=None, epochs=30, accuracy=0.9861):
    space = get_space("mini-16", num_classes=10, in_channels=1, resolution=8)
    config = RetrainConfig(run=run.root, search=search, path=path, name=name, epochs=epochs)
    folder = run.retraining(name or search)
    folder.open(config, resume=False)
    log = MetricsLog(folder.metrics)
    generator = torch.Generator().manual_seed(len(folder.root.name))
    for epoch in range(epochs):
        noise = 1 + 0.04 * float(torch.randn((), generator=generator))
        log.append(
            {
                "epoch": epoch,
                "training_loss": (0.52 + 1.8 * 0.8**epoch) * noise,
                "learning_rate": cosine(epoch, epochs, config.learning_rate, 0.0),
                "images_trained": (epoch + 1) * 1408,
                "seconds": 0.9 * (epoch + 1),
            }
        )
    if path is None:
        from greedynas_ext.strict_json import read_json

        indices = read_json(run.search(search).summary)["chosen"]["path"]
    else:
        indices = space.encode(path.split()).tolist()
    summary = {
        "path": indices,
        "names": space.decode(indices),
        "test_accuracy": accuracy,
        "test_images": 360,
        "epochs": epochs,
        "images_trained": epochs * 1408,
        "seconds": 0.9 * epochs,
        "macs": space.macs(indices) / 1e6,
        "params": space.params(indices),
    }
    write_json(folder.summary, summary)
    return folder


def make_run(root, **options):
    """A greedy run with NSGA-II, random search and a retraining of each."""
    run = make_training(root, **options)
    make_search(run)
    make_search(run, method="random", seed=1)
    make_retraining(run)
    make_retraining(run, search="random", accuracy=0.9722)
    return run
