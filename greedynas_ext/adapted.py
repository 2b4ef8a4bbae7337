"""What `adapt` returns: the view of a supernet that `evaluate_paths` takes."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from greedynas_ext.adapt_build import folded
from greedynas_ext.adapt_cut import Cut
from greedynas_ext.adapt_elastic import Elastic
from greedynas_ext.adapt_find import Traces
from greedynas_ext.adapt_parts import Part
from greedynas_ext.adapt_select import Selection, kept_attributes
from greedynas_ext.adapt_trace import Supernet
from greedynas_ext.adapt_verify import disagreement
from greedynas_ext.adapt_watch import Watch
from greedynas_ext.arguments import Chain

_VERIFIED_IMAGES = 2
_verifying = threading.Lock()  # a supernet's own forward may have to be switched for it


@dataclass(frozen=True)
class WholeSupernet(Chain):
    """A supernet that is evaluated by calling it for each path: one layer, whose operations are the paths."""

    call: Callable[[Sequence[int], Tensor], Tensor] | None = None
    paths: tuple[tuple[int, ...], ...] = ()
    module: nn.Module | None = None
    reason: str = ""

    def planned(self, paths: Tensor) -> tuple[Chain, Tensor]:
        """An operation for each of the different paths."""
        different = list(dict.fromkeys(map(tuple, paths.tolist())))
        calls = tuple(_PathCall(self.call, path, self.module) for path in different)  # type: ignore[arg-type]
        numbers = {path: number for number, path in enumerate(different)}
        layer = torch.tensor([[numbers[tuple(path)]] for path in paths.tolist()], dtype=torch.int64)
        identity = nn.Identity()
        chain = WholeSupernet(
            identity, (calls,), identity, (), self.options, False, self.call, tuple(different), self.module, self.reason
        )
        return chain, layer

    def nodes_per_column(self, nodes_per_layer: Sequence[int]) -> tuple[int, ...]:
        """Each path runs all of its layers."""
        return tuple(nodes_per_layer) * len(self.options)

    def stage(self, layer: int) -> str:
        """The name of the one layer."""
        return "paths"

    def place(self, layer: int, op: int) -> str:
        """The name of a path."""
        return f"supernet on path {list(self.paths[op])}"


class _PathCall:
    """Calls the supernet for one path. `evaluate_paths` finds the module here."""

    def __init__(self, call: Callable[[Sequence[int], Tensor], Tensor], path: tuple[int, ...], module: nn.Module):
        self._call, self._path, self.module = call, path, module

    def __call__(self, images: Tensor) -> Tensor:
        return self._call(self._path, images)


class AdaptedSupernet:
    """A supernet seen as a chain, or as something to be called path by path. Made by `adapt`.

    `evaluate_paths` takes it, with paths whose column l chooses among `options[l]`. Modules and weights are those of
    `module`.

    Attributes:
        module: the supernet.
        options: for each column of the paths what stands for its options: positions, keys or values of attributes.
            In an elastic network a column may decide in several layers, and several columns in one.
        reason: why the supernet is called path by path; None for a chain.
    """

    def __init__(
        self,
        supernet: Supernet,
        selection: Selection,
        traces: Traces,
        found: Cut | None,
        chain: Chain | None,
        reason: str | None,
        verify: bool,
        inlined: dict[str, tuple[Part, ...]] | None = None,
        elastic: Elastic | None = None,
    ) -> None:
        self.module = supernet.module
        self.options = selection.options
        self.reason = reason
        self._selection = selection
        self._verifies = verify
        self._unverified = reason is None
        self._elastic = elastic
        self._adapted_chain: Chain
        if elastic is not None:
            self._adapted_chain = elastic.chain
        elif chain is None:
            identity = nn.Identity()
            self._adapted_chain = WholeSupernet(
                identity, (), identity, (), selection.sizes, False, self.forward, (), self.module, reason or ""
            )
        else:
            self._adapted_chain = chain
        self._watch = Watch(supernet, selection, traces, found, inlined or {}) if elastic is None else None
        self._supernet = supernet

    def __repr__(self) -> str:
        how = "a chain" if self.reason is None else f"called path by path: {self.reason}"
        columns = "layers" if self._elastic is None else "choices"
        return f"AdaptedSupernet({type(self.module).__name__}, {len(self.options)} {columns}, {how})"

    @functools.cached_property
    def _folded(self) -> tuple[nn.Module, tuple[tuple[nn.Module, ...], ...], nn.Module]:
        if self.reason is not None:
            raise AttributeError(f"{type(self.module).__name__} is no chain: {self.reason}")
        if self._elastic is not None:
            raise AttributeError(f"{type(self.module).__name__} is elastic: its layers are no columns of a path")
        return folded(self._adapted_chain, len(self.options))

    @property
    def stem(self) -> nn.Module:
        """Images [N, C, H, W] to the input of the first layer."""
        return self._folded[0]

    @property
    def choices(self) -> tuple[tuple[nn.Module, ...], ...]:
        """`choices[layer][op]`, each with the fixed blocks that follow the layer."""
        return self._folded[1]

    @property
    def head(self) -> nn.Module:
        """The last layer's output to logits [N, classes]."""
        return self._folded[2]

    def encode(self, paths: Iterable[Sequence[Any]]) -> Tensor:
        """Paths as `evaluate_paths` takes them.

        Args:
            paths: m paths, each with one entry of `options[l]` for each layer l.

        Returns:
            int64 [m, layers].

        Raises:
            ValueError: naming the entry that is no option.
        """
        rows = []
        for number, path in enumerate(paths):
            if len(path) != len(self.options):
                raise ValueError(f"paths: expected {len(self.options)} options in path {number}, got {len(path)}")
            for layer, value in enumerate(path):
                if value not in self.options[layer]:
                    raise ValueError(
                        f"paths: expected one of {list(self.options[layer])} in layer {layer}, got {value!r} in path "
                        f"{number}"
                    )
            rows.append([options.index(value) for options, value in zip(self.options, path, strict=True)])
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), len(self.options))

    def forward(self, path: Sequence[int], images: Tensor) -> Tensor:
        """Logits of one path by the supernet's own forward; what chooses is afterwards as before.

        Not for a supernet that chooses by attributes while another thread uses it.
        """
        with kept_attributes(self.module):
            logits: Tensor = self._run(path, images)
        return logits

    def _run(self, path: Sequence[int], images: Any) -> Any:
        return self._supernet.pick(self._selection.run(self.module, images, path))

    def check_unchanged(self, paths: Tensor) -> None:
        """Raises RuntimeError where the supernet's structure, or what its forward does for `paths`, has changed."""
        if self._elastic is not None:
            self._elastic.check()
        elif self._watch is not None:
            self._watch.check(paths.tolist())

    def verify(self, images: Tensor) -> None:
        """Compares the chain, and what is recognised of it, with the supernet's own forward on a few of `images`.

        Args:
            images: floating [N, C, H, W] on the supernet's device; 2 are used.

        Raises:
            ValueError: with the path or the operation, and the difference.
        """
        if self.reason is not None:
            return
        if self._elastic is None:
            sizes = self._selection.sizes
            paths = [tuple((number + layer) % size for layer, size in enumerate(sizes)) for number in range(max(sizes))]
        else:
            paths = self._elastic.unverified()
        problem = disagreement(
            self.module,
            self._adapted_chain,
            paths,
            self._run,
            images[:_VERIFIED_IMAGES],
            keeps_state=self._unverified,
        )
        if problem is not None:
            raise ValueError(f"supernet: {problem}")
        self._unverified = False
        if self._elastic is not None:
            self._elastic.verified(paths)

    def before_batch(self, images: Tensor) -> None:
        """Verifies on the first batch that is evaluated, where that was asked for."""
        if not self._verifies:
            return
        with _verifying:
            if self._unverified or (self._elastic is not None and self._elastic.unverified()):
                self.verify(images)
