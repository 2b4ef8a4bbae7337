"""Architectures published with "GreedyNAS: Towards Fast One-Shot NAS with Greedy Supernet" (CVPR 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

#: The space that these architectures are paths of.
PUBLISHED_SPACE: Final = "mbv2-se-13"

#: Operation names, one per layer; ``get_space(PUBLISHED_SPACE).encode(names)`` gives the path.
PUBLISHED: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        name: tuple(names.split())
        for name, names in {
            "GreedyNAS-A": (
                "e3k5s e3k3 id e3k3s  e3k5 e3k7 e6k3s e6k5s  e3k5s e3k7s e6k7 e3k5  "
                "e3k5s e3k3s e6k3 e3k7s  e3k7s e6k7s e3k5 e6k3s  e6k7s"
            ),
            "GreedyNAS-B": (
                "e3k5s e3k5s e3k5s id  e3k5s e3k7s e3k5s e3k3  e6k5 id e3k7s e3k7s  "
                "e3k3s e3k5 e3k5 e3k7s  e6k5s e3k7s e3k3s e3k7s  e6k7s"
            ),
            "GreedyNAS-C": (
                "e3k7 id id e3k3s  e3k5s id e3k3s e3k3s  e3k7s e6k5s e3k5s id  "
                "e3k5s e3k5 e6k3 e3k7  e3k5s e3k3 e3k7s e3k5  e6k7s"
            ),
        }.items()
    }
)
