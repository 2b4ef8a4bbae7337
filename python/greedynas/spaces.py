"""Search spaces: chains of layers that each hold the same alternative operations.

The grammar is MobileNetV2's: a stem, inverted bottlenecks of some expansion and kernel with or without
squeeze-excitation, and a head. A *path* is one operation index per layer, an int64 tensor ``[L]``
(``[m, L]`` for m paths), and an architecture is written as operation names: ``e3k5s`` is expansion 3,
kernel 5, squeeze-excitation; ``id`` is identity.

Sources: `mbv2-7` and `mbv2-se-13` from "GreedyNAS: Towards Fast One-Shot NAS with Greedy Supernet"
(CVPR 2020); `macro` from NAS-Bench-Macro ("Prioritized Architecture Sampling with Monte-Carlo Tree
Search", CVPR 2021). `mini-28` and `mini-16` follow the same grammar for small images.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final, cast, overload

import numpy as np
import torch
from torch import Tensor

from greedynas.costs import CostTable, cost_table
from greedynas.layers import Layer, Operation
from greedynas_ext.checks import check_count
from greedynas_ext.path_checks import check_path, check_path_tensor

__all__ = ["ACTIVATIONS", "Layer", "Operation", "Space", "available_spaces", "get_space"]

ACTIVATIONS: Final = ("relu", "relu6", "hswish", "silu")
_FIXED: Final = Operation("e1k3", 1, 3)


@dataclass(frozen=True)
class Space:
    """A search space, and everything needed to build its supernet, its networks and their costs.

    Args:
        name: what ``get_space`` calls it.
        in_channels: channels of the images (3 for colour, 1 for greyscale).
        num_classes: classes of the classifier.
        resolution: height and width of the images in pixels where none is given.
        stem_channels: output channels of the stem's 3x3 convolution.
        stem_stride: its stride.
        fixed: layers after the stem's convolution that offer no choice: MB1 3x3, without squeeze-excitation.
        layers: the choice blocks, in order.
        operations: the alternatives of every layer; a path indexes this tuple.
        head_channels: output channels of the last 1x1 convolution, the classifier's input.
        activation: ``relu``, ``relu6``, ``hswish`` or ``silu``, everywhere outside squeeze-excitation.
        se_ratio: squeezed channels over *hidden* channels in squeeze-excitation.
        bn_eps: epsilon of every BatchNorm.
        bn_momentum: momentum of every BatchNorm's running statistics.

    Raises:
        TypeError: if a count is not an integer.
        ValueError: if the chain does not fit together.
    """

    name: str
    in_channels: int
    num_classes: int
    resolution: int
    stem_channels: int
    stem_stride: int
    fixed: tuple[Layer, ...]
    layers: tuple[Layer, ...]
    operations: tuple[Operation, ...]
    head_channels: int
    activation: str
    se_ratio: float = 0.25
    bn_eps: float = 1e-5
    bn_momentum: float = 0.1

    def __post_init__(self) -> None:
        """Check the counts, the activation, and that each layer takes what the one before it gives."""
        for field in ("in_channels", "num_classes", "resolution", "stem_channels", "stem_stride", "head_channels"):
            check_count(field, getattr(self, field), 1)
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if not 0.0 < self.se_ratio <= 1.0:
            raise ValueError(f"se_ratio: expected a ratio in (0, 1], got {self.se_ratio}")
        if not self.layers:
            raise ValueError("layers: expected at least one layer, got none")
        if not self.operations or len(set(self.operations)) < len(self.operations):
            raise ValueError(f"operations: expected one or more, each once, got {[op.name for op in self.operations]}")
        channels = self.stem_channels
        for field, group in (("fixed", self.fixed), ("layers", self.layers)):
            for index, layer in enumerate(group):
                if layer.in_channels != channels:
                    raise ValueError(
                        f"{field}[{index}].in_channels: expected {channels}, what comes before it, "
                        f"got {layer.in_channels}"
                    )
                channels = layer.out_channels

    @property
    def num_layers(self) -> int:
        """Number of choice blocks, L."""
        return len(self.layers)

    @property
    def num_operations(self) -> int:
        """Number of alternatives in each of them."""
        return len(self.operations)

    @property
    def size(self) -> int:
        """Number of paths, as an exact integer."""
        return int(self.num_operations**self.num_layers)

    @property
    def fixed_operation(self) -> Operation:
        """The operation of every fixed layer: MB1 3x3."""
        return _FIXED

    def squeeze_channels(self, hidden: int) -> int:
        """Squeezed channels of squeeze-excitation on ``hidden`` channels."""
        return max(1, round(hidden * self.se_ratio))

    def encode(self, names: Sequence[str]) -> Tensor:
        """Turn one operation name per layer into a path, int64 ``[L]``.

        Raises:
            TypeError: if ``names`` is a single string or holds something else than strings.
            ValueError: if there is not one name per layer, or a name is not an operation of this space.
        """
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise TypeError(f"names: expected {self.num_layers} operation names, got {type(names).__name__} {names!r}")
        names = list(names)
        if len(names) != self.num_layers:
            raise ValueError(f"names: expected {self.num_layers} (one operation per layer), got {len(names)}")
        for layer, name in enumerate(names):
            if not isinstance(name, str):
                raise TypeError(f"names: layer {layer}: expected an operation's name, got {type(name).__name__}")
            if name not in self._index_of:
                raise ValueError(
                    f"names: layer {layer}: expected one of {', '.join(self._index_of)} "
                    f"(the operations of {self.name!r}), got {name!r}"
                )
        return torch.tensor([self._index_of[name] for name in names], dtype=torch.int64)

    def decode(self, path: Tensor | Sequence[int]) -> list[str]:
        """Turn a path (int64 ``[L]`` or L integers) into operation names.

        Raises:
            TypeError, ValueError: as ``check_path``.
        """
        return [self.operations[index].name for index in self.check_path(path)]

    def check_path(self, path: Tensor | Sequence[int], *, argument: str = "path") -> tuple[int, ...]:
        """Check one path and return it as L Python integers, the form that serves as a key.

        Args:
            path: int64 tensor ``[L]``, or L integers.
            argument: what the errors call it.

        Raises:
            TypeError: if the dtype is not int64 (or the elements are not integers).
            ValueError: if the shape is not ``[L]`` or an index is out of range.
        """
        return check_path(argument, path, self.num_layers, self._num_choices)

    def check_paths(self, paths: Tensor | Sequence[Any], *, argument: str = "paths") -> Tensor:
        """Check m paths and return them as an int64 tensor ``[m, L]`` in CPU memory; m may be 0.

        Args:
            paths: int64 tensor ``[m, L]``, or m sequences of L integers.
            argument: what the errors call it.

        Raises:
            TypeError: if the dtype is not int64 (or the elements are not integers).
            ValueError: if the shape is not ``[m, L]`` or an index is out of range.
        """
        return check_path_tensor(argument, paths, self._num_choices)

    @overload
    def macs(self, path: Sequence[int], resolution: int | None = None) -> int: ...
    @overload
    def macs(self, path: Sequence[Sequence[int]], resolution: int | None = None) -> list[int]: ...
    @overload
    def macs(self, path: Tensor, resolution: int | None = None) -> Any: ...
    def macs(self, path: Tensor | Sequence[Any], resolution: int | None = None) -> int | list[int]:
        """Multiply-accumulates of one forward pass of one image.

        Convolutions, the classifier and the two products of squeeze-excitation count; BatchNorm, biases,
        activations, pooling and gating do not.

        Args:
            path: one path (int64 ``[L]`` or L integers) or m of them (int64 ``[m, L]`` or nested sequences).
            resolution: height and width of the images in pixels; the space's own where None.

        Returns:
            An int for one path, a list of m ints for m paths.

        Raises:
            TypeError, ValueError: as ``check_paths``; or if ``resolution`` is not a positive integer.
        """
        table = self.cost_table(resolution)
        return self._sum(path, table.fixed.macs, table.macs)

    @overload
    def params(self, path: Sequence[int]) -> int: ...
    @overload
    def params(self, path: Sequence[Sequence[int]]) -> list[int]: ...
    @overload
    def params(self, path: Tensor) -> Any: ...
    def params(self, path: Tensor | Sequence[Any]) -> int | list[int]:
        """Learnable parameters, affine parameters of BatchNorm and biases included.

        Args:
            path: one path (int64 ``[L]`` or L integers) or m of them (int64 ``[m, L]`` or nested sequences).

        Returns:
            An int for one path, a list of m ints for m paths.

        Raises:
            TypeError, ValueError: as ``check_paths``.
        """
        table = self.cost_table()
        return self._sum(path, table.fixed.params, table.params)

    def cost_table(self, resolution: int | None = None) -> CostTable:
        """Cost of every operation of every layer at a resolution in pixels (the space's own where None); cached."""
        resolution = self.resolution if resolution is None else check_count("resolution", resolution, 1)
        if resolution not in self._cost_tables:
            self._cost_tables[resolution] = cost_table(self, resolution)
        return self._cost_tables[resolution]

    @property
    def _num_choices(self) -> tuple[int, ...]:
        return (self.num_operations,) * self.num_layers

    @cached_property
    def _cost_tables(self) -> dict[int, CostTable]:
        return {}

    @cached_property
    def _index_of(self) -> dict[str, int]:
        return {op.name: index for index, op in enumerate(self.operations)}

    def _sum(self, path: Tensor | Sequence[Any], fixed: int, table: Tensor) -> int | list[int]:
        single = _is_single(path)
        tensor = torch.tensor([self.check_path(path)]) if single else self.check_paths(path, argument="path")
        entries = table.gather(1, tensor.T)  # [L, m]
        totals = (entries.sum(0) + fixed).tolist()
        return int(totals[0]) if single else cast(list[int], totals)


def _is_single(path: Tensor | Sequence[Any]) -> bool:
    """Whether `path` is one path and not m of them, if it is any."""
    if isinstance(path, Tensor | np.ndarray):
        return path.ndim < 2
    return not (isinstance(path, Sequence) and len(path) and isinstance(path[0], Sequence | Tensor | np.ndarray))


def _operations(names: str) -> tuple[Operation, ...]:
    return tuple(Operation.parse(name) for name in names.split())


def _stages(in_channels: int, *stages: tuple[int, int, int]) -> tuple[Layer, ...]:
    """Layers from (channels, number of layers, stride of the first)."""
    layers: list[Layer] = []
    for channels, count, stride in stages:
        for index in range(count):
            layers.append(Layer(in_channels, channels, stride if index == 0 else 1))
            in_channels = channels
    return tuple(layers)


_SEVEN: Final = _operations("e3k3 e3k5 e3k7 e6k3 e6k5 e6k7 id")

_MBV2_7: Final = Space(
    name="mbv2-7",
    in_channels=3,
    num_classes=1000,
    resolution=224,
    stem_channels=32,
    stem_stride=2,
    fixed=(Layer(32, 16, 1),),
    layers=_stages(16, (32, 4, 2), (40, 4, 2), (80, 4, 2), (96, 4, 1), (192, 4, 2), (320, 1, 1)),
    operations=_SEVEN,
    head_channels=1280,
    activation="relu6",
)

_SPACES: Final[dict[str, Space]] = {
    space.name: space
    for space in (
        _MBV2_7,
        replace(
            _MBV2_7,
            name="mbv2-se-13",
            operations=_operations("e3k3 e3k5 e3k7 e6k3 e6k5 e6k7 e3k3s e3k5s e3k7s e6k3s e6k5s e6k7s id"),
            activation="hswish",
        ),
        Space(
            name="macro",
            in_channels=3,
            num_classes=10,
            resolution=32,
            stem_channels=32,
            stem_stride=1,
            fixed=(),
            layers=_stages(32, (64, 2, 2), (128, 3, 2), (256, 3, 2)),
            operations=_operations("id e3k3 e6k5"),
            head_channels=1280,
            activation="relu",
        ),
        Space(
            name="mini-28",
            in_channels=1,
            num_classes=10,
            resolution=28,
            stem_channels=16,
            stem_stride=1,
            fixed=(),
            layers=_stages(16, (24, 3, 2), (48, 4, 2), (96, 3, 1)),
            operations=_SEVEN,
            head_channels=256,
            activation="relu6",
        ),
        Space(
            name="mini-16",
            in_channels=1,
            num_classes=10,
            resolution=8,
            stem_channels=16,
            stem_stride=1,
            fixed=(),
            layers=_stages(16, (16, 2, 1), (24, 3, 2), (40, 3, 2)),
            operations=_SEVEN,
            head_channels=128,
            activation="relu6",
        ),
    )
}


def available_spaces() -> list[str]:
    """Names that ``get_space`` knows."""
    return list(_SPACES)


def get_space(
    name: str,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
    resolution: int | None = None,
    activation: str | None = None,
) -> Space:
    """Look a search space up, with some of its parameters changed where they are not None.

    Args:
        name: one of ``available_spaces()``.
        num_classes: classes of the classifier.
        in_channels: channels of the images.
        resolution: default height and width of the images in pixels.
        activation: ``relu``, ``relu6``, ``hswish`` or ``silu``.

    Raises:
        ValueError: if there is no such space, or a parameter is out of range.
        TypeError: if a count is not an integer.
    """
    if name not in _SPACES:
        raise ValueError(f"name: expected one of {', '.join(_SPACES)} (a search space), got {name!r}")
    changes: dict[str, Any] = {
        "num_classes": num_classes,
        "in_channels": in_channels,
        "resolution": resolution,
        "activation": activation,
    }
    return replace(_SPACES[name], **{key: value for key, value in changes.items() if value is not None})
