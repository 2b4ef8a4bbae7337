"""What is measured on: supernets with weights that tell paths apart, images of varied content, and paths."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greedynas import Space, Supernet

PATHS = Path(__file__).resolve().parent / "paths"


def make_images(count: int, channels: int, resolution: int, seed: int = 0) -> Tensor:
    """Images float32 [count, channels, resolution, resolution], channels_last.

    Noise at several scales, with brightness and contrast of its own in each image: neither constant nor white.
    """
    generator = torch.Generator().manual_seed(seed)
    images = torch.zeros(count, channels, resolution, resolution)
    for size in (2, 4, 8, 16, resolution):
        noise = torch.randn(count, channels, size, size, generator=generator) * (8.0 / (size + 6.0))
        images += F.interpolate(noise, (resolution, resolution), mode="bilinear", align_corners=False)
    contrast = 0.4 + torch.rand(count, 1, 1, 1, generator=generator)
    brightness = 0.5 * torch.randn(count, channels, 1, 1, generator=generator)
    return (images * contrast + brightness).contiguous(memory_format=torch.channels_last)


def make_targets(count: int, classes: int, seed: int = 0) -> Tensor:
    """Classes int64 [count]."""
    return torch.randint(classes, (count,), generator=torch.Generator().manual_seed(seed))


def make_supernet(space: Space, seed: int = 0) -> Supernet:
    """A supernet in channels_last with logits of order one, so that an error in a path would show in its loss.

    Batch normalisations get scales and shifts drawn at random, and running statistics of some batches; a fresh
    supernet gives nearly the same loss, that of guessing, for every path.
    """
    generator = torch.Generator().manual_seed(seed)
    supernet = Supernet(space, seed=seed).to(memory_format=torch.channels_last).train()
    norms = [module for module in supernet.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.7, 1.3, generator=generator)
            norm.bias.normal_(0.0, 0.2, generator=generator)
            norm.momentum = None  # the mean of all batches
        classifier = supernet.head.get_submodule("linear")
        assert isinstance(classifier, nn.Linear)
        classifier.weight.normal_(0.0, 2.0 / classifier.in_features**0.5, generator=generator)
        classifier.bias.normal_(0.0, 0.5, generator=generator)
        images = make_images(8, space.in_channels, max(8, space.resolution // 2), seed + 1)
        for shift in range(space.num_operations):  # every operation of every layer is in one of these paths
            path = (torch.arange(space.num_layers) * 3 + shift) % space.num_operations
            for part in torch.split(images, 4):
                supernet(part, path)
    for norm in norms:
        norm.momentum = space.bn_momentum
    return supernet.eval()


def read_paths(file: Path, space: Space) -> Tensor:
    """Paths int64 [n, L] of a file that bench/make_paths.py wrote, in its order.

    Raises:
        FileNotFoundError: there is none yet.
        ValueError: the file is of another space, or a path is not one of it.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; `python bench/make_paths.py {space.name}` makes it")
    content = json.loads(file.read_text(encoding="utf-8"))
    if content["space"] != space.name:
        raise ValueError(f"{file}: expected paths of {space.name!r}, got some of {content['space']!r}")
    return space.check_paths([entry["path"] for entry in content["entries"]])


def make_paths(source: str, count: int, space: Space, seed: int = 0) -> Tensor:
    """Paths int64 [count, L].

    Args:
        source: "uniform"; "pool": a fifth uniform and the rest different paths from the recorded candidate pool, as
            late in a training (exploit probability 0.8); "population": a recorded generation of NSGA-II.
        count: how many.
        space: the search space.
        seed: of the draws.

    Raises:
        ValueError: the source is unknown or has fewer paths.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(number: int) -> Tensor:
        return torch.randint(space.num_operations, (number, space.num_layers), generator=generator)

    if source == "uniform":
        return uniform(count)
    if source not in ("pool", "population"):
        raise ValueError(f"source: expected uniform, pool or population, got {source!r}")
    recorded = read_paths(PATHS / f"{space.name}-{source}.json", space)
    wanted = count if source == "population" else count - count // 5
    if wanted > len(recorded):
        raise ValueError(f"count: expected at most {len(recorded)} paths of the {source} of {space.name}, got {wanted}")
    if source == "population":
        return recorded[:count]
    drawn = recorded[torch.randperm(len(recorded), generator=generator)[:wanted]]
    return torch.cat([uniform(count - wanted), drawn])
