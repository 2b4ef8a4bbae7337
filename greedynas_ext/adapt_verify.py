"""Compares the chain made of a supernet with the supernet's own forward, on a few images."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greedynas_ext import reference
from greedynas_ext.adapt_select import kept_attributes
from greedynas_ext.arguments import Chain
from greedynas_ext.intercept import Interceptor
from greedynas_ext.isolation import held_interrupts, undisturbed
from greedynas_ext.operations import Described, PoolWeights, SeparableWeights
from greedynas_ext.packing import ConvBNWeights, IdentityWeights, pack_choice_block
from greedynas_ext.recognise import (
    HeadWeights,
    StemWeights,
    Unrecognised,
    recognise_head,
    recognise_operation,
    recognise_stem,
)
from greedynas_ext.recognise_unit import recognise_unit
from greedynas_ext.unit import UnitWeights

Own = Callable[[Sequence[int], Tensor], Any]

# The same functions of torch on the same values: what differs is the order of few sums, if anything.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}
_OTHERS = 5e-2
# Statistics of fewer values than this may tell rounding errors of a convolution apart.
_FEWEST = 8


def disagreement(
    module: nn.Module, chain: Chain, paths: Sequence[Sequence[int]], own: Own, images: Tensor, *, keeps_state: bool
) -> str | None:
    """Where the chain, or what is recognised of it, computes something else than `own(path, images)`; None: nowhere.

    Operations that are in none of `paths` are not compared. Statistics are those of the images.

    Args:
        module: the supernet.
        chain: what was made of it.
        paths: to compare on.
        own: the supernet's own forward.
        images: to compare on.
        keeps_state: whether the supernet may keep a state between calls: then its forward runs once more.
    """
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), images.dtype)
    images = images.to(dtype)
    with _quiet(module, chain, images.device):
        compared: set[tuple[int, int]] = set()
        # Each path on other images after others still, and the chain in the opposite order: a state kept between calls
        # shows.
        shifted = [images.roll(number, -1) for number in range(len(paths))]
        for path in paths if keeps_state else ():
            own(path, images.flip(-1))
        logits = [own(path, each.clone()) for path, each in zip(paths, shifted, strict=True)]
        for path, each, expected in zip(paths[::-1], shifted[::-1], logits[::-1], strict=True):
            if not isinstance(expected, Tensor) or expected.dim() != 2:
                came = list(expected.shape) if isinstance(expected, Tensor) else type(expected).__name__
                return f"expected logits [{len(images)}, classes] from forward, got {came}"
            problem = _along(chain, path, each, expected, compared)
            if problem is not None:
                return problem
    return None


@contextlib.contextmanager
def _quiet(module: nn.Module, chain: Chain, device: torch.device) -> Iterator[None]:
    interceptor = Interceptor(None, frozenset())
    interceptor.normalisation = "probe"
    parts = [chain.stem, *(op for layer in chain.choices for op in layer), chain.head]
    modules = [module, *(part for part in parts if isinstance(part, nn.Module))]
    with held_interrupts(), undisturbed(modules, device), torch.no_grad(), kept_attributes(module), interceptor:
        yield


def _along(
    chain: Chain, path: Sequence[int], images: Tensor, expected: Tensor, compared: set[tuple[int, int]]
) -> str | None:
    chain, layers = chain.planned(torch.tensor([path]))
    features = chain.stem(images.clone())
    if (-1, 0) not in compared:
        compared.add((-1, 0))
        problem = _described_otherwise(recognise_stem(chain.stem), images, features, "supernet.stem")
        if problem is not None:
            return problem
    for layer, op in enumerate(layers[0].tolist()):
        source, features = features, chain.choices[layer][op](features.clone())
        if (layer, op) not in compared:
            compared.add((layer, op))
            channels = source.shape[1] if source.dim() > 1 else 0
            weights = recognise_operation(chain.choices[layer][op], channels)
            if isinstance(weights, Unrecognised):
                weights = recognise_unit(chain.choices[layer][op], channels)  # type: ignore[assignment]
            problem = _described_otherwise(weights, source, features, chain.place(layer, op))
            if problem is not None:
                return problem
    logits = chain.head(features.clone())
    if _error(logits, expected) is not None:
        return f"on path {list(path)} the chain's logits differ from forward's {_error(logits, expected)}"
    return _described_otherwise(recognise_head(chain.head), features, logits, "supernet.head")


def _described_otherwise(weights: object, source: Tensor, output: Tensor, place: str) -> str | None:
    """Where a description computes something else than the module did."""
    if isinstance(weights, Unrecognised | IdentityWeights):
        return None
    if output.shape[0] * output.shape[2:].numel() < _FEWEST and output.dim() == 4:
        return None
    if isinstance(weights, HeadWeights) and weights.side and source.shape[2:] != (weights.side, weights.side):
        return None  # at this resolution it is not used
    error = _error(described(weights, source), output)
    return None if error is None else f"{place} is recognised as {type(weights).__name__}, which differs {error}"


def described(weights: object, x: Tensor) -> Tensor:
    """What a description of an operation, a stem or a head computes, with statistics of the batch, in plain torch."""
    if isinstance(weights, StemWeights):
        x = _operation(ConvBNWeights(weights.conv, weights.bn, weights.stride, weights.activation), x)
        for block in weights.blocks:
            x = _operation(block, x)
        return x
    if isinstance(weights, HeadWeights):
        x = _operation(ConvBNWeights(weights.conv, weights.bn, 1, weights.activation), x)
        return F.linear(x.mean((2, 3)), weights.weight, weights.bias)
    if isinstance(weights, UnitWeights):
        return _unit(weights, x)
    return _operation(weights, x)  # type: ignore[arg-type]


def _unit(weights: UnitWeights, x: Tensor) -> Tensor:
    size = weights.size_after((x.shape[2], x.shape[3]))
    output = x.new_full((len(x), weights.out_channels, *size), float("nan"))
    for branch in weights.branches:
        y = reference.activation(branch.activation)(x[:, list(branch.reads)])
        for operation in branch.operations:
            y = _operation(operation, y)
        output[:, list(branch.writes)] = y
    return output


def _operation(weights: Described, x: Tensor) -> Tensor:
    if isinstance(weights, ConvBNWeights):
        return _normalised(weights, _conv(weights.weight, x, weights.stride))
    if isinstance(weights, SeparableWeights):
        x = _conv(weights.depthwise, x, weights.stride, groups=len(weights.depthwise))
        return _normalised(weights, _conv(weights.project, x))
    if isinstance(weights, PoolWeights):
        window = (weights.kernel, weights.stride, weights.kernel // 2)
        if weights.pooling == "maximum":
            return _normalised(weights, F.max_pool2d(x, *window))
        return _normalised(weights, F.avg_pool2d(x, *window, count_include_pad=weights.pooling == "mean with padding"))
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    block = pack_choice_block([weights], dtype=wide)
    index = torch.zeros(1, dtype=torch.int64)
    output, _ = reference.mixed_op(x.to(wide).permute(0, 2, 3, 1)[None], index, index, block)
    return output[0].permute(0, 3, 1, 2).to(x.dtype)


def _conv(weight: Tensor, x: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
    kernel = weight.shape[2] if weight.dim() == 4 else 1
    weight = weight.reshape(*weight.shape[:2], kernel, kernel)
    return F.conv2d(x, weight, stride=stride, padding=kernel // 2, groups=groups)


def _normalised(weights: ConvBNWeights | SeparableWeights | PoolWeights, x: Tensor) -> Tensor:
    if weights.bn is not None:
        x = F.batch_norm(x, None, None, weights.bn.weight, weights.bn.bias, True, 0.0, weights.bn.eps)
    return reference.activation(weights.activation)(x)


def _error(actual: Tensor, expected: Tensor) -> str | None:
    """The largest difference, where it is more than rounding."""
    if actual.shape != expected.shape:
        return f"in shape: {list(actual.shape)} for {list(expected.shape)}"
    largest = float(expected.abs().max())
    difference = float((actual.double() - expected.double()).abs().max())
    allowed = _TOLERANCES.get(expected.dtype, _OTHERS) * max(largest, 1e-30)
    return None if difference <= allowed else f"by {difference:.2e}, of values up to {largest:.2e}"
