"""What is measured on: images of varied content, weights that tell paths apart, and paths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greedynas_ext.path_checks import check_path_tensor
from greedynas_ext.strict_json import read_json

PATHS = Path(__file__).resolve().parent / "paths"


class SpaceLike(Protocol):
    """What is needed to know of a search space."""

    @property
    def name(self) -> str:
        """What recorded paths go by."""

    @property
    def num_layers(self) -> int:
        """Columns of a path."""

    @property
    def num_operations(self) -> int:
        """Options of each layer."""

    @property
    def in_channels(self) -> int:
        """Of the images."""

    @property
    def resolution(self) -> int:
        """Height and width of the images where none is given."""

    @property
    def bn_momentum(self) -> float:
        """Of running statistics."""


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


def randomise(norms: Sequence[nn.BatchNorm2d], classifier: nn.Linear, generator: torch.Generator) -> None:
    """Draws scales, shifts and the classifier; running statistics will be means over all batches that follow."""
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.7, 1.3, generator=generator)
            norm.bias.normal_(0.0, 0.2, generator=generator)
            norm.momentum = None
        classifier.weight.normal_(0.0, 2.0 / classifier.in_features**0.5, generator=generator)
        classifier.bias.normal_(0.0, 0.5, generator=generator)


def read_paths(file: Path, sizes: Sequence[int], space: str | None = None) -> Tensor:
    """Paths int64 [n, L] of a file, in its order.

    Args:
        file: JSON: what bench/make_paths.py writes, the pool.json of a run of `greedynas`, or a list of paths.
        sizes: how many options each of the L layers has.
        space: of which the file has to be, where it says of which it is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is of another space, or a path is none.
    """
    content = read_json(file)
    if isinstance(content, dict):
        if space is not None and content.get("space", space) != space:
            raise ValueError(f"{file}: expected paths of {space!r}, got some of {content['space']!r}")
        content = content.get("entries")
    if not isinstance(content, list) or not content:
        raise ValueError(f"{file}: expected a list of paths, or entries that each have a path, got none")
    rows = [entry.get("path") if isinstance(entry, dict) else entry for entry in content]
    return check_path_tensor(str(file), rows, sizes)


def paths_from(source: str, count: int, sizes: Sequence[int], space: str | None = None, seed: int = 0) -> Tensor:
    """Paths int64 [count, L].

    Args:
        source: "uniform"; "pool": a fifth uniform and the rest different paths from the candidate pool that is recorded
            of the space, as late in a training (exploit probability 0.8); "population": a recorded generation of
            NSGA-II; or a file of paths (`read_paths`), whose first ones are taken.
        count: how many.
        sizes: how many options each layer has.
        space: the search space, for recorded paths.
        seed: of the draws.

    Raises:
        FileNotFoundError: there is no such file, or nothing is recorded of the space.
        ValueError: the source is unknown or has fewer paths.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(number: int) -> Tensor:
        if len(set(sizes)) == 1:
            return torch.randint(sizes[0], (number, len(sizes)), generator=generator)
        return torch.stack([torch.randint(size, (number,), generator=generator) for size in sizes], 1)

    if source == "uniform":
        return uniform(count)
    recorded = source in ("pool", "population")
    if not recorded and not source.endswith(".json"):
        raise ValueError(f"source: expected uniform, pool, population or a .json file of paths, got {source!r}")
    file = PATHS / f"{space}-{source}.json" if recorded else Path(source)
    if not file.is_file():
        advice = f"; `python bench/make_paths.py {space}` makes it" if recorded else ""
        raise FileNotFoundError(f"{file}: no such file{advice}")
    paths = read_paths(file, sizes, space)
    wanted = count - count // 5 if source == "pool" else count
    if wanted > len(paths):
        where = f"the {source} of {space}" if recorded else source
        raise ValueError(f"count: expected at most {len(paths)} paths of {where}, got {wanted}")
    if source != "pool":
        return paths[:count]
    drawn = paths[torch.randperm(len(paths), generator=generator)[:wanted]]
    return torch.cat([uniform(count - wanted), drawn])


def make_paths(source: str, count: int, space: SpaceLike, seed: int = 0) -> Tensor:
    """`paths_from` for a search space."""
    return paths_from(source, count, (space.num_operations,) * space.num_layers, space.name, seed)
