"""Runs the trie of a set of paths through the supernet's own modules."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from greedynas_ext.arguments import Chain, Operation
from greedynas_ext.intercept import Interceptor, Normalisation, Statistics
from greedynas_ext.plan import STEM, Trie


@dataclass(frozen=True)
class StageProfile:
    """What one stage ("stem", "layer 0", ..., "head", "loss") took, summed over batches.

    Attributes:
        seconds: wall time; on a GPU the device is synchronised around each operation for it.
        calls: operations run.
        macs: multiply-accumulates of convolutions, linear layers and matrix products.
        bytes: of the outputs that the stage's operations returned.
    """

    stage: str
    seconds: float
    calls: int
    macs: int
    bytes: int


class Profile:
    """Adds up `StageProfile`s in order of first appearance; does nothing unless `enabled`."""

    def __init__(self, enabled: bool, device: torch.device) -> None:
        self.enabled = enabled
        self._device = device
        self._totals: dict[str, list[float]] = defaultdict(lambda: [0.0, 0, 0, 0])

    def now(self) -> float:
        """Seconds on a monotonic clock, the device's work done."""
        if self.enabled and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def add(self, stage: str, since: float, macs: int, output_bytes: int) -> None:
        """One operation of `stage` has run since the time `since`."""
        if self.enabled:
            for slot, value in enumerate((self.now() - since, 1, macs, output_bytes)):
                self._totals[stage][slot] += value

    def stages(self) -> tuple[StageProfile, ...]:
        """The sums so far: stem, layers, head, loss."""
        return tuple(
            StageProfile(stage, seconds, int(calls), int(macs), int(size))
            for stage, (seconds, calls, macs, size) in self._totals.items()
        )


class Runner:
    """Evaluates every unique prefix once, in the order of a traversal.

    Inside the supernet modules run under `interceptor`, with gradients off; an operation gets an input of its own
    where another reader of that input is still to come, so one that writes into its input harms nobody.
    """

    def __init__(self, chain: Chain, trie: Trie, interceptor: Interceptor, profile: Profile) -> None:
        self._chain = chain
        self._trie = trie
        self._interceptor = interceptor
        self._profile = profile
        self._captured: dict[tuple[str, int], Statistics] = {}
        # per image, of the batch that ran last
        self.stem_macs = 0
        self.node_macs = [0] * len(trie.nodes)
        self.head_macs: dict[int, int] = {}

    def run(
        self,
        images: Tensor,
        traversal: str,
        normalisation: Normalisation,
        on_logits: Callable[[int, Tensor], None],
        safe_point: Callable[[], None],
    ) -> None:
        """Calls `on_logits(leaf, logits [N, classes])` for each leaf of the trie.

        With `normalisation` "capture" the statistics of each node are kept, with "constants" those are used.
        `safe_point` is called before each operation and may raise.
        """
        count = len(images)
        outputs: dict[int, Tensor] = {}
        # Nodes whose output is another node's tensor as well (an identity returns its input).
        shared: set[int] = set()
        with self._interceptor:
            stem_input = images if _only_reads(self._chain.stem) else images.clone()
            outputs[STEM], macs = self._call(
                "stem", ("stem", STEM), self._chain.stem, stem_input, normalisation, "supernet.stem"
            )
            self.stem_macs = macs // count
            for number, frees_parent in self._trie.steps(traversal):
                safe_point()
                node = self._trie.nodes[number]
                operation = self._chain.choices[node.layer][node.op]
                source = outputs[node.parent]
                alone = frees_parent and node.parent not in shared
                output, macs = self._call(
                    f"layer {node.layer}",
                    ("node", number),
                    operation,
                    source if alone or _only_reads(operation) else source.clone(),
                    normalisation,
                    f"supernet.choices[{node.layer}][{node.op}]",
                )
                self.node_macs[number] = macs // count
                if output is source and not alone:
                    shared.add(number)
                if frees_parent:
                    del outputs[node.parent]
                del source
                if node.layer + 1 < self._trie.num_layers:
                    outputs[number] = output
                    continue
                head_input = output.clone() if number in shared else output
                logits, macs = self._call(
                    "head", ("head", number), self._chain.head, head_input, normalisation, "supernet.head"
                )
                self.head_macs[number] = macs // count
                del output, head_input
                if logits.dim() != 2 or len(logits) != count or not logits.is_floating_point():
                    raise ValueError(
                        f"supernet.head: expected floating logits [{count}, classes], got "
                        f"{str(logits.dtype).removeprefix('torch.')} {list(logits.shape)}"
                    )
                on_logits(number, logits)

    def _call(
        self,
        stage: str,
        key: tuple[str, int],
        operation: Operation,
        source: Tensor,
        normalisation: Normalisation,
        place: str,
    ) -> tuple[Tensor, int]:
        interceptor = self._interceptor
        interceptor.normalisation, interceptor.place, interceptor.macs = normalisation, place, 0
        interceptor.statistics = list(self._captured[key]) if normalisation == "constants" else []
        since = self._profile.now()
        try:
            with record_function(f"greedynas: {place}"):
                output = operation(source)
        except Exception as error:
            error.add_note(f"while {place} ran on an input of shape {list(source.shape)}")
            raise
        if not isinstance(output, Tensor):
            raise TypeError(f"{place}: expected a forward that returns a tensor, got {type(output).__name__}")
        if output.dim() == 0 or len(output) != len(source):
            raise ValueError(
                f"{place}: expected an output for each of {len(source)} images, got shape {list(output.shape)}"
            )
        if normalisation == "capture":
            self._captured[key] = interceptor.statistics
        elif normalisation == "constants" and interceptor.statistics:
            raise RuntimeError(f"{place} normalised less often than it did on the calibration images")
        self._profile.add(stage, since, interceptor.macs, output.numel() * output.element_size())
        return output, interceptor.macs


