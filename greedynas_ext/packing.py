"""Packs a choice block, the alternative operations of one layer, into the flat form that `ops.mixed_op` reads.

An operation is described by plain dataclasses of tensors, whatever module classes it came from.

    block = pack_choice_block([InvertedBottleneckWeights(...), ConvBNWeights(...), IdentityWeights(24)])
    outputs, statistics = ops.mixed_op(inputs, input_index, op_index, block)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from greedynas_ext.block_layout import (
    ACTIVATIONS,
    FIELDS,
    GATES,
    KINDS,
    SECTION_ALIGNMENT,
    PackedBlock,
    padded,
    stage_channels,
)


@dataclass(frozen=True)
class BatchNormWeights:
    """A BatchNorm over C channels; without affine weights `weight` and `bias` are None."""

    weight: Tensor | None  # [C]
    bias: Tensor | None  # [C]
    eps: float = 1e-5
    running_mean: Tensor | None = None  # [C]; only running_statistics asks for them
    running_var: Tensor | None = None  # [C]
    conv_bias: Tensor | None = None  # [C] of the convolution before it; batch statistics take it away

    @property
    def mean_without_bias(self) -> Tensor | None:
        """What `running_mean` is to the convolution without its bias."""
        if self.running_mean is None or self.conv_bias is None:
            return self.running_mean
        wide = torch.float64 if self.running_mean.dtype == torch.float64 else torch.float32
        return self.running_mean.detach().to(wide) - self.conv_bias.detach().to(wide)


@dataclass(frozen=True)
class SqueezeExcitationWeights:
    """Mean over the image, reduce, ReLU, expand, gate; S is the width of the squeeze."""

    reduce_weight: Tensor  # [S, hidden, 1, 1] or [S, hidden]
    reduce_bias: Tensor  # [S]
    expand_weight: Tensor  # [hidden, S, 1, 1] or [hidden, S]
    expand_bias: Tensor  # [hidden]
    gate: str = "hsigmoid"  # or "sigmoid"


@dataclass(frozen=True)
class InvertedBottleneckWeights:
    """[expand 1x1, BN, act], depthwise kxk, BN, act, [squeeze-excitation], project 1x1, BN, act, [+ input].

    The convolutions pad by k // 2; a bias is in the BatchNorm after it.
    Without an expand stage `expand` and `expand_bn` are None.
    """

    expand: Tensor | None  # [hidden, in, 1, 1]
    expand_bn: BatchNormWeights | None
    depthwise: Tensor  # [hidden, 1, k, k], k odd
    depthwise_bn: BatchNormWeights
    project: Tensor  # [out, hidden, 1, 1]
    project_bn: BatchNormWeights
    stride: int
    activation: str  # of ACTIVATIONS; after expand
    residual: bool
    squeeze_excitation: SqueezeExcitationWeights | None = None
    depthwise_activation: str | None = None  # None: as after expand
    project_activation: str = "linear"

    @property
    def activations(self) -> tuple[str, str, str]:
        """After expand, depthwise and project."""
        middle = self.activation if self.depthwise_activation is None else self.depthwise_activation
        return self.activation, middle, self.project_activation


@dataclass(frozen=True)
class ConvBNWeights:
    """A 1x1 convolution with a stride and its BatchNorm: the identity where the shape changes.

    In a stem, a head or a unit the convolution may be of k x k, k odd, padded by k // 2.
    """

    weight: Tensor  # [out, in, 1, 1]
    bn: BatchNormWeights
    stride: int = 1
    activation: str = "linear"


@dataclass(frozen=True)
class IdentityWeights:
    """The identity on `channels` channels."""

    channels: int


OperationWeights = InvertedBottleneckWeights | ConvBNWeights | IdentityWeights


def pack_choice_block(operations: Sequence[OperationWeights], *, dtype: torch.dtype | None = None) -> PackedBlock:
    """Packs the operations of one layer, in the order of their indices.

    The weights are copied: pack again after they have changed. Their device, one for all, is kept.

    Args:
        operations: at least one description; all with the same input channels, output channels and stride.
        dtype: float32 or float64, to which all weights are converted; None: theirs, which then is one for all
            (float32 where no operation has weights).

    Raises:
        ValueError: naming the tensor whose shape or dtype does not fit, or the operation that differs from the first.
        TypeError: for a description of another type.
    """
    if not operations:
        raise ValueError("operations: expected at least one, got none")
    writer = _Writer(dtype)
    rows: list[dict[str, int]] = []
    eps: list[float] = []
    for index, operation in enumerate(operations):
        row, row_eps = _pack_operation(writer, f"operations[{index}]", operation)
        rows.append(row)
        eps += row_eps
        for field in ("in_channels", "out_channels", "stride"):
            if row[field] != rows[0][field]:
                raise ValueError(
                    f"operations[{index}]: expected {field} {rows[0][field]} as operations[0] has, got {row[field]}"
                )
    table = tuple(row[field] for row in rows for field in FIELDS)
    return PackedBlock(writer.finish(), table, tuple(eps))


def running_statistics(operations: Sequence[OperationWeights], block: PackedBlock) -> Tensor:
    """The running means and variances of the operations as rows of `statistics`.

    `running_statistics(operations, block)[op_index]` is what `ops.mixed_op` takes for nodes that run `op_index`.

    Args:
        operations: those that `block` was packed from; every BatchNorm with running_mean and running_var.
        block: gives the layout, dtype and device.

    Returns:
        Statistics [O, S], zero where an operation has no use for a column.

    Raises:
        ValueError: naming the BatchNorm without running statistics.
    """
    rows = block.weights.new_zeros(block.num_operations, block.statistics_width)
    for index, operation in enumerate(operations):
        entry = block.operation(index)
        for stage, channels in stage_channels(entry).items():
            name, norm = _batch_norm(operation, stage)
            mean = norm.mean_without_bias
            if mean is None or norm.running_var is None:
                raise ValueError(
                    f"operations[{index}].{name}: expected running_mean and running_var [{channels}], got None"
                )
            start = entry[f"{stage}_statistics"]
            rows[index, start : start + channels] = mean.detach()
            rows[index, start + padded(channels) : start + padded(channels) + channels] = norm.running_var.detach()
    return rows


def _batch_norm(operation: OperationWeights, stage: str) -> tuple[str, BatchNormWeights]:
    name = "bn" if isinstance(operation, ConvBNWeights) else f"{stage}_bn"
    norm = getattr(operation, name)
    assert isinstance(norm, BatchNormWeights)
    return name, norm


class _Writer:
    """Collects the sections of `weights`."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"dtype: expected float32 or float64, got {dtype}")
        self._dtype = dtype
        self._parts: list[Tensor] = []
        self._size = 0
        self._first = ""

    def rows(self, name: str, rows: Tensor) -> int:
        """Adds a section of rows of channels [R, C]; returns its offset."""
        rows = rows.detach() if self._dtype is None else rows.detach().to(self._dtype)
        if not self._parts:
            self._first = name
            if rows.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"{name}: expected float32 or float64, got {_kind(rows)}")
        elif (rows.dtype, rows.device) != (self._parts[0].dtype, self._parts[0].device):
            raise ValueError(f"{name}: expected {_kind(self._parts[0])} as {self._first} is, got {_kind(rows)}")
        section = torch.nn.functional.pad(rows, (0, padded(rows.shape[1]) - rows.shape[1])).flatten()
        self._parts.append(torch.nn.functional.pad(section, (0, -section.numel() % SECTION_ALIGNMENT)))
        offset = self._size
        self._size += self._parts[-1].numel()
        return offset

    def finish(self) -> Tensor:
        return torch.cat(self._parts) if self._parts else torch.zeros(0, dtype=self._dtype or torch.float32)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def _pack_operation(
    writer: _Writer, name: str, operation: OperationWeights
) -> tuple[dict[str, int], tuple[float, float, float]]:
    zeros = ("hidden_channels", "depthwise_activation", "project_activation", "se_channels", "se_gate", "residual")
    row = dict.fromkeys(FIELDS, -1) | dict.fromkeys(zeros, 0) | {"kernel": 1}
    if isinstance(operation, IdentityWeights):
        if operation.channels < 1:
            raise ValueError(f"{name}.channels: expected at least 1, got {operation.channels}")
        channels = operation.channels
        row |= {"kind": KINDS["identity"], "in_channels": channels, "out_channels": channels, "stride": 1}
        return row | {"activation": ACTIVATIONS["linear"]}, (0.0, 0.0, 0.0)
    if not isinstance(operation, InvertedBottleneckWeights | ConvBNWeights):
        raise TypeError(f"{name}: expected a description of weights, got {type(operation).__name__}")
    row["activation"] = _code(ACTIVATIONS, f"{name}.activation", operation.activation)
    if operation.stride < 1:
        raise ValueError(f"{name}.stride: expected at least 1, got {operation.stride}")
    row["stride"] = operation.stride
    if isinstance(operation, ConvBNWeights):
        out_channels, in_channels = _pointwise_shape(f"{name}.weight", operation.weight)
        row |= {"kind": KINDS["conv_bn"], "in_channels": in_channels, "out_channels": out_channels}
        _pack_pointwise(writer, row, "project", f"{name}.weight", operation.weight, out_channels, in_channels)
        _pack_batch_norm(writer, row, "project", 0, f"{name}.bn", operation.bn, operation.weight)
        return row, (0.0, 0.0, operation.bn.eps)
    return _pack_inverted_bottleneck(writer, row, name, operation)


