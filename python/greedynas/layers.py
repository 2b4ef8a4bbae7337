"""The vocabulary of search spaces: operations and the shapes of the layers that hold them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from greedynas_ext.checks import check_count

_BLOCK_NAME: Final = re.compile(r"e([1-9]\d*)k([1-9]\d*)(s?)")


@dataclass(frozen=True)
class Operation:
    """One alternative of a choice block.

    Args:
        name: ``e<expansion>k<kernel>`` with a trailing ``s`` for squeeze-excitation, or ``id``.
        expansion: hidden channels per input channel (1 for identity).
        kernel: odd kernel size of the depthwise convolution (1 for identity, a 1x1 convolution where shape changes).
        se: whether squeeze-excitation follows the depthwise convolution.
        identity: whether this is the identity operation.
    """

    name: str
    expansion: int
    kernel: int
    se: bool = False
    identity: bool = False

    def __post_init__(self) -> None:
        """Check that the name says what the fields say."""
        if self.identity:
            consistent = (self.name, self.expansion, self.kernel, self.se) == ("id", 1, 1, False)
        else:
            consistent = self.name == f"e{self.expansion}k{self.kernel}{'s' if self.se else ''}"
        if not consistent:
            raise ValueError(f"name: {self.name!r} does not describe {self}; use Operation.parse(name)")
        if self.expansion < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"operation {self.name!r}: expected expansion >= 1 and an odd kernel")

    @classmethod
    def parse(cls, name: str) -> Operation:
        """Read an operation from its name (``e6k3``, ``e3k5s``, ``id``).

        Raises:
            TypeError: if ``name`` is not a string.
            ValueError: if it is not of that form or its kernel is even.
        """
        if not isinstance(name, str):
            raise TypeError(f"name: expected an operation's name such as 'e3k5s' or 'id', got {type(name).__name__}")
        if name == "id":
            return cls("id", 1, 1, identity=True)
        match = _BLOCK_NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"name: expected 'e<expansion>k<kernel>', 'e<expansion>k<kernel>s' or 'id', got {name!r}")
        return cls(name, int(match[1]), int(match[2]), se=bool(match[3]))


@dataclass(frozen=True)
class Layer:
    """The shape of one layer: its channels and the stride (1 or 2 in the spaces here) of its operations."""

    in_channels: int
    out_channels: int
    stride: int

    def __post_init__(self) -> None:
        """Check that all three are positive integers."""
        for field in ("in_channels", "out_channels", "stride"):
            check_count(f"layer.{field}", getattr(self, field), 1)

    @property
    def keeps_shape(self) -> bool:
        """Whether input and output have the same shape, so that identity and residuals are free."""
        return self.stride == 1 and self.in_channels == self.out_channels
