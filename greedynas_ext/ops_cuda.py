"""The operations on CUDA tensors: by the kernels of csrc/cuda where those compute the dtype, else in plain torch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from greedynas_ext import _library, reference
from greedynas_ext.block_layout import KINDS, PackedBlock
from greedynas_ext.checks import describe

MOST_MEASURED = 4096
"""Channels of a map whose moments the kernels take in float32: where an expansion, or the head, reads it."""

DEPTHWISE_KERNELS, DEPTHWISE_STRIDES = (3, 5, 7), (1, 2)
"""Of inverted bottlenecks that there are kernels for."""

PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Of maps."""

ALIGNMENT = 16
"""Bytes, at multiples of which the kernels read and write (csrc/cuda/kernels.h)."""

_ON = "CUDA"  # the dispatch key
_HALVES = (torch.bfloat16, torch.float16)
_ROW = 8  # channels of a pixel's row


def computes(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there are kernels for maps of the dtype that run on the device."""
    if dtype not in PRECISIONS or device.type != "cuda" or not _library.cuda_available():
        return False
    return torch.cuda.get_device_capability(device) >= ((8, 0) if dtype == torch.bfloat16 else (7, 5))


def most_inputs(device: torch.device, precision: str) -> tuple[int, int]:
    """Input channels of inverted bottlenecks and of the head for which a block's shared memory is known to suffice."""
    if precision == "fp32":  # products go through their depth in chunks; moments have this limit
        return MOST_MEASURED, MOST_MEASURED
    if torch.cuda.get_device_capability(device) < (8, 0):  # 64 KB
        return 200, 800
    shared = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    return (1024, 3000) if shared >= 227 * 1024 else (400, 1300)


def _module(tensor: Tensor, *others: torch.dtype) -> Any | None:
    """`greedynas_ext._cuda`, for contiguous tensors of float32 or `others` that its kernels compute; else None."""
    taken = tensor.is_contiguous() and tensor.dtype in (torch.float32, *others)
    return _library.require_cuda() if taken and computes(tensor.dtype, tensor.device) else None


def stream_of(tensor: Tensor) -> int:
    """The current stream of its device."""
    return int(torch.cuda.current_stream(tensor.device).cuda_stream)


def path_cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.path_cross_entropy`; a target out of range gives NaN, where the CPU raises an error."""
    _check_path_cross_entropy(logits, targets, label_smoothing)
    module = _module(logits)
    if module is None:
        return reference.path_cross_entropy(logits, targets, label_smoothing)
    kernels = module.kernels
    paths, images, classes = logits.shape
    image_losses = logits.new_empty(paths, images)
    correct = logits.new_empty(paths, dtype=torch.int64)
    status = logits.new_zeros(1, dtype=torch.int32)
    targets = targets.contiguous()
    with torch.cuda.device(logits.device):
        kernels.path_cross_entropy(
            kernels.PathCrossEntropy(
                logits=logits.data_ptr(),
                targets=targets.data_ptr(),
                image_losses=image_losses.data_ptr(),
                correct=correct.data_ptr(),
                status=status.data_ptr(),
                paths=paths,
                images=images,
                classes=classes,
                label_smoothing=label_smoothing,
            ),
            stream_of(logits),
        )
    return image_losses.double().mean(1).float(), image_losses, correct


def select_top_k(losses: Tensor, k: int) -> Tensor:
    """`ops.select_top_k`."""
    op = "select_top_k"
    vector = losses.dim() == 1 and losses.dtype in (torch.float32, torch.float64)
    _require(op, "losses", losses, vector, "float64 or float32 [m]")
    if not 0 <= k <= len(losses):
        raise ValueError(f"{op}: k should be in [0, m={len(losses)}], got {k}")
    module = _module(losses)
    if module is None or k == 0:
        return reference.select_top_k(losses, k)
    kernels = module.kernels
    indices = losses.new_empty(k, dtype=torch.int64)
    with torch.cuda.device(losses.device):
        kernels.select_top_k(
            kernels.SelectTopK(losses=losses.data_ptr(), indices=indices.data_ptr(), count=len(losses), k=k),
            stream_of(losses),
        )
    return indices


def mixed_op(
    inputs: Tensor,
    input_index: Tensor,
    op_index: Tensor,
    weights: Tensor,
    op_table: Sequence[int],
    bn_eps: Sequence[float],
    statistics: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`ops.mixed_op`: but for float64 by the kernels, which read and write maps of whole rows of 8 channels in place.

    Which nodes share launches is decided on the host, so it reads the indices: it waits for the GPU, unless they lie on
    the CPU, as they may here. float64, and nodes whose operation the kernels do not have (`takes`), are computed in
    plain torch, those of 16 bits in float32.
    """
    block = PackedBlock(weights, tuple(op_table), tuple(bn_eps))
    sources, operations = _checked(inputs, input_index, op_index, block, statistics)
    inputs = inputs.contiguous()
    module = _module(inputs, *_HALVES)
    if module is None:
        outputs, used = reference.mixed_op(inputs.to(block.weights.dtype), input_index, op_index, block, statistics)
        return outputs.to(inputs.dtype), used
    _, images, height, width, _ = inputs.shape
    size = (-(-height // block.stride), -(-width // block.stride))
    outputs = inputs.new_empty(len(sources), images, *size, block.out_channels)
    used = block.weights.new_zeros(len(sources), block.statistics_width)
    rows = [block.operation(op) for op in range(block.num_operations)]
    identities = [place for place, op in enumerate(operations) if rows[op]["kind"] == KINDS["identity"]]
    taken = [place for place, op in enumerate(operations) if takes(rows[op])]
    for place in identities:
        outputs[place] = inputs[sources[place]]
    if taken:
        nodes = [(sources[place], operations[place], place) for place in taken]
        _run(module, inputs, nodes, block, statistics, outputs, used)
    others = sorted(set(range(len(sources))) - {*identities, *taken})
    if others:
        input_index, op_index = (torch.tensor([v[place] for place in others]) for v in (sources, operations))
        given = None if statistics is None else statistics[others]
        wide = inputs.to(block.weights.dtype)
        computed, used[others] = reference.mixed_op(wide, input_index, op_index, block, given)
        outputs[others] = computed.to(outputs.dtype)
    return outputs, used


def takes(operation: dict[str, int]) -> bool:
    """Whether there are kernels for an operation of a packed block, which is no identity."""
    if operation["kind"] != KINDS["inverted_bottleneck"]:
        return operation["kind"] == KINDS["conv_bn"]
    measured = operation["in_channels"] if operation["expand_weight"] >= 0 else 0
    there_is = operation["kernel"] in DEPTHWISE_KERNELS and operation["stride"] in DEPTHWISE_STRIDES
    return there_is and measured <= MOST_MEASURED


def _run(
    module: Any,
    inputs: Tensor,
    nodes: list[tuple[int, int, int]],
    block: PackedBlock,
    statistics: Tensor | None,
    outputs: Tensor,
    used: Tensor,
) -> None:
    """Writes the outputs and the statistics of nodes (input, operation, place)."""
    *_, images, height, width, channels = inputs.shape
    maps, written = inputs, outputs
    if channels % _ROW or inputs.data_ptr() % ALIGNMENT:
        number = {source: row for row, source in enumerate(sorted({source for source, _, _ in nodes}))}
        maps = inputs.new_zeros(len(number), images, height, width, channels + -channels % _ROW)
        for source, row in number.items():
            maps[row, ..., :channels] = inputs[source]
        nodes = [(number[source], op, place) for source, op, place in nodes]
    if padding := -block.out_channels % _ROW:
        written = outputs.new_empty(*outputs.shape[:-1], block.out_channels + padding)
    weights = block.weights.contiguous()
    given = None if statistics is None else statistics.contiguous()
    with torch.cuda.device(inputs.device):
        run = module.MixedOp(
            op_table=block.op_table,
            bn_eps=block.bn_eps,
            weights=weights.data_ptr(),
            nodes=nodes,
            sizes=(images, height, width),
            known=given is not None,
            precision=PRECISIONS[inputs.dtype],
        )
        memory = torch.empty(run.bytes, dtype=torch.uint8, device=inputs.device)
        run.run(
            inputs=maps.data_ptr(),
            outputs=written.data_ptr(),
            statistics=0 if given is None else given.data_ptr(),
            used_statistics=used.data_ptr(),
            statistics_width=block.statistics_width,
            memory=memory.data_ptr(),
            stream=stream_of(inputs),
        )
    if written is not outputs:
        for _, _, place in nodes:
            outputs[place] = written[place, ..., : block.out_channels]


def _check_path_cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float) -> None:
    """ValueError, in the words of csrc/checks.cpp, for arguments that it refuses."""
    op = "path_cross_entropy"
    floating = logits.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    _require(op, "logits", logits, floating and logits.dim() == 3, "float64, float32, bfloat16 or float16 [m, N, C]")
    filled = min(logits.shape[1:]) > 0
    _require(op, "logits", logits, filled, "of at least one image and one class (dimensions 1 and 2)")
    fitting = targets.dtype == torch.int64 and targets.shape == logits.shape[1:2]
    _require(op, "targets", targets, fitting, f"int64 [N={logits.shape[1]}]")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing should be in [0, 1], got {label_smoothing:g}")
    if targets.device != logits.device:
        raise ValueError(f"{op}: targets should be on the device of logits")


def _checked(
    inputs: Tensor, input_index: Tensor, op_index: Tensor, block: PackedBlock, statistics: Tensor | None
) -> tuple[list[int], list[int]]:
    """The indices, where the arguments are what csrc/checks.h asks for; else ValueError with its words."""
    require = functools.partial(_require, "mixed_op")
    wide = torch.float32 if inputs.dtype in _HALVES else inputs.dtype
    dtype = str(wide).removeprefix("torch.")
    count = input_index.numel()
    whole = inputs.dim() == 5 and inputs.dtype in (torch.float32, torch.float64, *_HALVES)
    expected = "float64 or float32, or on a GPU bfloat16 or float16, [B, N, H, W, C]"
    require("inputs", inputs, whole, expected)
    require("inputs", inputs, min(inputs.shape[1:]) > 0, "empty in no dimension but the first")
    index = input_index.dtype == torch.int64 and input_index.dim() == 1
    require("input_index", input_index, index, "int64 [P]")
    index = op_index.dtype == torch.int64 and op_index.shape == (count,)
    require("op_index", op_index, index, f"int64 [P={count}] as input_index is")
    same = block.weights.dtype == wide and block.weights.dim() == 1
    with_inputs = "as inputs are" if wide == inputs.dtype else f"beside inputs of {describe(inputs)}"
    require("weights", block.weights, same, f"{dtype} [size] {with_inputs}")
    _check_table(block.op_table, block.bn_eps, inputs.shape[4], block.weights.numel(), wide)
    if statistics is not None:
        same = statistics.dtype == wide and statistics.shape == (count, block.statistics_width)
        require("statistics", statistics, same, f"{dtype} [P={count}, S={block.statistics_width}]")
    for name, tensor in (("weights", block.weights), ("statistics", statistics)):
        if tensor is not None and tensor.device != inputs.device:
            raise ValueError(f"mixed_op: {name} should be on the device of inputs")
    sources, operations = input_index.tolist(), op_index.tolist()
    _check_range("input_index", sources, len(inputs), "B")
    _check_range("op_index", operations, block.num_operations, "O")
    if statistics is None:
        _check_value_counts(block, operations, inputs.shape)
    return sources, operations


@functools.lru_cache(maxsize=128)
def _check_table(
    op_table: tuple[int, ...], bn_eps: tuple[float, ...], channels: int, weights: int, dtype: torch.dtype
) -> None:
    """The CPU's operation checks them; without nodes it computes nothing."""
    none = torch.empty(0, dtype=torch.int64, device="cpu")
    inputs = torch.empty(0, 1, 1, 1, channels, dtype=dtype, device="cpu")
    sections = torch.empty(weights, dtype=dtype, device="cpu")
    torch.ops.greedynas.mixed_op(inputs, none, none, sections, op_table, bn_eps)


def _require(op: str, name: str, tensor: Tensor, condition: bool, expected: str) -> None:
    if not condition:
        raise ValueError(f"{op}: {name} should be {expected}, got {describe(tensor)}")


def _check_range(name: str, values: list[int], bound: int, bound_name: str) -> None:
    for position, value in enumerate(values):
        if not 0 <= value < bound:
            raise ValueError(
                f"mixed_op: {name} should be in [0, {bound_name}={bound}), got {value} at position {position}"
            )


def _check_value_counts(block: PackedBlock, operations: list[int], shape: torch.Size) -> None:
    height, width = -(-shape[2] // block.stride), -(-shape[3] // block.stride)
    for node, op in enumerate(operations):
        if shape[1] * height * width == 1 and block.operation(op)["kind"] != KINDS["identity"]:
            raise ValueError(
                f"mixed_op: Expected more than 1 value per channel in batch mode, got one image of {height}x{width} "
                f"after operation {op} (node {node}); give statistics, or more images"
            )


def register() -> None:
    """With torch's dispatcher, once."""
    for name, function in (
        ("path_cross_entropy", path_cross_entropy),
        ("select_top_k", select_top_k),
        ("mixed_op", mixed_op),
    ):
        torch.library.impl(f"greedynas::{name}", _ON, function)
