"""How many bytes of activations an evaluation needs: measured on one and two images, for any number of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from greedynas_ext.arguments import Chain, Operation
from greedynas_ext.intercept import Interceptor
from greedynas_ext.plan import Trie
from greedynas_ext.runner import call, only_reads

# What the loss of one image and path takes beside its logits: losses, in float64 for their sum too.
_LOSS_BYTES = 32


@dataclass(frozen=True)
class Demand:
    """Bytes as a function of the number of images: `fixed + images * per_image`."""

    fixed: int
    per_image: int


@dataclass(frozen=True)
class MemoryEstimate:
    """An upper bound of the tensors alive at once while a batch is evaluated, images and results left out.

    Attributes:
        alive: per traversal, bytes of one image in outputs of stem and operations.
        work: what an operation allocates beside its output, a copy of its input included; the largest.
        scoring: bytes for one image while one path's loss is computed.
    """

    alive: dict[str, int]
    work: Demand
    scoring: int

    def needed(self, traversal: str, images: int) -> int:
        """Bytes for that many images, losses computed path by path."""
        return self.work.fixed + images * self.needed_per_image(traversal)

    def needed_per_image(self, traversal: str) -> int:
        """What each further image adds."""
        return self.alive[traversal] + self.work.per_image + self.scoring

    def images_within(self, traversal: str, budget: int) -> int:
        """How many images fit."""
        return max(0, budget - self.work.fixed) // self.needed_per_image(traversal)


def estimate_memory(
    chain: Chain,
    trie: Trie,
    interceptor: Interceptor,
    images: Tensor,
    safe_point: Callable[[], None],
) -> MemoryEstimate:
    """Measures each operation in use on the first two of `images`, in the dtype in which they are evaluated.

    Outputs of a layer are taken to be as large as the largest, and the first operation's feeds the next layer. What
    a kernel allocates inside itself is not seen.
    """
    used: list[set[int]] = [set() for _ in chain.choices]
    for node in trie.nodes:
        used[node.layer].add(node.op)
    sizes: list[int] = []
    fixed, per_image = 0, 0

    def measure(operation: Operation, place: str, sources: list[Tensor]) -> tuple[list[Tensor], int]:
        nonlocal fixed, per_image
        safe_point()
        interceptor.place = place
        outputs, demand, size = _measure(operation, place, sources, copied=not only_reads(operation))
        fixed, per_image = max(fixed, demand.fixed), max(per_image, demand.per_image)
        return outputs, size

    interceptor.normalisation = "probe"
    with interceptor:
        sources, size = measure(chain.stem, "supernet.stem", [images[:count] for count in (1, 2)[: len(images)]])
        sizes.append(size)
        for layer, ops in enumerate(used):
            following: list[Tensor] = []
            sizes.append(0)
            for op in sorted(ops):
                outputs, size = measure(chain.choices[layer][op], f"supernet.choices[{layer}][{op}]", sources)
                following = following or outputs
                sizes[-1] = max(sizes[-1], size)
                del outputs
            sources = following
        _, logits_size = measure(chain.head, "supernet.head", sources)
    alive = {traversal: trie.peak_bytes(traversal, sizes) for traversal in ("depth-first", "layer-by-layer")}
    # Logits are gathered and stacked.
    return MemoryEstimate(alive, Demand(fixed, per_image), 2 * logits_size + _LOSS_BYTES)


def _measure(operation: Operation, place: str, sources: list[Tensor], copied: bool) -> tuple[list[Tensor], Demand, int]:
    """(outputs, what is allocated beside them, bytes of an output for one image) from inputs of 1 and 2 images."""
    outputs: list[Tensor] = []
    recorders: list[_Recorder] = []
    own: set[int] = set()
    for source in sources:
        recorder = _Recorder()
        recorders.append(recorder)
        with recorder:
            outputs.append(call(operation, source.clone() if copied else source, place))
        own.add(recorder.number_of(outputs[-1]))
        recorder.close()
    small, large = recorders[0], recorders[-1]
    size = -(-outputs[-1].untyped_storage().nbytes() // len(sources))
    if len(sources) == 1 or small.events != large.events or len(own) > 1:
        peaks = [recorder.peak(recorder.sizes, own) for recorder in recorders]
        return outputs, Demand(0, max(-(-peak // count) for count, peak in enumerate(peaks, 1))), size
    slopes = [max(0, two - one) for one, two in zip(small.sizes, large.sizes, strict=True)]
    constants = [max(0, one - slope) for one, slope in zip(small.sizes, slopes, strict=True)]
    return outputs, Demand(large.peak(constants, own), large.peak(slopes, own)), size


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down the storages that operations allocate, and when each comes and goes.

    Attributes:
        sizes: bytes of each storage, in order of allocation.
        events: `i` where storage i is allocated, `~i` where it is freed.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: list[int] = []
        self.events: list[int] = []
        self._numbers: dict[int, int] = {}
        self._earlier: list[Any] = []  # storages that were there before; kept, so that no other takes their address
        self._finalizers: list[Any] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage())._cdata not in self._numbers:
                self._numbers[storage._cdata] = -1
                self._earlier.append(storage)
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage())._cdata not in self._numbers:
                number = len(self.sizes)
                self._numbers[storage._cdata] = number
                self.sizes.append(storage.nbytes())
                self.events.append(number)
                self._finalizers.append(weakref.finalize(storage, self._freed, storage._cdata))
        return output

    def _freed(self, key: int) -> None:
        self.events.append(~self._numbers.pop(key))

    def number_of(self, tensor: Tensor) -> int:
        """Which storage `tensor` has; -1 for one that was there before."""
        return self._numbers.get(tensor.untyped_storage()._cdata, -1)

    def close(self) -> None:
        """Stops watching what is still there."""
        for finalizer in self._finalizers:
            finalizer.detach()
        self._earlier.clear()

    def peak(self, sizes: list[int], left_out: set[int]) -> int:
        """Most bytes alive at once if the storages had `sizes`, some of them left out."""
        alive, most = 0, 0
        for event in self.events:
            number = event if event >= 0 else ~event
            if number not in left_out:
                alive += sizes[number] if event >= 0 else -sizes[number]
                most = max(most, alive)
        return most
