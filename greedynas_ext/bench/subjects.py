"""The supernets that are measured: of the spaces of `greedynas`, which is looked for by its name, and one's own."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from greedynas_ext.adapted import AdaptedSupernet
from greedynas_ext.arguments import Chain
from greedynas_ext.bench.cases import Case
from greedynas_ext.bench.inputs import SpaceLike, make_images, randomise


class _Greedynas(Protocol):
    """What is used of the package `greedynas`."""

    def get_space(self, name: str) -> Any: ...

    def Supernet(self, space: Any, seed: int) -> Any: ...


@dataclass(frozen=True)
class Subject:
    """What a case is about.

    Attributes:
        supernet: what `evaluate_paths` takes.
        name: of the space, which recorded paths go by, or of the function.
        sizes: how many options each layer has.
        channels: of the images.
        classes: of the targets.
        resolution: of the images.
    """

    supernet: Any
    name: str
    sizes: tuple[int, ...]
    channels: int
    classes: int
    resolution: int


def subject_of(case: Case) -> Subject:
    """Makes the supernet of a case, on its device.

    Raises:
        ModuleNotFoundError: the space is one of `greedynas`, which is not there, or the function's module is not.
        ValueError: there is no such space or function.
    """
    device = torch.device(case.device)
    if case.space:
        space = space_named(case.space)
        sizes = (space.num_operations,) * space.num_layers
        supernet = make_supernet(space).to(device)
        resolution = case.resolution or space.resolution
        return Subject(supernet, space.name, sizes, space.in_channels, space.num_classes, resolution)
    supernet = _made_by(case.supernet)
    module = supernet.module if isinstance(supernet, AdaptedSupernet) else supernet
    if isinstance(module, nn.Module):
        module.to(device=device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    sizes = Chain.of(supernet).sizes
    return Subject(supernet, case.supernet, sizes, case.channels, case.classes, case.resolution)


def space_named(name: str) -> Any:
    """A search space of `greedynas`.

    Raises:
        ModuleNotFoundError: `greedynas` is not installed.
        ValueError: there is no such space.
    """
    return _greedynas(f"the space {name!r}").get_space(name)


def make_supernet(space: SpaceLike, seed: int = 0) -> Any:
    """A supernet in channels_last with logits of order one, so that an error in a path would show in its loss.

    Batch normalisations get scales and shifts drawn at random, and running statistics of some batches; a fresh
    supernet gives nearly the same loss, that of guessing, for every path.
    """
    supernet = _greedynas("a space's supernet").Supernet(space, seed=seed)
    supernet = supernet.to(memory_format=torch.channels_last).train()
    generator = torch.Generator().manual_seed(seed)
    norms = [module for module in supernet.modules() if isinstance(module, nn.BatchNorm2d)]
    randomise(norms, supernet.head.get_submodule("linear"), generator)
    with torch.no_grad():
        images = make_images(8, space.in_channels, max(8, space.resolution // 2), seed + 1)
        for shift in range(space.num_operations):  # every operation of every layer is in one of these paths
            path = (torch.arange(space.num_layers) * 3 + shift) % space.num_operations
            for part in torch.split(images, 4):
                supernet(part, path)
    for norm in norms:
        norm.momentum = space.bn_momentum
    return supernet.eval()


def _greedynas(wanted: str) -> _Greedynas:
    try:
        return importlib.import_module("greedynas")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{wanted} is made by the package greedynas, which is not installed here ({error}); a case with "
            f"supernet = 'module:function' needs none"
        ) from error


def _made_by(name: str) -> Any:
    module_name, _, function = name.partition(":")
    if not module_name or not function:
        raise ValueError(f"supernet: expected module:function, got {name!r}")
    module = importlib.import_module(module_name)
    make = getattr(module, function, None)
    if not callable(make):
        raise ValueError(f"supernet: expected a function {function!r} in {module_name}, found none")
    return make()
