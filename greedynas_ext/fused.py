"""The fused engine: a chain whose parts are all recognised, evaluated by C++ kernels from the images to the losses.

The kernels (csrc/cpu) compute what the modules compute, in another order: no map between the convolutions of a block
is stored, statistics of a pointwise convolution come from the moments of its input, and no Python runs between layers.
Weights are packed at each call, so a change of theirs, however it was made, is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from greedynas_ext import _library
from greedynas_ext.arguments import Chain
from greedynas_ext.block_layout import ACTIVATIONS, GATES, KINDS
from greedynas_ext.isolation import held_interrupts
from greedynas_ext.packing import (
    BatchNormWeights,
    ConvBNWeights,
    IdentityWeights,
    InvertedBottleneckWeights,
    OperationWeights,
)
from greedynas_ext.plan import STEM, Trie
from greedynas_ext.recognise import (
    HeadWeights,
    StemWeights,
    Unrecognised,
    recognise_head,
    recognise_operation,
    recognise_stem,
)
from greedynas_ext.runner import StageProfile

OnScores: TypeAlias = Callable[[Sequence[int], Tensor, Tensor], None]

_SECONDS = 0.05  # for which the kernels work before an interrupt is looked for
_DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.float32}  # of images and weights handed over


@dataclass(frozen=True)
class FusedChain:
    """The parts of a chain that a set of paths uses, described; `operations` by (layer, operation)."""

    stem: StemWeights
    operations: dict[tuple[int, int], OperationWeights]
    head: HeadWeights

    @classmethod
    def of(cls, chain: Chain, trie: Trie) -> FusedChain | str:
        """The description, or why there is none."""
        stem = recognise_stem(chain.stem)
        if isinstance(stem, Unrecognised):
            return f"supernet.stem: {stem.reason}"
        channels = stem.blocks[-1].project.shape[0] if stem.blocks else stem.conv.shape[0]
        widths = [int(channels)] + [0] * trie.num_layers
        operations: dict[tuple[int, int], OperationWeights] = {}
        for layer, op in sorted({(node.layer, node.op) for node in trie.nodes}):
            place = f"supernet.choices[{layer}][{op}]"
            operation = recognise_operation(chain.choices[layer][op], widths[layer])
            if isinstance(operation, Unrecognised):
                return f"{place}: {operation.reason}"
            into, out, _ = _shape(operation)
            if into != widths[layer]:
                return f"{place}: takes {into} channels where there are {widths[layer]}"
            if widths[layer + 1] not in (0, out):
                return f"{place}: gives {out} channels where another operation gives {widths[layer + 1]}"
            widths[layer + 1] = out
            operations[layer, op] = operation
        head = recognise_head(chain.head)
        if isinstance(head, Unrecognised):
            return f"supernet.head: {head.reason}"
        if head.conv.shape[1] != widths[-1]:
            return f"supernet.head: takes {head.conv.shape[1]} channels where there are {widths[-1]}"
        strides = {(layer, _shape(operation)[2]) for (layer, _), operation in operations.items()}
        if len(strides) != trie.num_layers:
            return "supernet.choices: a layer's operations differ in their stride"
        return cls(stem, operations, head)

    def lacks_running_statistics(self) -> bool:
        """Whether a batch normalisation stores none."""
        blocks = [*self.stem.blocks, *self.operations.values()]
        norms = [self.stem.bn, self.head.bn, *(norm for block in blocks for norm in _norms(block) if norm is not None)]
        return any(norm.running_mean is None or norm.running_var is None for norm in norms)


def _shape(operation: OperationWeights) -> tuple[int, int, int]:
    """Channels in, channels out, stride."""
    if isinstance(operation, IdentityWeights):
        return operation.channels, operation.channels, 1
    if isinstance(operation, ConvBNWeights):
        return operation.weight.shape[1], operation.weight.shape[0], operation.stride
    first = operation.depthwise if operation.expand is None else operation.expand
    into = first.shape[0] if operation.expand is None else first.shape[1]
    return into, operation.project.shape[0], operation.stride


def _norms(
    operation: OperationWeights,
) -> tuple[BatchNormWeights | None, BatchNormWeights | None, BatchNormWeights | None]:
    """After expand, depthwise and project."""
    if isinstance(operation, IdentityWeights):
        return None, None, None
    if isinstance(operation, ConvBNWeights):
        return None, None, operation.bn
    return operation.expand_bn, operation.depthwise_bn, operation.project_bn


class _Rows:
    """Descriptions as csrc/cpu/chain_module.cpp reads them, and the tensors whose addresses stand in them."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.kept: list[Tensor] = []
        self.rows: list[list[int]] = []
        self.eps: list[tuple[float, ...]] = []

    def address(self, tensor: Tensor | None) -> int:
        """Of the tensor's values, contiguous and of the dtype that the kernels read; 0 for None."""
        if tensor is None:
            return 0
        if tensor.dtype != self._dtype or not tensor.is_contiguous():
            tensor = tensor.detach().to(self._dtype).contiguous()
        self.kept.append(tensor)
        return tensor.data_ptr()

    def convolution(self, weight: Tensor, stride: int, activation: str, bn: BatchNormWeights) -> None:
        """A dense convolution with BatchNorm."""
        out, into, kernel = weight.shape[0], weight.shape[1], weight.shape[2] if weight.dim() == 4 else 1
        shape = [KINDS["conv_bn"], into, 0, out, kernel, stride, ACTIVATIONS[activation], 0, 0, 0]
        self._add(shape, [None] * 6 + [weight], (None, None, bn))

    def operation(self, operation: OperationWeights) -> None:
        """A choice."""
        into, out, stride = _shape(operation)
        if isinstance(operation, IdentityWeights):
            self._add([KINDS["identity"], into, 0, out, 1, 1, 0, 0, 0, 0], [None] * 7, (None, None, None))
        elif isinstance(operation, ConvBNWeights):
            self.convolution(operation.weight, stride, operation.activation, operation.bn)
        else:
            self._bottleneck(operation)

    def _bottleneck(self, block: InvertedBottleneckWeights) -> None:
        into, out, stride = _shape(block)
        hidden, kernel = block.depthwise.shape[0], block.depthwise.shape[2]
        se = block.squeeze_excitation
        squeezed, gate = (0, 0) if se is None else (se.reduce_weight.shape[0], GATES[se.gate])
        activation = ACTIVATIONS[block.activation]
        shape = [KINDS["inverted_bottleneck"], into, hidden, out, kernel, stride, activation]
        excitation: list[Tensor | None] = [None] * 4
        if se is not None:
            excitation = [se.reduce_weight, se.reduce_bias, se.expand_weight, se.expand_bias]
        weights = [block.expand, block.depthwise, *excitation, block.project]
        self._add([*shape, squeezed, gate, int(block.residual)], weights, _norms(block))

    def _add(
        self, shape: list[int], weights: Sequence[Tensor | None], norms: Sequence[BatchNormWeights | None]
    ) -> None:
        row = [*shape, *map(self.address, weights)]
        for norm in norms:
            parts = (None,) * 4 if norm is None else (norm.weight, norm.bias, norm.running_mean, norm.running_var)
            row += map(self.address, parts)
        self.rows.append(row)
        self.eps.append(tuple(0.0 if norm is None else norm.eps for norm in norms))


