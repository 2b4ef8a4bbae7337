"""Supernets as they are found elsewhere, written from scratch, each in the style of its origin.

Their classes and attributes have names of their own, blocks are built and called in many hands, and each chooses in
another way. `FOREIGN` has them with the way to run one path; `own_losses` is the loop over their own forwards.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from foreign_by_attribute import (
    ELASTIC,
    Classifier,
    ElasticNet,
    LayerChoiceNet,
    ProxylessNet,
    set_elastic,
    set_layer_choices,
    set_mixed_edges,
    set_mutables,
)
from foreign_by_path import FairNet, KeyedNet, ScarletNet, ShuffleOneShot, SplitNet
from foreign_elastic import ONCE, make_once, set_once
from supernets import randomise
from torch import Tensor, nn


@dataclass(frozen=True)
class Foreign:
    """A supernet, how many options its layers have, and how its own forward runs one path."""

    make: Callable[[], nn.Module]
    sizes: tuple[int, ...]
    run: Callable[[Any, Tensor, Sequence[int]], Tensor]
    share: float  # of MACs that has to run fused
    arguments: dict[str, Any] = field(default_factory=dict)
    layers: int | None = None  # where they are no columns of a path

    @property
    def num_layers(self) -> int:
        return len(self.sizes) if self.layers is None else self.layers


def by_argument(net: Any, images: Tensor, path: Sequence[int]) -> Tensor:
    return net(images, path)


def after(switch: Callable[[nn.Module, Sequence[int]], None]) -> Callable[[Any, Tensor, Sequence[int]], Tensor]:
    def run(net: Any, images: Tensor, path: Sequence[int]) -> Tensor:
        switch(net, path)
        return net(images)

    return run


def by_names(net: Any, images: Tensor, path: Sequence[int]) -> Tensor:
    stages = net.stages.values()
    return net(images, [list(stage)[op] for stage, op in zip(stages, path, strict=True)])


def by_keys(net: Any, images: Tensor, path: Sequence[int]) -> Tensor:
    return net(images, [list(block.ops)[op] for block, op in zip(net.blocks, path, strict=True)])[0]


def elastic(net: Any, images: Tensor, path: Sequence[int]) -> Tensor:
    set_elastic(net, [values[op] for values, op in zip(ELASTIC, path, strict=True)])
    return net(images)


def once(net: Any, images: Tensor, path: Sequence[int]) -> Tensor:
    set_once(net, [values[op] for values, op in zip(ONCE, path, strict=True)])
    return net(images)


FOREIGN: dict[str, Foreign] = {
    "spos": Foreign(ShuffleOneShot, (4, 4, 4, 4), by_argument, 0.95),
    "split units": Foreign(SplitNet, (2, 4, 2), by_names, 0.95),
    "fairnas": Foreign(FairNet, (6, 6, 6), by_argument, 0.95),
    "fairnas, biases": Foreign(lambda: FairNet(bias=True), (6, 6, 6), by_argument, 0.95),
    "scarlet": Foreign(ScarletNet, (2, 3, 2, 3), by_argument, 0.95),
    "proxyless": Foreign(ProxylessNet, (6, 7, 7, 6), after(set_mixed_edges), 0.95),
    "layer choice": Foreign(LayerChoiceNet, (4, 5, 5), after(set_layer_choices), 0.95),
    "mutable ops": Foreign(Classifier, (7, 6, 7, 6), after(set_mutables), 0.95),
    "keyed": Foreign(KeyedNet, (3, 2, 2), by_keys, 0.0, {"output": 0}),
    "elastic": Foreign(ElasticNet, (2, 2, 3, 2, 3), elastic, 0.0, {"choices": ELASTIC, "select": set_elastic}, 4),
    "once for all": Foreign(make_once, tuple(map(len, ONCE)), once, 1.0, {"choices": ONCE, "select": set_once}, 6),
    "once for all, mobile": Foreign(
        lambda: make_once(mobile=True), tuple(map(len, ONCE)), once, 0.9, {"choices": ONCE, "select": set_once}, 6
    ),
}


def make(name: str, dtype: torch.dtype = torch.float64, seed: int = 3) -> nn.Module:
    """The supernet, with weights, biases and statistics that are not those of a fresh module, in training mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = FOREIGN[name].make()
        for module in net.modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                nn.init.normal_(module.bias, 0.0, 0.3)
    randomise(net, seed)
    return net.to(dtype).train()


def covering(sizes: Sequence[int], extra: int = 2) -> Tensor:
    """Paths in which each option of each layer comes, and some random ones."""
    rows = [[(number + layer) % size for layer, size in enumerate(sizes)] for number in range(max(sizes))]
    generator = torch.Generator().manual_seed(0)
    rows += [[int(torch.randint(size, (), generator=generator)) for size in sizes] for _ in range(extra)]
    return torch.tensor(rows)


@torch.no_grad()
def own_losses(
    net: nn.Module,
    run: Callable[[Any, Tensor, Sequence[int]], Tensor],
    paths: Tensor,
    images: Tensor,
    targets: Tensor,
    bn: str = "batch",
) -> Tensor:
    """Losses [m, N] by a loop over the forward of a copy; dropout and drop-path off."""
    rows = []
    for path in paths.tolist():
        copied = copy.deepcopy(net).eval()
        for module in copied.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.train(bn == "batch")
        rows.append(F.cross_entropy(run(copied, images.clone(), path), targets, reduction="none"))
    return torch.stack(rows)
