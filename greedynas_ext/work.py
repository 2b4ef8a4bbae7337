"""What stem, operations and heads of a set of paths cost: multiply-accumulates, and bytes that they write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from greedynas_ext.plan import Trie


@dataclass(frozen=True)
class Cost:
    """Of one image: multiply-accumulates, those of them that fused kernels run, and bytes written to memory.

    `by_kernels`: whether fused kernels run it; pooling multiplies nothing.
    """

    macs: int
    fused: int
    written: int
    by_kernels: bool = False

    @classmethod
    def of_images(cls, count: int, macs: int, fused: int, written: int, by_kernels: bool) -> Cost:
        """Of one of `count` images that took that much."""
        return cls(macs // count, fused // count, written // count, by_kernels)


@dataclass(frozen=True)
class Work:
    """What the parts of an evaluation cost, each for one image.

    Attributes:
        stem: the stem.
        nodes: each node of the trie.
        heads: the head at each leaf, by its node.
        whole: whether the fused engine runs all of it, identities too.
    """

    stem: Cost
    nodes: list[Cost]
    heads: dict[int, Cost]
    whole: bool

    def macs(self, trie: Trie) -> tuple[int, int]:
        """Of one image: (computed, saved)."""
        heads = {leaf: cost.macs for leaf, cost in self.heads.items()}
        return trie.macs(self.stem.macs, [cost.macs for cost in self.nodes], heads)

    def macs_fused(self) -> int:
        """Of those computed, what fused kernels run."""
        return sum(cost.fused for cost in (self.stem, *self.nodes, *self.heads.values()))


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of the tensors that torch's operations write.

    Attributes:
        written: so far. A view writes nothing.
        of_batch: whether fused operations, which are not seen here, use the statistics of the batch.
    """

    def __init__(self, of_batch: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.written = 0
        self.of_batch = of_batch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        aliases = [returned.alias_info for returned in func._schema.returns]
        if all(alias is None or alias.is_write for alias in aliases):
            self.written += sum(leaf.nbytes for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        return output