class FusedEngine:
    """Evaluates the paths of `trie` on batches of images.

    Attributes:
        traversal: of the last batch.
        split: the most parts that a batch was evaluated in.
        kernels: what computes, in words.
        needs_batch: False: each batch normalisation has what its policy asks for.
    """

    needs_batch = False

    def __init__(
        self,
        fused: FusedChain,
        trie: Trie,
        precision: str,
        bn: str,
        label_smoothing: float,
        max_memory: int | None,
    ) -> None:
        module = _library.require_chain()
        self._fused, self._trie, self._bn = fused, trie, bn
        self._label_smoothing, self._max_memory = label_smoothing, max_memory
        self._dtype = _DTYPES[precision]
        self._statistics = module.Statistics
        self._leaves = [number for number, node in enumerate(trie.nodes) if node.layer == trie.num_layers - 1]
        self._resolution = (0, 0)
        self.traversal, self.split = "depth-first", 1

        rows = _Rows(self._dtype)
        rows.convolution(fused.stem.conv, fused.stem.stride, fused.stem.activation, fused.stem.bn)
        rows.convolution(fused.head.conv, 1, fused.head.activation, fused.head.bn)
        for block in fused.stem.blocks:
            rows.operation(block)
        numbers = {key: number for number, key in enumerate(fused.operations)}
        for operation in fused.operations.values():
            rows.operation(operation)
        nodes = [(node.layer, numbers[node.layer, node.op], node.parent) for node in trie.nodes]
        self._evaluation: Any = module.ChainEvaluation(
            np.array(rows.rows, dtype=np.int64),
            np.array(rows.eps, dtype=np.float64),
            len(fused.stem.blocks),
            np.array(nodes, dtype=np.int32),
            rows.address(fused.head.weight),
            rows.address(fused.head.bias),
            fused.head.weight.shape[0],
            precision,
        )
        self._evaluation.pack()
        del rows  # the weights are copied: nothing of the supernet is held
        self.kernels = f"fused, {self._evaluation.kernels}"

    def calibrate(self, images: Tensor) -> None:
        """One pass whose batch statistics become the constants of each node."""
        images = self._prepared("calibration", images)
        steps, _ = self._choose("calibration", images, self._statistics.CAPTURE)
        self._run(steps, images, None, self._statistics.CAPTURE)

    def evaluate(self, images: Tensor, targets: Tensor, on_scores: OnScores) -> list[int]:
        """Calls `on_scores(leaves, image_losses [leaves, n], correct [leaves])` for parts of n images; their sizes."""
        classes = self._fused.head.weight.shape[0]
        if int(targets.max()) >= classes:
            raise ValueError(f"targets: expected classes below {classes} (the head's logits), got {int(targets.max())}")
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

    def macs(self) -> tuple[int, int]:
        """Of one image: (computed, saved)."""
        stem, nodes, head = self._macs_of_parts()
        return self._trie.macs(stem, nodes, dict.fromkeys(self._leaves, head))

    def profile(self, images: int) -> tuple[StageProfile, ...]:
        """Time, operations and bytes by stage, over all batches; `images` in all."""
        stem, nodes, head = self._macs_of_parts()
        layers = [0] * self._trie.num_layers
        for node, macs in zip(self._trie.nodes, nodes, strict=True):
            layers[node.layer] += macs
        names = ["stem", *(f"layer {layer}" for layer in range(len(layers))), "head", "loss"]
        work = [stem, *layers, head * len(self._leaves), 0]
        return tuple(
            StageProfile(name, seconds, calls, images * macs, size)
            for name, (seconds, calls, size), macs in zip(names, self._evaluation.times, work, strict=True)
        )

    def _prepared(self, argument: str, images: Tensor) -> Tensor:
        channels = self._fused.stem.conv.shape[1]
        if images.shape[1] != channels:
            raise ValueError(f"{argument}: expected {channels} channels, got {list(images.shape)}")
        self._resolution = (images.shape[2], images.shape[3])
        if self._bn == "batch" or argument == "calibration":
            self._check_single_values(argument, len(images))
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
            while not self._evaluation.advance(_SECONDS):
                safe_point()
        return losses, correct

    def _choose(self, argument: str, images: Tensor, statistics: Any) -> tuple[np.ndarray[Any, Any], int]:
        """Steps of the traversal, and in how many parts the images fit into `max_memory`."""
        budget, count = self._max_memory, len(images)
        orders = {name: self._trie.step_array(name) for name in ("depth-first", "layer-by-layer")}

        def needed(traversal: str, images_at_once: int) -> int:
            return int(self._evaluation.needed_bytes(orders[traversal], images_at_once, *self._resolution, statistics))

        self.traversal = "depth-first"
        if budget is None:
            return orders["depth-first"], 1
        for traversal in ("layer-by-layer", "depth-first"):
            if needed(traversal, count) <= budget:
                self.traversal = traversal
                return orders[traversal], 1
        may_split = argument == "images" and statistics in (self._statistics.RUNNING, self._statistics.CONSTANTS)
        if may_split and needed("depth-first", 1) <= budget:
            parts = next(n for n in range(2, count + 1) if needed("depth-first", -(-count // n)) <= budget)
            return orders["depth-first"], parts
        smallest = needed("depth-first", 1 if may_split else count)
        advice = ""
        if argument == "calibration":
            advice = "; fewer calibration images need less"
        elif not may_split:
            advice = "; fewer images, or micro_batch=, which changes the statistics, need less"
        raise ValueError(f"max_memory: expected at least {smallest} bytes for these paths, got {budget}{advice}")

    def _walk(self) -> tuple[tuple[int, int], list[tuple[int, int]]]:
        """Height and width of the stem's output and of each node's."""
        fused = self._fused
        stem = _after(self._resolution, fused.stem.stride)
        for block in fused.stem.blocks:
            stem = _after(stem, block.stride)
        sizes: list[tuple[int, int]] = []
        for node in self._trie.nodes:
            into = stem if node.parent == STEM else sizes[node.parent]
            sizes.append(_after(into, _shape(fused.operations[node.layer, node.op])[2]))
        return stem, sizes

    def _macs_of_parts(self) -> tuple[int, list[int], int]:
        """Of one image: the stem, each node, a head."""
        fused = self._fused
        size = _after(self._resolution, fused.stem.stride)
        stem = size[0] * size[1] * fused.stem.conv.numel()
        for block in fused.stem.blocks:
            stem += _bottleneck_macs(block, size)
            size = _after(size, block.stride)
        _, sizes = self._walk()
        nodes = []
        for node in self._trie.nodes:
            operation = fused.operations[node.layer, node.op]
            into = size if node.parent == STEM else sizes[node.parent]
            if isinstance(operation, IdentityWeights):
                nodes.append(0)
            elif isinstance(operation, ConvBNWeights):
                height, width = _after(into, operation.stride)
                nodes.append(height * width * operation.weight.numel())
            else:
                nodes.append(_bottleneck_macs(operation, into))
        height, width = sizes[self._leaves[0]]
        return stem, nodes, height * width * fused.head.conv.numel() + fused.head.weight.numel()

    def _check_single_values(self, argument: str, count: int) -> None:
        """Batch statistics of a single value per channel are refused, as torch does."""
        fused = self._fused

        def check(place: str, size: tuple[int, int], channels: int) -> None:
            if count * size[0] * size[1] == 1:
                raise ValueError(
                    f"{argument}: a batch normalisation in {place} sees a single value per channel (its input is "
                    f"{[1, channels, 1, 1]}), whose variance is no statistic; expected more images or a larger "
                    f"resolution, or bn='running'"
                )

        size = _after(self._resolution, fused.stem.stride)
        check("supernet.stem", size, fused.stem.conv.shape[0])
        for block in fused.stem.blocks:
            size = _after(size, block.stride)
            check("supernet.stem", size, block.project.shape[0])
        _, sizes = self._walk()
        for node, out in zip(self._trie.nodes, sizes, strict=True):
            operation = fused.operations[node.layer, node.op]
            if not isinstance(operation, IdentityWeights):
                check(f"supernet.choices[{node.layer}][{node.op}]", out, _shape(operation)[1])
        check("supernet.head", sizes[self._leaves[0]], fused.head.conv.shape[0])


def _after(size: tuple[int, int], stride: int) -> tuple[int, int]:
    return -(-size[0] // stride), -(-size[1] // stride)


def _bottleneck_macs(block: InvertedBottleneckWeights, into: tuple[int, int]) -> int:
    height, width = _after(into, block.stride)
    macs = height * width * (block.depthwise.numel() + block.project.numel())
    if block.expand is not None:
        macs += into[0] * into[1] * block.expand.numel()
    if block.squeeze_excitation is not None:
        macs += block.squeeze_excitation.reduce_weight.numel() + block.squeeze_excitation.expand_weight.numel()
    return int(macs)


def fused_precision(dtype: torch.dtype | None, precision: str | None) -> str:
    """In what the fused engine computes a supernet of `dtype`: "fp64", "fp32", "bf16", or why it does not."""
    if precision == "fp32":
        return "fp32"
    if precision == "bf16":
        return "bf16"
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        return "bf16" if dtype == torch.bfloat16 else f"autocast to {dtype} is not computed"
    known = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16"}
    return (
        f"a supernet of {dtype} is not computed"
        if dtype is None
        else known.get(dtype, f"a supernet of {dtype} is not computed")
    )


def refused(modules: Sequence[nn.Module], images: object, precision: str) -> str | None:
    """Why the fused engine is not used whatever the modules compute; None where nothing speaks against it."""
    if precision not in _DTYPES:
        return precision
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        return "a torch mode is active, which wants to see what the modules do"
    if isinstance(images, Tensor) and images.device.type != "cpu":
        return f"images on {images.device}"
    if not _library.ops_available():
        return "greedynas_ext._ops could not be loaded"
    devices = {parameter.device.type for module in modules for parameter in module.parameters()} - {"cpu"}
    return f"parameters on {', '.join(sorted(devices))}" if devices else None


def release_memory() -> int:
    """Frees the working memory that evaluations by fused kernels keep for the next one, at most 1 GiB.

    Returns:
        How many bytes were freed.

    Raises:
        ImportError: if the native library is missing.
    """
    return int(_library.require_chain().release_memory())
