"""The supernet: every operation of every layer, weights shared by all paths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from greedynas.blocks import make_head, make_operation, make_stem, materialise
from greedynas.spaces import Space


class Supernet(nn.Module):
    """A stem, layers that each hold alternative operations, and a head.

    Args:
        space: the search space.
        seed: seed of the initial weights, the same on every run; None takes one from the operating system.
            The global random state is not touched.

    Attributes:
        space: the search space.
        stem: ``nn.Sequential``, images to the first layer's input.
        choices: ``nn.ModuleList`` of ``nn.ModuleList``; ``choices[layer][op]`` is one operation.
        head: ``nn.Sequential``, the last layer's output to logits.
    """

    def __init__(self, space: Space, *, seed: int | None = 0) -> None:
        super().__init__()
        self.space = space
        with torch.device("meta"):  # skips the default initialisation, which would use the global random state
            self.stem = make_stem(space)
            self.choices = nn.ModuleList(
                nn.ModuleList(make_operation(layer, op, space) for op in space.operations) for layer in space.layers
            )
            self.head = make_head(space)
        materialise(self, seed)

    def forward(self, images: Tensor, path: Tensor | Sequence[int]) -> Tensor:
        """Run one path.

        Args:
            images: ``[N, in_channels, H, W]`` in the supernet's dtype.
            path: int64 ``[L]`` or L integers, one operation index per layer.

        Returns:
            Logits ``[N, num_classes]``.

        Raises:
            TypeError, ValueError: if the path is not one of the space, as ``Space.check_path``.
        """
        features: Tensor = self.stem(images)
        for operation in self.operations(path):
            features = operation(features)
        logits: Tensor = self.head(features)
        return logits

    def operations(self, path: Tensor | Sequence[int]) -> list[nn.Module]:
        """The L modules that a path selects, in order.

        Raises:
            TypeError, ValueError: if the path is not one of the space, as ``Space.check_path``.
        """
        selected = self.space.check_path(path)
        return [cast(nn.ModuleList, ops)[op] for ops, op in zip(self.choices, selected, strict=True)]
