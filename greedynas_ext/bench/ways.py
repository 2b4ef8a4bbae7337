"""The PyTorch ways of computing the losses of supernet paths, against which `evaluate_paths` is measured.

Each is a factory: `make(supernet, paths, images, targets, bn)` does what need not be done again for other paths, and
gives a function that returns the list of losses. All are under no_grad in channels_last unless they say otherwise, and
leave the supernet as it is.

Batch normalisation: with bn="batch" the ways run copies that share the supernet's parameters and store no running
statistics, so that evaluation mode normalises by the batch without updating anything, which is the fastest correct way.
With bn="running" the copies keep them.

An adapted supernet is run by its own forward, path by path, and, where it is a chain, like any other.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from greedynas_ext.adapted import AdaptedSupernet
from greedynas_ext.arguments import SupernetLike

Losses = Callable[[], list[float]]
Make = Callable[[Any, Tensor, Tensor, Tensor, str], Losses]
Arithmetic = Literal["fp32", "autocast", "pure"]  # pure: weights, statistics and activations in bfloat16


@dataclass(frozen=True)
class Way:
    """A way to the losses.

    Attributes:
        name: what tables call it.
        precision: "fp32" or "bf16".
        policies: the `bn` that it is for.
        shares: whether it computes common prefixes once.
        compiled: whether torch.compile is part of it; that takes minutes the first time, then inductor's cache helps.
        make: the factory.
        own: whether it calls the forward of an adapted supernet.
    """

    name: str
    precision: str
    policies: tuple[str, ...]
    shares: bool
    compiled: bool
    make: Make
    own: bool = False

    def serves(self, supernet: SupernetLike) -> bool:
        """Whether it can run the supernet."""
        if isinstance(supernet, AdaptedSupernet):
            return self.own or hasattr(supernet, "stem")  # not where layers are no columns of a path
        return not self.own


class Parts(nn.Module):
    """Stem, choices and head of a supernet as one module."""

    def __init__(self, supernet: SupernetLike) -> None:
        super().__init__()
        self.stem, self.head = supernet.stem, supernet.head
        self.choices = nn.ModuleList(nn.ModuleList(layer) for layer in supernet.choices)


def shared_copy(supernet: SupernetLike, bn: str) -> nn.Module:
    """A copy in evaluation mode with the same parameters, whose batch normalisations follow the policy `bn`.

    Raises:
        TypeError: the stem, an operation or the head is no module.
    """
    module = supernet if isinstance(supernet, nn.Module) else Parts(supernet)
    twin = copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()}).eval()
    if bn == "batch":
        _forget_statistics(twin)
    return twin


def _forget_statistics(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.track_running_stats = False
            part.running_mean = part.running_var = part.num_batches_tracked = None


@contextlib.contextmanager
def evaluating(module: nn.Module, bn: str) -> Iterator[None]:
    """`module` itself in evaluation mode, by the policy `bn`; afterwards as before.

    For statistics of the batch its normalisations are in training mode on copies of the stored ones: there may be
    forwards that slice those.
    """
    training = {part: part.training for part in module.modules()}
    norms = [part for part in training if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    stored = [(norm, name, buffer) for norm in norms for name, buffer in norm._buffers.items() if buffer is not None]
    try:
        module.eval()
        if bn == "batch":
            for norm, name, buffer in stored:
                setattr(norm, name, buffer.clone())
            for norm in norms:
                norm.training = True
        yield
    finally:
        for norm, name, buffer in stored:
            setattr(norm, name, buffer)
        for part, flag in training.items():
            part.training = flag


class Chain:
    """Stem, blocks and head as functions, each compiled at its first use where that is asked for."""

    def __init__(self, supernet: Any, compiled: bool) -> None:
        self._choices: Any = supernet.choices
        self._compiled = compiled
        self._blocks: dict[tuple[int, int], Callable[[Tensor], Tensor]] = {}
        self.stem, self.head = self._prepare(supernet.stem), self._prepare(supernet.head)

    def block(self, layer: int, op: int) -> Callable[[Tensor], Tensor]:
        """An operation of a layer."""
        if (layer, op) not in self._blocks:
            self._blocks[layer, op] = self._prepare(self._choices[layer][op])
        return self._blocks[layer, op]

    def _prepare(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        return compile_alone(module) if self._compiled and any(True for _ in module.parameters()) else module


def compile_alone(module: nn.Module, **options: Any) -> Callable[[Tensor], Tensor]:
    """`torch.compile` of a module, with a code object of its own.

    Dynamo keeps what it compiled with the code object and tries it in turn, and blocks of one class have one: a block
    would pay for the guards of all others.
    """

    def run(features: Tensor) -> Tensor:
        output: Tensor = module(features)
        return output

    run.__code__ = run.__code__.replace()
    compiled: Callable[[Tensor], Tensor] = torch.compile(run, dynamic=False, options=options or None)
    return compiled


def loop(chain: Chain, paths: Sequence[Sequence[int]], images: Tensor, targets: Tensor) -> list[float]:
    """Each path by itself, from the images on."""
    losses = []
    for path in paths:
        features = chain.stem(images)
        for layer, op in enumerate(path):
            features = chain.block(layer, op)(features)
        losses.append(_loss(chain.head(features), targets))
    return losses


def recursion(chain: Chain, paths: Sequence[Sequence[int]], images: Tensor, targets: Tensor) -> list[float]:
    """Each unique prefix once, depth first."""
    losses = [0.0] * len(paths)

    def descend(members: list[int], layer: int, features: Tensor) -> None:
        if layer == len(paths[0]):
            loss = _loss(chain.head(features), targets)
            for member in members:
                losses[member] = loss
            return
        branches: dict[int, list[int]] = {}
        for member in members:
            branches.setdefault(paths[member][layer], []).append(member)
        for op, branch in branches.items():
            descend(branch, layer + 1, chain.block(layer, op)(features))

    descend(list(range(len(paths))), 0, chain.stem(images))
    return losses


def _loss(logits: Tensor, targets: Tensor) -> float:
    return F.cross_entropy(logits.float() if logits.dtype == torch.bfloat16 else logits, targets).item()


def _supernet_way(
    shares: bool,
    arithmetic: Arithmetic,
    compiled: bool,
    layout: torch.memory_format,
    supernet: SupernetLike,
    paths: Tensor,
    images: Tensor,
    targets: Tensor,
    bn: str,
) -> Losses:
    twin = shared_copy(supernet, bn)
    if layout != torch.channels_last:
        twin, images = copy.deepcopy(twin).to(memory_format=layout), images.contiguous(memory_format=layout)
    if arithmetic == "pure":
        twin, images = copy.deepcopy(twin).bfloat16(), images.bfloat16()
    walk = partial(recursion if shares else loop, Chain(twin, compiled), paths.tolist(), images, targets)
    return partial(_run, arithmetic, images.device.type, walk)


def _folded_way(
    arithmetic: Arithmetic,
    compiled: bool,
    supernet: SupernetLike,
    paths: Tensor,
    images: Tensor,
    targets: Tensor,
    bn: str,
) -> Losses:
    """A network of each path with its batch normalisations folded into the convolutions before the clock starts."""
    networks: list[Callable[[Tensor], Tensor]] = []
    for path in paths.tolist():
        network: nn.Module = folded(network_of(supernet, path))
        if arithmetic == "pure":
            network = network.bfloat16()
        network = network.to(memory_format=torch.channels_last)
        # Freezing makes weights constants of the compiled code, stored as oneDNN wants them.
        networks.append(compile_alone(network, freezing=True) if compiled else network)
    if arithmetic == "pure":
        images = images.bfloat16()

    def walk() -> list[float]:
        return [_loss(network(images), targets) for network in networks]

    return partial(_run, arithmetic, images.device.type, walk)


def network_of(supernet: SupernetLike, path: Sequence[int]) -> nn.Sequential:
    """One path by itself, in evaluation mode, with weights of its own."""
    parts = [supernet.stem, *(supernet.choices[layer][op] for layer, op in enumerate(path)), supernet.head]
    return copy.deepcopy(nn.Sequential(*parts)).eval()


def folded(module: nn.Module) -> nn.Module:
    """The module with pairs of a convolution and its batch normalisation replaced by one convolution, in place.

    Pairs are attributes `conv` and `bn` of one part, and neighbours in an nn.Sequential.
    """
    for part in module.modules():
        if isinstance(getattr(part, "conv", None), nn.Conv2d) and isinstance(getattr(part, "bn", None), nn.BatchNorm2d):
            part.conv = fuse_conv_bn_eval(part.conv, part.bn)  # type: ignore[type-var, arg-type]
            part.bn = nn.Identity()
        elif isinstance(part, nn.Sequential):
            for at, (first, second) in enumerate(zip(part, list(part)[1:], strict=False)):
                if type(first) is nn.Conv2d and type(second) is nn.BatchNorm2d:
                    part[at], part[at + 1] = fuse_conv_bn_eval(first, second), nn.Identity()
    return module


def _own_way(
    arithmetic: Arithmetic,
    supernet: AdaptedSupernet,
    paths: Tensor,
    images: Tensor,
    targets: Tensor,
    bn: str,
) -> Losses:
    """The supernet's own forward for each path, with all that it does around its operations."""
    rows = paths.tolist()

    def walk() -> list[float]:
        with evaluating(supernet.module, bn):
            return [_loss(supernet.forward(path, images), targets) for path in rows]

    return partial(_run, arithmetic, images.device.type, walk)