def _pack_inverted_bottleneck(
    writer: _Writer, row: dict[str, int], name: str, operation: InvertedBottleneckWeights
) -> tuple[dict[str, int], tuple[float, float, float]]:
    shape = tuple(operation.depthwise.shape)
    if len(shape) != 4 or shape[0] < 1 or shape[1] != 1 or shape[2] != shape[3] or shape[2] % 2 == 0:
        raise ValueError(f"{name}.depthwise: expected [hidden, 1, k, k] with k odd, got {list(shape)}")
    hidden, kernel = shape[0], shape[2]
    out_channels, _ = _pointwise_shape(f"{name}.project", operation.project)
    row |= {"kind": KINDS["inverted_bottleneck"], "hidden_channels": hidden, "kernel": kernel, "in_channels": hidden}
    if (operation.expand is None) != (operation.expand_bn is None):
        raise ValueError(f"{name}.expand and {name}.expand_bn: expected both or neither")
    column = 0
    if operation.expand is not None and operation.expand_bn is not None:
        row["in_channels"] = _pointwise_shape(f"{name}.expand", operation.expand)[1]
        _pack_pointwise(writer, row, "expand", f"{name}.expand", operation.expand, hidden, row["in_channels"])
        norm = operation.expand_bn
        column = _pack_batch_norm(writer, row, "expand", column, f"{name}.expand_bn", norm, operation.expand)
    taps = operation.depthwise.reshape(hidden, kernel * kernel).t()
    row["depthwise_weight"] = writer.rows(f"{name}.depthwise", taps)
    norm = operation.depthwise_bn
    column = _pack_batch_norm(writer, row, "depthwise", column, f"{name}.depthwise_bn", norm, operation.depthwise)
    if operation.squeeze_excitation is not None:
        _pack_squeeze_excitation(writer, row, f"{name}.squeeze_excitation", operation.squeeze_excitation, hidden)
    _pack_pointwise(writer, row, "project", f"{name}.project", operation.project, out_channels, hidden)
    norm = operation.project_bn
    _pack_batch_norm(writer, row, "project", column, f"{name}.project_bn", norm, operation.project)
    if operation.residual and (operation.stride != 1 or row["in_channels"] != out_channels):
        raise ValueError(
            f"{name}.residual: expected False where the shape changes ({row['in_channels']} -> {out_channels} "
            f"channels, stride {operation.stride}), got True"
        )
    expand_eps = operation.expand_bn.eps if operation.expand_bn is not None else 0.0
    row |= {"out_channels": out_channels, "residual": int(operation.residual)}
    for stage, activation in zip(("depthwise", "project"), operation.activations[1:], strict=True):
        row[f"{stage}_activation"] = _code(ACTIVATIONS, f"{name}.{stage}_activation", activation)
    return row, (expand_eps, operation.depthwise_bn.eps, operation.project_bn.eps)


