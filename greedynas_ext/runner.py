"""Runs the trie of a set of paths through the supernet's own modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from greedynas_ext.arguments import Chain, Operation
from greedynas_ext.fused_operation import Fused, hands_on
from greedynas_ext.intercept import Interceptor, Normalisation, Statistics
from greedynas_ext.isolation import version_of
from greedynas_ext.plan import STEM, Trie
from greedynas_ext.profile import Profile
from greedynas_ext.ranges import named
from greedynas_ext.work import Cost, Traffic

_ALONE = ("stem", "head")  # stages of one part


class _Readers:
    """Counts who still needs each storage: an operation may write into its input where nobody else reads that.

    Storages and not tensors are counted, since an output can be a view of an input, or the input itself.
    """

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, tensor: Tensor) -> None:
        self._counts[tensor.untyped_storage().data_ptr()] += 1

    def remove(self, tensor: Tensor) -> None:
        key = tensor.untyped_storage().data_ptr()
        self._counts[key] -= 1
        if self._counts[key] == 0:
            del self._counts[key]

    def of(self, tensor: Tensor) -> int:
        return self._counts[tensor.untyped_storage().data_ptr()]


class Runner:
    """Evaluates every unique prefix once, in the order of a traversal.

    Inside the supernet modules run under `interceptor`, with gradients off; an operation gets an input of its own
    where another reader of that input is still to come, so one that writes into its input harms nobody.
    """

    def __init__(
        self, chain: Chain, trie: Trie, modules: Sequence[nn.Module], interceptor: Interceptor, profile: Profile
    ) -> None:
        self._chain = chain
        self._trie = trie
        self._interceptor = interceptor
        self._profile = profile
        self._captured: dict[tuple[str, int], Statistics] = {}
        # An operation may return a buffer that its next call writes to again.
        self._owned = {
            tensor.untyped_storage().data_ptr()
            for module in modules
            for inner in module.modules()
            for tensor in (*inner._parameters.values(), *inner._buffers.values())
            if tensor is not None
        }
        # of one image, of the batch that ran last
        self.stem_cost = Cost(0, 0, 0)
        self.node_costs = [self.stem_cost] * len(trie.nodes)
        self.head_costs: dict[int, Cost] = {}

    def run(
        self,
        images: Tensor,
        traversal: str,
        normalisation: Normalisation,
        on_logits: Callable[[int, Tensor], None],
        safe_point: Callable[[], None],
        traffic: Traffic | None = None,
    ) -> None:
        """Calls `on_logits(leaf, logits [N, classes])` for each leaf of the trie.

        With `normalisation` "capture" the statistics of each node are kept, with "constants" those are used.
        `safe_point` is called before each operation and may raise. `traffic`, where it is active, counts bytes.
        """
        count = len(images)
        self._traffic = traffic
        readers = _Readers()
        readers.add(images)  # the caller's
        with self._interceptor:
            output, self.stem_cost = self._call(
                "stem",
                ("stem", STEM),
                self._chain.stem,
                images if only_reads(self._chain.stem) else images.clone(),
                normalisation,
                "supernet.stem",
            )
            # with what `version_of` said when they were made
            outputs: dict[int, tuple[Tensor, int]] = {STEM: (output, version_of(output))}
            readers.add(output)
            del output
            for number, frees_parent in self._trie.steps(traversal):
                safe_point()
                node = self._trie.nodes[number]
                operation = self._chain.choices[node.layer][node.op]
                source, version = outputs[node.parent]
                if version_of(source) != version:
                    raise RuntimeError(
                        f"{self._place(node.parent)}: expected an output of its own, got one that was written to while "
                        f"it was still needed; an operation that keeps its output's memory has to register it as a "
                        f"buffer"
                    )
                alone = frees_parent and readers.of(source) == 1
                output, self.node_costs[number] = self._call(
                    self._chain.stage(node.layer),
                    ("node", number),
                    operation,
                    self._given(operation, source, alone),
                    normalisation,
                    self._place(number),
                )
                if frees_parent:
                    del outputs[node.parent]
                    readers.remove(source)
                del source
                if node.layer + 1 < self._trie.num_layers:
                    outputs[number] = output, version_of(output)
                    readers.add(output)
                    del output
                    continue
                output = self._given(self._chain.head, output, not readers.of(output))
                logits, self.head_costs[number] = self._call(
                    "head", ("head", number), self._chain.head, output, normalisation, "supernet.head"
                )
                del output
                if logits.dim() != 2 or len(logits) != count or not logits.is_floating_point():
                    raise ValueError(
                        f"supernet.head: expected floating logits [{count}, classes], got "
                        f"{str(logits.dtype).removeprefix('torch.')} {list(logits.shape)}"
                    )
                # Logits are kept for a while, so they are not left in a tensor that others write to.
                on_logits(number, logits.clone() if readers.of(logits) else logits)
                del logits

    def _given(self, operation: Operation, source: Tensor, alone: bool) -> Tensor:
        """What an operation is given to read: `source`, or a copy where it may write to that and is not `alone`.

        Fused operations give maps whose channels are the fastest dimension. A module that was written for others may
        take views that are none of such a map.
        """
        if self._chain.partly_fused and not isinstance(operation, Fused) and not hands_on(operation):
            laid_out = source.contiguous()
            if laid_out is not source:
                return laid_out
        return source if alone or only_reads(operation) else source.clone()

    def _place(self, number: int) -> str:
        if number == STEM:
            return "supernet.stem"
        node = self._trie.nodes[number]
        return self._chain.place(node.layer, node.op)

    def _call(
        self,
        stage: str,
        key: tuple[str, int],
        operation: Operation,
        source: Tensor,
        normalisation: Normalisation,
        place: str,
    ) -> tuple[Tensor, Cost]:
        interceptor, traffic = self._interceptor, self._traffic
        interceptor.normalisation, interceptor.place = normalisation, place
        interceptor.macs = interceptor.macs_fused = 0
        interceptor.by_kernels = False
        interceptor.statistics = list(self._captured[key]) if normalisation == "constants" else []
        since, before = self._profile.now(), 0 if traffic is None else traffic.written
        with named(stage if stage in _ALONE else f"{stage}: {place}", source.device):
            output = call(operation, source, place)
        written = 0 if traffic is None else traffic.written - before
        if traffic is not None and isinstance(operation, Fused) and interceptor.by_kernels:
            written = operation.written(source, traffic.of_batch)
        if output.untyped_storage().data_ptr() in self._owned:
            output = output.clone()
        if normalisation == "capture":
            self._captured[key] = interceptor.statistics
        elif normalisation == "constants" and interceptor.statistics:
            raise RuntimeError(f"{place} normalised less often than it did on the calibration images")
        self._profile.add(stage, since, interceptor.macs, output.numel() * output.element_size(), place)
        counted = (interceptor.macs, interceptor.macs_fused, written, interceptor.by_kernels)
        return output, Cost.of_images(len(source), *counted)


def call(operation: Operation, source: Tensor, place: str) -> Tensor:
    """The output of `operation`; what fails names `place`.

    Raises:
        TypeError: where the output is no tensor.
        ValueError: where it is not of as many images as the input.
    """
    try:
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
    return output


def only_reads(operation: Operation) -> bool:
    """Whether an operation surely leaves its input alone: then it needs no copy of it."""
    if isinstance(operation, Fused):
        return True
    if not isinstance(operation, nn.Module) or "forward" in operation.__dict__:
        return False
    if operation._forward_pre_hooks or operation._forward_hooks:
        return False
    if type(operation) is nn.Sequential:
        # An identity hands its input on to the next module, which may write to it.
        for inner in operation:
            if not only_reads(inner):
                return False
            if not hands_on(inner):
                return True
        return True
    return type(operation) in (nn.Conv2d, nn.Identity)