def _run(arithmetic: Arithmetic, device: str, walk: Losses) -> list[float]:
    mixed = torch.autocast(device, dtype=torch.bfloat16) if arithmetic == "autocast" else contextlib.nullcontext()
    with torch.no_grad(), mixed:
        return walk()


def _ways() -> list[Way]:
    both = ("batch", "running")
    ways = []
    for arithmetic in ("fp32", "autocast", "pure"):
        precision = "fp32" if arithmetic == "fp32" else "bf16"
        for compiled in (False, True):
            for shares in (False, True):
                name = f"{'compiled blocks' if compiled else 'eager'}, {arithmetic}{', sharing' if shares else ''}"
                make = partial(_supernet_way, shares, arithmetic, compiled, torch.channels_last)
                ways.append(Way(name, precision, both, shares, compiled, make))
        if arithmetic != "autocast":
            for compiled in (False, True):
                name = f"{'compiled' if compiled else 'eager'} folded paths, {arithmetic}"
                ways.append(
                    Way(name, precision, ("running",), False, compiled, partial(_folded_way, arithmetic, compiled))
                )
    contiguous = partial(_supernet_way, False, "fp32", False, torch.contiguous_format)
    ways.append(Way("eager, fp32, not channels_last", "fp32", both, False, False, contiguous))
    for precision, own in (("fp32", partial(_own_way, "fp32")), ("bf16", partial(_own_way, "autocast"))):
        ways.append(Way(f"own forward, {own.args[0]}", precision, both, False, False, own, own=True))
    return ways