def _pack_squeeze_excitation(
    writer: _Writer, row: dict[str, int], name: str, weights: SqueezeExcitationWeights, hidden: int
) -> None:
    squeezed, _ = _pointwise_shape(f"{name}.reduce_weight", weights.reduce_weight)
    row["se_channels"] = squeezed
    row["se_gate"] = _code(GATES, f"{name}.gate", weights.gate)
    for part, weight, bias, out, into in (
        ("reduce", weights.reduce_weight, weights.reduce_bias, squeezed, hidden),
        ("expand", weights.expand_weight, weights.expand_bias, hidden, squeezed),
    ):
        _pack_pointwise(writer, row, f"se_{part}", f"{name}.{part}_weight", weight, out, into)
        _check_vector(f"{name}.{part}_bias", bias, out)
        row[f"se_{part}_bias"] = writer.rows(f"{name}.{part}_bias", bias[None])


def _pack_pointwise(
    writer: _Writer, row: dict[str, int], field: str, name: str, weight: Tensor, out: int, into: int
) -> None:
    if _pointwise_shape(name, weight) != (out, into):
        raise ValueError(f"{name}: expected [{out}, {into}, 1, 1], got {list(weight.shape)}")
    row[f"{field}_weight"] = writer.rows(name, weight.reshape(out, into).t())


def _pack_batch_norm(
    writer: _Writer, row: dict[str, int], stage: str, column: int, name: str, norm: BatchNormWeights, like: Tensor
) -> int:
    """`like` is the convolution's weight. Returns the first column of statistics after this BatchNorm's."""
    channels = like.shape[0]
    for part in ("weight", "bias", "running_mean", "running_var", "conv_bias"):
        value = getattr(norm, part)
        if value is not None:
            _check_vector(f"{name}.{part}", value, channels)
    weight = like.new_ones(channels) if norm.weight is None else norm.weight
    bias = like.new_zeros(channels) if norm.bias is None else norm.bias
    row[f"{stage}_bn"] = writer.rows(name, torch.stack([weight, bias]))
    row[f"{stage}_statistics"] = column
    return column + 2 * padded(channels)


def _pointwise_shape(name: str, weight: Tensor) -> tuple[int, int]:
    shape = tuple(weight.shape)
    if len(shape) not in (2, 4) or shape[2:] not in ((), (1, 1)) or min(shape) < 1:
        raise ValueError(f"{name}: expected a 1x1 convolution's weight [out, in, 1, 1], got {list(shape)}")
    return shape[0], shape[1]


def _check_vector(name: str, value: Tensor, size: int) -> None:
    if tuple(value.shape) != (size,):
        raise ValueError(f"{name}: expected [{size}], got {list(value.shape)}")


def _code(codes: dict[str, int], name: str, value: str) -> int:
    if value not in codes:
        raise ValueError(f"{name}: expected one of {', '.join(codes)}, got {value!r}")
    return codes[value]
