"""The fused engine: a chain whose parts are all recognised, evaluated by C++ kernels from the images to the losses.

The kernels (csrc/cpu) compute what the modules compute, in another order: of the maps inside a block none but the
depthwise convolution's output is stored (with known statistics for a few images at a time), statistics of a pointwise
convolution come from the moments of its input, and no Python runs between layers.
Weights are packed at each call, so a change of theirs, however it was made, is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from greedynas_ext import _library, arguments
from greedynas_ext.fused_chain import FusedChain
from greedynas_ext.isolation import held_interrupts
from greedynas_ext.plan import Trie
from greedynas_ext.profile import StageProfile
from greedynas_ext.ranges import named, profiling
from greedynas_ext.rows import Rows
from greedynas_ext.work import Cost, Work

OnScores: TypeAlias = Callable[[Sequence[int], Tensor, Tensor], None]

_SECONDS = 0.05  # for which the kernels work before an interrupt is looked for
# Of images and weights handed over.
_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.float32, "fp16": torch.float32}
_MAP_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}  # of a number in a map


class FusedEngine:
    """Evaluates the paths of `trie` on batches of images.

    Attributes:
        traversal: of the last batch.
        split: the most parts that a batch was evaluated in.
        kernels: what computes, in words.
        needs_batch: False: each batch normalisation has what its policy asks for.
        unfused: empty: nothing runs as a module.
    """

    needs_batch = False
    unfused: Mapping[str, str] = MappingProxyType({})

    def __init__(
        self,
        fused: FusedChain,
        trie: Trie,
        precision: str,
        bn: str,
        label_smoothing: float,
        max_memory: int | None,
        profile: bool,
    ) -> None:
        module = self._module()
        self._profiled = profile
        self._fused, self._trie, self._bn = fused, trie, bn
        self._label_smoothing, self._max_memory = label_smoothing, max_memory
        self._dtype, self._map_bytes = _DTYPES[precision], _MAP_BYTES[precision]
        self._statistics = module.Statistics
        self._leaves = [number for number, node in enumerate(trie.nodes) if node.layer == trie.num_layers - 1]
        self._stages = ["stem", *map(fused.chain.stage, range(trie.num_layers)), "head", "loss"]
        self._resolution = (0, 0)
        self.traversal, self.split = "depth-first", 1

        self._rows = Rows.of(fused, self._dtype)
        operations, eps = self._rows.arrays()
        numbers = {key: number for number, key in enumerate(fused.operations)}
        nodes = [(node.layer, numbers[node.layer, node.op], node.parent) for node in trie.nodes]
        self._evaluation: Any = module.ChainEvaluation(
            operations,
            eps,
            len(fused.stem.blocks),
            np.array(nodes, dtype=np.int32),
            self._rows.weight,
            self._rows.bias,
            fused.head.weight.shape[0],
            precision,
        )
        self._chosen: dict[tuple[Any, ...], tuple[str, int]] = {}
        with named("pack weights"):
            self._pack()
        self.kernels = f"fused, {self._evaluation.kernels}"

    def _module(self) -> Any:
        return _library.require_chain()

    def _pack(self) -> None:
        """Copies the weights."""
        self._evaluation.pack()

    def hold_weights(self) -> None:
        """From now on pack_again() reads the memory where the weights are now."""
        self._rows.hold()

    def pack_again(self) -> None:
        """Copies the weights as they are now; evaluations that follow are of them."""
        self._rows.refresh()
        self._pack()

    def reads_what(self, fused: FusedChain) -> bool:
        """Whether `fused` describes the operations, on the same memory, that this engine was made for."""
        return self._rows.reads_what(Rows.of(fused, self._dtype))

    def calibrate(self, images: Tensor) -> None:
        """One pass whose batch statistics become the constants of each node."""
        images = self._prepared("calibration", images)
        steps, _ = self._choose("calibration", images, self._statistics.CAPTURE)
        self._run(steps, images, None, self._statistics.CAPTURE)

    def evaluate(self, images: Tensor, targets: Tensor, on_scores: OnScores) -> list[int]:
        """Calls `on_scores(leaves, image_losses [leaves, n], correct [leaves])` for parts of n images; their sizes."""
        self._check_targets(targets)
        statistics = {
            "batch": self._statistics.BATCH,
            "running": self._statistics.RUNNING,
            "recalibrated": self._statistics.CONSTANTS,
        }[self._bn]
        images = self._prepared("images", images)
        steps, split = self._choose("images", images, statistics)
        self.split = max(self.split, split)
        sizes = []
        for part, part_targets in zip(images.tensor_split(split), targets.tensor_split(split), strict=True):
            on_scores(self._leaves, *self._run(steps, part, part_targets.contiguous(), statistics))
            sizes.append(len(part))
        return sizes

    def check_values(self, name: str, images: Tensor, targets: Tensor | None) -> None:
        """Raises ValueError for values that are not allowed in what is evaluated next."""
        arguments.check_values(name, images, targets)

    def check(self) -> None:
        """Raises what is known only when all is computed: nothing."""

    def macs(self) -> tuple[int, int]:
        """Of one image: (computed, saved)."""
        stem, nodes, head = self._fused.macs(self._trie, self._resolution)
        return self._trie.macs(stem, nodes, dict.fromkeys(self._leaves, head))

    def macs_fused(self) -> int:
        """Of those computed: all."""
        return self.macs()[0]

    def work(self, images: Tensor) -> Work:
        """What images of the size of `images` [N, C, H, W] cost; nothing is computed."""
        resolution = self._size("images", images)
        stem, nodes, head = self._fused.macs(self._trie, resolution)
        numbers = self._fused.numbers(self._trie, resolution, self._bn == "batch")

        def cost(macs: int, written: int) -> Cost:
            return Cost(macs, macs, written * self._map_bytes)

        return Work(
            cost(stem, numbers[0]),
            list(map(cost, nodes, numbers[1])),
            dict.fromkeys(self._leaves, cost(head, numbers[2])),
            whole=True,
        )

    def profile(self, images: int) -> tuple[StageProfile, ...]:
        """Time, operations and bytes by stage, over all batches; `images` in all."""
        stem, nodes, head = self._fused.macs(self._trie, self._resolution)
        layers = [0] * self._trie.num_layers
        for node, macs in zip(self._trie.nodes, nodes, strict=True):
            layers[node.layer] += macs
        work = [stem, *layers, head * len(self._leaves), 0]
        return tuple(
            StageProfile(name, seconds, calls, images * macs, size, parts)
            for name, (seconds, calls, size, parts), macs in zip(self._stages, self._times(), work, strict=True)
        )

    def _times(self) -> Sequence[tuple[float, int, int, dict[str, float]]]:
        """Seconds, calls and bytes of outputs, and seconds of parts, of each stage."""
        parts = self._module().STAGE_PARTS
        return [
            (seconds, calls, size, {part: time for part, time in zip(parts, times, strict=True) if time > 0})
            for seconds, calls, size, times in self._evaluation.times
        ]

    def _check_targets(self, targets: Tensor) -> None:
        classes = self._fused.head.weight.shape[0]
        if int(targets.max()) >= classes:
            raise ValueError(f"targets: expected classes below {classes} (the head's logits), got {int(targets.max())}")

    def _size(self, argument: str, images: Tensor) -> tuple[int, int]:
        """Height and width; raises ValueError for channels that are not the stem's."""
        channels = self._fused.stem.conv.shape[1]
        if images.shape[1] != channels:
            raise ValueError(f"{argument}: expected {channels} channels, got {list(images.shape)}")
        return images.shape[2], images.shape[3]

    def _prepared(self, argument: str, images: Tensor) -> Tensor:
        self._resolution = self._size(argument, images)
        if self._bn == "batch" or argument == "calibration":
            self._fused.check_single_values(argument, self._trie, len(images), self._resolution)
        return images.to(self._dtype)

    def _run(
        self, steps: np.ndarray[Any, Any], images: Tensor, targets: Tensor | None, statistics: Any
    ) -> tuple[Tensor, Tensor]:
        count = len(images)
        losses = torch.empty(len(self._leaves), count, dtype=self._dtype)
        correct = torch.empty(len(self._leaves), dtype=torch.int64)
        self._evaluation.start(
            steps,
            images.data_ptr(),
            [count, *self._resolution],
            list(images.stride()),
            0 if targets is None else targets.data_ptr(),
            self._label_smoothing,
            losses.data_ptr(),
            correct.data_ptr(),
            statistics,
        )
        with held_interrupts() as safe_point:
            if profiling():
                for name in self._step_names(steps):
                    with named(name):
                        self._evaluation.advance(0.0)
                    safe_point()
                return losses, correct
            while not self._evaluation.advance(_SECONDS):
                safe_point()
        return losses, correct

    def _step_names(self, steps: np.ndarray[Any, Any]) -> Iterator[str]:
        """Of what each advance(0) does: the stem, then a node of `steps` and, where a path ends, its head and loss."""
        chain, leaves = self._fused.chain, set(self._leaves)
        yield "stem"
        for number in steps[:, 0].tolist():
            node = self._trie.nodes[number]
            name = f"{chain.stage(node.layer)}: {chain.place(node.layer, node.op)}"
            yield f"{name}, head and loss" if number in leaves else name

    def _choose(self, argument: str, images: Tensor, statistics: Any) -> tuple[np.ndarray[Any, Any], int]:
        """Steps of the traversal, and in how many parts the images fit into `max_memory`; once for a size of images."""
        key = (argument, len(images), self._resolution, statistics)
        if key not in self._chosen:
            self._chosen[key] = self._fitting(argument, len(images), statistics)
        self.traversal, parts = self._chosen[key]
        return self._trie.step_array(self.traversal), parts

    def _fitting(self, argument: str, count: int, statistics: Any) -> tuple[str, int]:
        budget = self._max_memory
        orders = {name: self._trie.step_array(name) for name in ("depth-first", "layer-by-layer")}

        def needed(traversal: str, images_at_once: int) -> int:
            return int(self._evaluation.needed_bytes(orders[traversal], images_at_once, *self._resolution, statistics))

        if budget is None:
            free = self._free_memory()
            fits = free > 0 and needed("layer-by-layer", count) <= free
            return "layer-by-layer" if fits else "depth-first", 1
        for traversal in ("layer-by-layer", "depth-first"):
            if needed(traversal, count) <= budget:
                return traversal, 1
        may_split = argument == "images" and statistics in (self._statistics.RUNNING, self._statistics.CONSTANTS)
        if may_split and needed("depth-first", 1) <= budget:
            parts = next(n for n in range(2, count + 1) if needed("depth-first", -(-count // n)) <= budget)
            return "depth-first", parts
        smallest = needed("depth-first", 1 if may_split else count)
        advice = ""
        if argument == "calibration":
            advice = "; fewer calibration images need less"
        elif not may_split:
            advice = "; fewer images, or micro_batch=, which changes the statistics, need less"
        raise ValueError(f"max_memory: expected at least {smallest} bytes for these paths, got {budget}{advice}")

    def _free_memory(self) -> int:
        """Within which layer by layer is worth it where nobody says `max_memory`: on a CPU it never is."""
        return 0


def fused_precision(dtype: torch.dtype | None, precision: str | None, device: str) -> str:
    """In what the fused engine computes a supernet of `dtype`: "fp64", "fp32", "bf16", "fp16", or why it does not."""
    if precision is not None:
        return precision
    halves: dict[torch.dtype | None, str] = {torch.bfloat16: "bf16"}
    if device == "cuda":
        halves[torch.float16] = "fp16"
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return halves.get(dtype, f"autocast to {dtype} is not computed")
    known = {torch.float64: "fp64", torch.float32: "fp32", **halves}
    return known.get(dtype, f"a supernet of {dtype} is not computed")


def refused(images: object, precision: str, device: torch.device) -> str | None:
    """Why the fused engine is not used whatever the modules compute; None where nothing speaks against it.

    `device` is the supernet's.
    """
    if precision not in _DTYPES:
        return precision
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        return "a torch mode is active, which wants to see what the modules do"
    if isinstance(images, Tensor) and images.device != device:
        return f"images on {images.device}"
    if device.type not in ("cpu", "cuda"):
        return f"a supernet on {device}"
    if device.type == "cuda":
        return cuda_refused(precision, device)
    if not _library.ops_available():
        return "greedynas_ext._ops could not be loaded"
    return None


def cuda_refused(precision: str, device: torch.device) -> str | None:
    """Why the CUDA kernels are not used."""
    if not _library.cuda_available():
        return "greedynas_ext was built without CUDA kernels"
    if precision not in ("fp32", "bf16", "fp16"):
        return f"precision {precision} (the CUDA kernels compute in fp32, bf16 and fp16: precision='fp32')"
    capability = torch.cuda.get_device_capability(device)
    needed = (8, 0) if precision == "bf16" else (7, 5)
    if capability < needed:
        lower = "; fp32 and fp16 need 7.5" if precision == "bf16" else ""
        return (
            f"{precision} on a GPU of compute capability {capability[0]}.{capability[1]} (the CUDA kernels need "
            f"{needed[0]}.{needed[1]} for it{lower})"
        )
    return None


def release_memory() -> int:
    """Frees the working memory that evaluations by fused kernels keep for the next one, at most 1 GiB.

    Returns:
        How many bytes were freed.

    Raises:
        ImportError: if the native library is missing.
    """
    return int(_library.require_chain().release_memory())
