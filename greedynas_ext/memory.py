"""How many bytes of activations an evaluation needs: measured on one and two images, for any number of them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
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
        scoring: bytes for one image while one path's loss is computed, and for the image itself where it is cast.
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
    cast: Callable[[Tensor], Tensor],
    fits_one: Callable[[MemoryEstimate], bool],
    safe_point: Callable[[], None],
) -> MemoryEstimate:
    """Measures each operation in use on one of `images`, and on two, unless there shall be one at a time.

    `cast` is what images undergo before they are evaluated; `fits_one` looks at the estimate after one image. Outputs
    of a layer are taken to be as large as the largest, and the first operation's feeds the next layer. What a kernel
    allocates inside itself is not seen.
    """
    interceptor.normalisation = "probe"

    def record(count: int) -> list[_Recording]:
        with interceptor:
            return _record(chain, trie, interceptor, cast(images[:count]), safe_point)

    def estimate(recordings: Sequence[list[_Recording]]) -> MemoryEstimate:
        demands = [_demand(calls) for calls in zip(*recordings, strict=True)]
        work = Demand(max(demand.fixed for demand in demands), max(demand.per_image for demand in demands))
        sizes = [0] * (trie.num_layers + 1)
        for recording in recordings[-1][:-1]:
            per_image = -(-recording.output_bytes // len(recordings))
            sizes[recording.stage] = max(sizes[recording.stage], per_image)
        logits = -(-recordings[-1][-1].output_bytes // len(recordings))
        alive = {traversal: trie.peak_bytes(traversal, sizes) for traversal in ("depth-first", "layer-by-layer")}
        evaluated = cast(images[:1])
        casting = 0 if evaluated.dtype == images.dtype else evaluated.nbytes
        # Logits are gathered and stacked.
        return MemoryEstimate(alive, work, 2 * logits + _LOSS_BYTES + casting)

    recordings = [record(1)]
    of_one = estimate(recordings)
    if len(images) == 1 or fits_one(of_one):
        return of_one
    return estimate([*recordings, record(2)])


@dataclass(frozen=True)
class _Recording:
    """What one call of an operation allocated; `output` is the number of its output's storage, or -1."""

    stage: int  # 0: the stem; then the layers
    sizes: list[int]
    events: list[int]
    output: int
    output_bytes: int

    def peak(self, sizes: Sequence[int]) -> int:
        """Most bytes alive at once beside the output if the storages had `sizes`."""
        alive, most = 0, 0
        for event in self.events:
            number = event if event >= 0 else ~event
            if number != self.output:
                alive += sizes[number] if event >= 0 else -sizes[number]
                most = max(most, alive)
        return most


def _demand(calls: Sequence[_Recording]) -> Demand:
    """From the same call on one image and, where that was measured, on two."""
    one, last = calls[0], calls[-1]
    if len(calls) == 1 or one.events != last.events or one.output != last.output:
        return Demand(0, max(-(-one.peak(one.sizes) // count) for count, one in enumerate(calls, 1)))
    slopes = [max(0, large - small) for small, large in zip(one.sizes, last.sizes, strict=True)]
    constants = [max(0, small - slope) for small, slope in zip(one.sizes, slopes, strict=True)]
    return Demand(last.peak(constants), last.peak(slopes))


def _record(
    chain: Chain, trie: Trie, interceptor: Interceptor, images: Tensor, safe_point: Callable[[], None]
) -> list[_Recording]:
    """A recording of stem, operations in use, and head, in this order."""
    recordings: list[_Recording] = []

    def record(stage: int, operation: Operation, place: str, source: Tensor) -> Tensor:
        safe_point()
        interceptor.place = place
        recorder = _Recorder()
        with recorder:
            output = call(operation, source if only_reads(operation) else source.clone(), place)
        recordings.append(recorder.close(stage, output))
        return output

    used: list[set[int]] = [set() for _ in chain.choices]
    for node in trie.nodes:
        used[node.layer].add(node.op)
    features = record(0, chain.stem, "supernet.stem", images)
    for layer, ops in enumerate(used):
        first, *others = sorted(ops)
        for op in others:
            record(layer + 1, chain.choices[layer][op], chain.place(layer, op), features)
        # Last, so that no more is alive here than in an evaluation.
        features = record(layer + 1, chain.choices[layer][first], chain.place(layer, first), features)
    record(len(used) + 1, chain.head, "supernet.head", features)
    return recordings


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down the storages that operations allocate, and when each comes and goes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._sizes: list[int] = []
        self._events: list[int] = []  # i: storage i is allocated; ~i: it is freed
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
                number = len(self._sizes)
                self._numbers[storage._cdata] = number
                self._sizes.append(storage.nbytes())
                self._events.append(number)
                self._finalizers.append(weakref.finalize(storage, self._freed, storage._cdata))
        return output

    def _freed(self, key: int) -> None:
        self._events.append(~self._numbers.pop(key))

    def close(self, stage: int, output: Tensor) -> _Recording:
        """Stops watching what is still there."""
        for finalizer in self._finalizers:
            finalizer.detach()
        storage = output.untyped_storage()
        number = self._numbers.get(storage._cdata, -1)
        return _Recording(stage, self._sizes, self._events, number, storage.nbytes())
