"""The standalone network of one path, for retraining and use."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from greedynas.blocks import make_head, make_operation, make_stem, materialise
from greedynas.spaces import Space
from greedynas.supernet import Supernet


class Network(nn.Module):
    """One path of a space as a network of its own.

    Args:
        space: the search space.
        path: int64 ``[L]`` or L integers, one operation index per layer.
        seed: seed of the initial weights, the same on every run; None takes one from the operating system.
            The global random state is not touched.
        dropout: probability of dropping each of the classifier's inputs in training.

    Attributes:
        space: the search space.
        path: the path, L integers.
        stem: ``nn.Sequential``, images to the first block's input.
        blocks: ``nn.Sequential`` of the L chosen operations.
        head: ``nn.Sequential``, the last block's output to logits.

    Raises:
        TypeError, ValueError: if the path is not one of the space, as ``Space.check_path``.
        ValueError: if dropout is not in [0, 1).
    """

    def __init__(
        self, space: Space, path: Tensor | Sequence[int], *, seed: int | None = 0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        selected = space.check_path(path)
        with torch.device("meta"):  # skips the default initialisation, which would use the global random state
            operations = [
                make_operation(layer, space.operations[op], space)
                for layer, op in zip(space.layers, selected, strict=True)
            ]
            self._assemble(space, selected, make_stem(space), operations, make_head(space), dropout)
        materialise(self, seed)

    @classmethod
    def from_supernet(cls, supernet: Supernet, path: Tensor | Sequence[int], *, dropout: float = 0.0) -> Network:
        """Copy a path out of a supernet, weights, buffers, device, dtype and training flags included.

        The outputs are the supernet's for this path, bit for bit (without dropout), and later changes of one do not
        reach the other.

        Args:
            supernet: where the modules are copied from.
            path: int64 ``[L]`` or L integers, one operation index per layer.
            dropout: probability of dropping each of the classifier's inputs in training.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        network = cls.__new__(cls)
        nn.Module.__init__(network)
        network._assemble(
            supernet.space,
            supernet.space.check_path(path),
            copy.deepcopy(supernet.stem),
            [copy.deepcopy(operation) for operation in supernet.operations(path)],
            copy.deepcopy(supernet.head),
            dropout,
        )
        network.training = network.blocks.training = supernet.training
        return network

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, num_classes]`` of images ``[N, in_channels, H, W]``."""
        logits: Tensor = self.head(self.blocks(self.stem(images)))
        return logits

    def _assemble(
        self,
        space: Space,
        path: tuple[int, ...],
        stem: nn.Sequential,
        operations: list[nn.Module],
        head: nn.Sequential,
        dropout: float,
    ) -> None:
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
        self.space = space
        self.path = path
        self.stem = stem
        self.blocks = nn.Sequential(*operations)
        if dropout > 0.0:  # before the classifier, which keeps its name
            linear = head.get_submodule("linear")
            del head.linear
            head.dropout = nn.Dropout(dropout).train(head.training)
            head.linear = linear
        self.head = head
