"""How long `evaluate_paths` takes against a loop over the paths in PyTorch, and what sharing prefixes gives.

Run: python bench/evaluate_paths.py [--space macro] [--images 64] [--rounds 7]

Three ways to the same losses, interleaved in one process, medians: a loop over the paths (channels_last, no_grad, train
mode: the plain PyTorch way, which pollutes running statistics), `evaluate_paths` depth-first, and layer by layer.
Paths: 10 uniform ones; 10 of which 8 come from a pool whose members are mutations of a few parents; 50 of a population
bred from 10 parents. The floor is the fraction of multiply-accumulates that sharing leaves.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from greedynas import Supernet, get_space
from greedynas_ext import evaluate_paths


def mutated(parents: Tensor, count: int, choices: int, genes: float, generator: torch.Generator) -> Tensor:
    """`count` paths, each a parent in which `genes` choices on average are drawn anew."""
    picks = torch.randint(len(parents), (count,), generator=generator)
    paths = parents[picks].clone()
    change = torch.rand(paths.shape, generator=generator) < genes / paths.shape[1]
    drawn = torch.randint(choices, paths.shape, generator=generator)
    return torch.where(change, drawn, paths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="macro", help="search space")
    parser.add_argument("--images", type=int, default=64, help="images of the batch")
    parser.add_argument("--resolution", type=int, default=None, help="pixels; default: the space's own")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved repetitions, of which medians are taken")
    options = parser.parse_args()
    space = get_space(options.space)
    resolution = options.resolution or space.resolution
    generator = torch.Generator().manual_seed(0)
    supernet = Supernet(space, seed=0).to(memory_format=torch.channels_last).train()
    images = torch.randn(options.images, space.in_channels, resolution, resolution, generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)
    targets = torch.randint(space.num_classes, (options.images,), generator=generator)

    def uniform(count: int) -> Tensor:
        return torch.randint(space.num_operations, (count, space.num_layers), generator=generator)

    pool = mutated(uniform(4), 200, space.num_operations, 2.0, generator)
    cases = {
        "10 uniform": uniform(10),
        "10, 8 from a pool": torch.cat([uniform(2), pool[torch.randint(200, (8,), generator=generator)]]),
        "50 of a population": mutated(uniform(10), 50, space.num_operations, 2.0, generator),
    }
    print(
        f"{options.space}, {options.images} images of {resolution}x{resolution}, float32, batch statistics, "
        f"{torch.get_num_threads()} threads"
    )
    print(f"{'paths':<20}{'loop':>10}{'depth-first':>13}{'layer by layer':>16}{'MACs left':>11}")
    for name, paths in cases.items():

        def loop(paths: Tensor = paths) -> None:
            with torch.no_grad():
                for path in paths:
                    F.cross_entropy(supernet(images, path), targets).item()

        def depth_first(paths: Tensor = paths) -> None:
            evaluate_paths(supernet, paths, images, targets, k=5)

        def layer_by_layer(paths: Tensor = paths) -> None:
            evaluate_paths(supernet, paths, images, targets, k=5, max_memory=1 << 40)

        seconds = measure([loop, depth_first, layer_by_layer], options.rounds)
        plan = evaluate_paths(supernet, paths, images[:2], targets[:2]).plan
        ratios = [seconds[0] / other for other in seconds]
        print(
            f"{name:<20}{seconds[0] * 1e3:>7.0f} ms{ratios[1]:>12.2f}x{ratios[2]:>15.2f}x"
            f"{1 - plan.shared_fraction:>11.1%}"
        )


def measure(ways: list[Callable[[], None]], rounds: int) -> list[float]:
    """Median seconds of each way, run in turn."""
    times: list[list[float]] = [[] for _ in ways]
    for way in ways:
        way()
    for _ in range(rounds):
        for slot, way in enumerate(ways):
            since = time.perf_counter()
            way()
            times[slot].append(time.perf_counter() - since)
    return [statistics.median(slot) for slot in times]


if __name__ == "__main__":
    main()
