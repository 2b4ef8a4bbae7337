"""What `evaluate_paths` accepts: each check names the argument, what was expected and what came."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from greedynas_ext.checks import check_count, describe
from greedynas_ext.path_checks import check_path_tensor

Operation: TypeAlias = Callable[[Tensor], Tensor]
Batch: TypeAlias = tuple[Tensor, Tensor]


@runtime_checkable
class SupernetLike(Protocol):
    """The contract: a chain of a stem, layers of alternative operations, and a head that gives logits [N, classes]."""

    @property
    def stem(self) -> Any:
        """Images [N, C, H, W] to the input of the first layer."""

    @property
    def choices(self) -> Any:
        """Layers, each a sequence of operations from the layer's input to its output."""

    @property
    def head(self) -> Any:
        """The last layer's output to logits [N, classes]."""


@dataclass(frozen=True)
class Chain:
    """A supernet as evaluation sees it; the modules are the supernet's own.

    Attributes:
        columns: for each layer the column of the paths that chooses in it, None for a fixed block, which has a single
            operation; None: the columns are the layers.
        options: with `columns`, how many options each column of the paths has. A column may choose nothing.
        partly_fused: whether parts that are recognised may run fused beside others that are not.
    """

    stem: Operation
    choices: tuple[tuple[Operation, ...], ...]
    head: Operation
    columns: tuple[int | None, ...] | None = None
    options: tuple[int, ...] = ()
    partly_fused: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many options each column of the paths has."""
        return tuple(map(len, self.choices)) if self.columns is None else self.options

    def planned(self, paths: Tensor) -> tuple[Chain, Tensor]:
        """What evaluates `paths` [m, columns], and for each path the operation of each of its layers."""
        if self.columns is None:
            return self, paths
        zeros = torch.zeros(len(paths), dtype=torch.int64)
        layers = [zeros if column is None else paths[:, column] for column in self.columns]
        return self, torch.stack(layers, 1)

    def nodes_per_column(self, nodes_per_layer: Sequence[int]) -> tuple[int, ...]:
        """Unique prefixes that end in each column of the paths, from those that end in each layer."""
        if self.columns is None:
            return tuple(nodes_per_layer)
        counts = [0] * len(self.options)
        for column, count in zip(self.columns, nodes_per_layer, strict=True):
            if column is not None:
                counts[column] += count
        return tuple(counts)

    def stage(self, layer: int) -> str:
        """The name of a layer."""
        if self.columns is None:
            return f"layer {layer}"
        column = self.columns[layer]
        return f"fixed {self.columns[:layer].count(None)}" if column is None else f"layer {column}"

    def place(self, layer: int, op: int) -> str:
        """The name of an operation, for reasons and errors."""
        if self.columns is None:
            return f"supernet.choices[{layer}][{op}]"
        column = self.columns[layer]
        return f"supernet, {self.stage(layer)}" if column is None else f"supernet.choices[{column}][{op}]"

    @classmethod
    def of(cls, supernet: Any) -> Chain:
        """Raises TypeError, or ValueError for an empty layer, where the contract is not kept."""
        adapted = getattr(supernet, "_adapted_chain", None)
        if isinstance(adapted, Chain):
            return adapted
        found = {name: getattr(supernet, name) for name in ("stem", "choices", "head") if hasattr(supernet, name)}
        missing = [name for name in ("stem", "choices", "head") if name not in found]
        if missing:
            raise TypeError(
                f"supernet: expected attributes stem, choices[layer][op] and head, got a {type(supernet).__name__} "
                f"without {', '.join(missing)}"
            )
        try:
            choices = tuple(tuple(layer) for layer in found["choices"])
        except TypeError:
            raise TypeError(
                "supernet.choices: expected a sequence of layers, each a sequence of operations, got "
                f"{type(found['choices']).__name__}"
            ) from None
        if not choices:
            raise ValueError("supernet.choices: expected at least one layer, got none")
        for number, layer in enumerate(choices):
            if not layer:
                raise ValueError(f"supernet.choices[{number}]: expected at least one operation, got none")
        parts = {"stem": found["stem"], "head": found["head"]}
        parts.update({f"choices[{i}][{j}]": op for i, layer in enumerate(choices) for j, op in enumerate(layer)})
        for name, part in parts.items():
            if not callable(part):
                raise TypeError(f"supernet.{name}: expected a module or function, got {type(part).__name__}")
            _check_visible(name, part)
        return cls(found["stem"], choices, found["head"])

    def modules_of(self, paths: Tensor) -> list[nn.Module]:
        """The modules that `paths` [m, layers] use, stem and head among them, and those that functions hold."""
        used = [self.stem, self.head]
        for layer, ops in enumerate(self.choices):
            used += [ops[op] for op in torch.unique(paths[:, layer]).tolist()]
        return [module for part in used for module in _modules_behind(part)]


def _modules_behind(part: Any) -> list[nn.Module]:
    """A module itself; for a function or callable object the modules that it has in reach."""
    if isinstance(part, nn.Module):
        return [part]
    held: list[Any] = [getattr(part, "__self__", None)]
    if isinstance(part, functools.partial):
        held += [part.func, *part.args, *part.keywords.values()]
    held += [*(getattr(part, "__defaults__", None) or ()), *(getattr(part, "__kwdefaults__", None) or {}).values()]
    for cell in getattr(part, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # an empty cell
            held.append(cell.cell_contents)
    held += getattr(part, "__dict__", {}).values()
    modules = [value for value in held if isinstance(value, nn.Module)]
    if isinstance(part, functools.partial):
        modules += _modules_behind(part.func) if not isinstance(part.func, nn.Module) else []
    return modules


def _check_visible(name: str, part: Any) -> None:
    """Batch normalisations are caught where Python calls them, on parameters that exist."""
    modules = list(part.modules()) if isinstance(part, nn.Module) else []
    if any(isinstance(inner, torch.jit.ScriptModule | torch.jit.ScriptFunction) for inner in (part, *modules)):
        raise TypeError(
            f"supernet.{name}: expected a module that runs in Python, got one with TorchScript in it, whose batch "
            f"normalisations cannot be seen"
        )
    for inner in modules:
        if any(t is not None and is_lazy(t) for t in (*inner._parameters.values(), *inner._buffers.values())):
            raise ValueError(
                f"supernet.{name}: expected initialised parameters, got those of a {type(inner).__name__} that has "
                f"not run yet"
            )


def check_paths(given: Any, chain: Chain) -> Tensor:
    """`given` as a contiguous int64 CPU tensor [m, layers] with m >= 1, every index within its layer."""
    paths = check_path_tensor("paths", given, chain.sizes)
    if not len(paths):
        raise ValueError(f"paths: expected int64 [m, {paths.shape[1]}] with m >= 1, got none")
    return paths


def check_top_k(k: Any, num_paths: int) -> None:
    """`k` is None or in [1, m]."""
    if k is not None and (isinstance(k, bool) or not isinstance(k, int)):
        raise TypeError(f"k: expected an int or None, got {type(k).__name__}")
    if k is not None and not 1 <= k <= num_paths:
        raise ValueError(f"k: expected 1 <= k <= {num_paths} (the number of paths), got {k}")


def check_one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """`value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_precision(precision: str | None, device: torch.device | None) -> None:
    """`precision` is one that is computed, and on `device`, the supernet's, where that is known."""
    check_one_of("precision", precision, (None, "fp32", "bf16", "fp16"))
    if precision == "fp16" and device is not None and device.type != "cuda":
        raise ValueError(
            f"precision: expected None, 'fp32' or 'bf16' for a supernet on {device} ('fp16' is computed on GPUs), got "
            f"'fp16'"
        )


def check_positive(name: str, value: Any) -> None:
    """`value` is None or a positive int."""
    if value is not None:
        check_count(name, value, 1)


def check_images(name: str, images: Any, device: torch.device | None) -> Tensor:
    """Floating images [N, C, H, W] with N >= 1, on `device`."""
    if not isinstance(images, Tensor):
        raise TypeError(f"{name}: expected a floating tensor [N, C, H, W], got {type(images).__name__}")
    if not images.is_floating_point():
        raise TypeError(f"{name}: expected a floating tensor [N, C, H, W], got {describe(images)}")
    if images.dim() != 4 or images.numel() == 0:
        raise ValueError(f"{name}: expected [N, C, H, W] with no empty dimension, got {list(images.shape)}")
    if device is not None and images.device != device:
        raise ValueError(f"{name}: expected the supernet's device {device}, got {images.device}")
    return images.detach().as_subclass(Tensor)


def not_finite(name: str, count: int, images: int) -> ValueError:
    """That `count` of the images hold NaN or infinity."""
    return ValueError(f"{name}: expected finite values, got NaN or infinity in {count} of {images} images")


def check_values(name: str, images: Tensor, targets: Tensor | None) -> None:
    """All values of the images are finite, and no class is negative; how many there are, the logits tell."""
    # The sum is finite only where all values are (unless it overflows), and needs no memory.
    if not bool(torch.isfinite(images.sum())) and not bool(torch.isfinite(images).all()):
        raise not_finite(name, int((~torch.isfinite(images)).flatten(1).any(1).sum()), len(images))
    if targets is not None and int(targets.min()) < 0:
        raise ValueError(f"targets: expected classes from 0, got {int(targets.min())}")


def check_targets(targets: Any, images: Tensor) -> Tensor:
    """Class indices int64 [N] on the images' device."""
    expected = f"targets: expected int64 [{len(images)}] (a class for each image)"
    if not isinstance(targets, Tensor):
        raise TypeError(f"{expected}, got {type(targets).__name__}")
    if targets.dtype != torch.int64:
        raise TypeError(f"{expected}, got {describe(targets)}")
    if targets.shape != (len(images),):
        raise ValueError(f"{expected}, got int64 {list(targets.shape)}")
    if targets.device != images.device:
        raise ValueError(f"targets: expected the images' device {images.device}, got {targets.device}")
    return targets


def iterate_batches(
    images: Any, targets: Any, device: torch.device | None, check: Callable[[str, Tensor, Tensor], None]
) -> Iterator[Batch]:
    """Checked (images, targets) pairs from one pair of tensors or from an iterable of pairs.

    `check` is given the name, images and targets of each, to check what is in them.
    """
    if isinstance(images, Tensor):
        if targets is None:
            raise TypeError(f"targets: expected int64 [{len(images)}], got None")
        images = check_images("images", images, device)
        targets = check_targets(targets, images)
        check("images", images, targets)
        yield images, targets
        return
    if not isinstance(images, Iterable):
        raise TypeError(f"images: expected a tensor or an iterable of (images, targets), got {type(images).__name__}")
    if targets is not None:
        raise TypeError("targets: expected None beside an iterable of (images, targets), got a value")
    count = 0
    for batch in images:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TypeError(f"images: expected an iterable of (images, targets), got a {type(batch).__name__} in it")
        name = f"images (batch {count})"
        checked = check_images(name, batch[0], device), check_targets(batch[1], batch[0])
        check(name, *checked)
        yield checked
        count += 1
    if count == 0:
        raise ValueError("images: expected at least one batch, got an empty iterable")