WAYS: tuple[Way, ...] = tuple(_ways())


@contextlib.contextmanager
def _contiguous(module: nn.Module) -> Iterator[None]:
    """The weights of `module` in the layout that is not channels_last; afterwards where they were."""
    stored = [(parameter, parameter.data) for parameter in module.parameters()]
    try:
        for parameter, data in stored:
            parameter.data = data.to(memory_format=torch.contiguous_format)
        yield
    finally:
        for parameter, data in stored:
            parameter.data = data


def reference_losses(supernet: SupernetLike, paths: Tensor, images: Tensor, targets: Tensor, bn: str) -> list[float]:
    """Losses that others are compared with: of the supernet's modules in fp32, not in channels_last.

    In that layout PyTorch's batch normalisation sums in float64. At 32 images of 224x224 these losses are within 4e-6
    of those in float64, which take 20 times as long, and the ones in channels_last are not within 1e-3. An adapted
    supernet's are those of its own forward.
    """
    if isinstance(supernet, AdaptedSupernet):
        with _contiguous(supernet.module):
            return _own_way("fp32", supernet, paths, images.contiguous(), targets, bn)()
    twin = copy.deepcopy(shared_copy(supernet, bn)).to(memory_format=torch.contiguous_format)
    chain = Chain(twin, compiled=False)
    with torch.no_grad():
        return recursion(chain, paths.tolist(), images.contiguous(), targets)
