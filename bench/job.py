"""The job that GreedyNAS repeats, once: 10 paths on 1,000 images of 224x224; and what training an image costs.

Run: python bench/job.py [--images 1000] [--paths 10] [--resolution 224] [--no-eager] [--output FILE.json]

Time and peak memory (resident set) of each way are of a process of its own, one call and no warm-up, as the first
filter of a training has it. The eager loops need about 11 GB in fp32 at the full size; --no-eager leaves them out.

The cost ratio says how many evaluated images (an image on one path) cost as much as one training image: forward,
backward and an optimizer step of one path at batch 64 in fp32, over the evaluation of 64 images; medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from child import Cost, cost_of, in_child
from torch import Tensor

from greedynas import Space, Supernet, get_space
from greedynas_ext.bench.inputs import make_images, make_paths, make_targets
from greedynas_ext.bench.measure import Spread, interleave, machine
from greedynas_ext.bench.ours import evaluate
from greedynas_ext.bench.subjects import make_supernet
from greedynas_ext.bench.ways import WAYS
from greedynas_ext.strict_json import write_json

EAGER = {"fp32": "eager, fp32", "bf16": "eager, pure"}


def evaluation(
    name: str, precision: str, supernet: Supernet, paths: Tensor, images: Tensor, targets: Tensor
) -> Callable[[], object]:
    """A call of `evaluate_paths` ("ours") or of a way of ways.py by its name."""
    if name == "ours":
        return partial(evaluate, supernet, paths, images, targets, "batch", precision)
    (way,) = (way for way in WAYS if way.name == name)
    return way.make(supernet, paths, images, targets, "batch")


def job(name: str, precision: str, space_name: str, paths: int, images: int, resolution: int) -> Cost:
    """One evaluation in this process."""
    space = get_space(space_name)
    supernet = make_supernet(space)
    batch = make_images(images, space.in_channels, resolution), make_targets(images, space.num_classes)
    return cost_of(evaluation(name, precision, supernet, make_paths("uniform", paths, space), *batch), 1)


def training_step(supernet: Supernet, path: Tensor, images: Tensor, targets: Tensor) -> Callable[[], object]:
    """Forward, backward and an SGD step of one path, as `greedynas train` does them."""
    optimizer = torch.optim.SGD(supernet.parameters(), lr=1e-4, momentum=0.9, nesterov=True, weight_decay=4e-5)

    supernet.train()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(supernet(images, path), targets, label_smoothing=0.1).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def cost_ratios(space: Space, images: int, resolution: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of an image trained and evaluated on one path, and their ratios."""
    supernet = make_supernet(space)
    batch = make_images(images, space.in_channels, resolution), make_targets(images, space.num_classes)
    path = make_paths("uniform", 1, space, seed=1)
    calls = {"training": training_step(supernet, path[0], *batch)}
    for precision, eager in EAGER.items():
        calls[f"evaluate_paths, {precision}"] = evaluation("ours", precision, supernet, path, *batch)
        calls[eager] = evaluation(eager, precision, supernet, path, *batch)
    for call in calls.values():
        call()
    times = interleave(calls, rounds)
    medians = {name: statistics.median(seconds) * 1e3 / images for name, seconds in times.seconds.items()}
    ratios = {name: asdict(times.ratio("training", name)) for name in calls if name != "training"}
    return {"milliseconds_per_image": medians, "ratios": ratios, "batch": images, "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="mbv2-7")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--paths", type=int, default=10)
    parser.add_argument("--resolution", type=int, default=224, help="pixels")
    parser.add_argument("--batch", type=int, default=64, help="images of the cost ratio")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds of the cost ratio")
    parser.add_argument("--no-eager", action="store_true", help="only evaluate_paths does the job")
    parser.add_argument("--output", type=Path, help="JSON file of everything measured")
    options = parser.parse_args()
    print(
        f"{options.space}, {options.paths} paths, {options.images} images of {options.resolution}x{options.resolution}"
    )
    results: dict[str, Any] = {"command": sys.argv, "machine": machine(), "job": {}}
    for precision, eager in EAGER.items():
        for name in ("ours",) if options.no_eager else ("ours", eager):
            size = (options.space, options.paths, options.images, options.resolution)
            cost = in_child(job, name, precision, *size)
            label = f"evaluate_paths, {precision}" if name == "ours" else name
            results["job"][label] = asdict(cost)
            print(
                f"{label:<24}{cost.seconds[0]:>8.1f} s{cost.peak_bytes / 1e9:>8.2f} GB at most, "
                f"{cost.growth_bytes / 1e9:.2f} GB more than before",
                flush=True,
            )
    costs = cost_ratios(get_space(options.space), options.batch, options.resolution, options.rounds)
    results["cost_ratio"] = costs
    print(f"training an image: {costs['milliseconds_per_image']['training']:.2f} ms; over evaluating one on a path:")
    for name, ratio in costs["ratios"].items():
        print(f"{name:<24}{Spread(**ratio)}")
    if options.output is not None:
        write_json(options.output, results)


if __name__ == "__main__":
    main()