def _only_reads(operation: Operation) -> bool:
    """Whether an operation surely leaves its input alone: then it needs no copy of it."""
    if not isinstance(operation, nn.Module) or operation._forward_pre_hooks or operation._forward_hooks:
        return False
    if type(operation) is nn.Sequential and len(operation) > 0:
        return _only_reads(operation[0])
    return type(operation) in (nn.Conv2d, nn.Identity)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one image: outputs that are alive at once by traversal, and what the largest operation works in."""

    depth_first: int
    layer_by_layer: int
    workspace: int

    def of(self, traversal: str) -> int:
        """Peak bytes for one image."""
        return self.workspace + (self.depth_first if traversal == "depth-first" else self.layer_by_layer)


def estimate_memory(chain: Chain, trie: Trie, interceptor: Interceptor, images: Tensor) -> MemoryEstimate:
    """Sizes measured by running each operation in use once, on at most two images."""
    probe = images[:2]
    sizes: list[int] = []
    largest_input = 0
    interceptor.largest_bytes = 0
    interceptor.normalisation = "running"

    def size(tensor: Tensor) -> int:
        return tensor.numel() * tensor.element_size()

    def run(operation: Operation, place: str, source: Tensor) -> Tensor:
        interceptor.place = place
        output = operation(source.clone())
        interceptor.largest_bytes = max(interceptor.largest_bytes, size(output))
        return output

    used: list[set[int]] = [set() for _ in chain.choices]
    for node in trie.nodes:
        used[node.layer].add(node.op)
    with interceptor:
        source = run(chain.stem, "supernet.stem", probe)
        sizes.append(size(source))
        for layer, ops in enumerate(used):
            largest_input = max(largest_input, size(source))
            results: Sequence[Tensor] = [
                run(chain.choices[layer][op], f"supernet.choices[{layer}][{op}]", source) for op in sorted(ops)
            ]
            source = results[0]
            sizes.append(max(map(size, results)))
        run(chain.head, "supernet.head", source)
    # An operation holds the copy of its input and, where a batch normalisation runs, two of its largest tensors.
    workspace = max(largest_input, size(source)) + 2 * interceptor.largest_bytes
    images_run = len(probe)
    return MemoryEstimate(
        depth_first=-(-trie.peak_bytes("depth-first", sizes) // images_run),
        layer_by_layer=-(-trie.peak_bytes("layer-by-layer", sizes) // images_run),
        workspace=-(-workspace // images_run),
    )
