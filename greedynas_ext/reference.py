"""Each operation of `greedynas_ext.ops` in plain torch: what it means, and what the tests compare it with.

Slower and with larger temporaries, but on any device and without the native library. Like the operations, these
functions compute in the dtypes of their arguments, whether autocast is on or not.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from greedynas_ext.block_layout import ACTIVATIONS, GATES, KINDS, PackedBlock, padded

_ACTIVATIONS: dict[int, Callable[[Tensor], Tensor]] = {
    ACTIVATIONS["linear"]: lambda x: x,
    ACTIVATIONS["relu"]: F.relu,
    ACTIVATIONS["relu6"]: F.relu6,
    ACTIVATIONS["hswish"]: F.hardswish,
    ACTIVATIONS["silu"]: F.silu,
}
_GATES: dict[int, Callable[[Tensor], Tensor]] = {GATES["hsigmoid"]: F.hardsigmoid, GATES["sigmoid"]: torch.sigmoid}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function of an activation of `block_layout.ACTIVATIONS`."""
    return _ACTIVATIONS[ACTIVATIONS[name]]


def path_cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.path_cross_entropy` by `torch.nn.functional.cross_entropy`, one path after the other.

    Args:
        logits: floating point [m, N, C].
        targets: int64 [N].
        label_smoothing: in [0, 1].

    Returns:
        losses [m], image_losses [m, N] and correct int64 [m]; float64 for float64 logits, otherwise float32.
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    paths, images, _ = logits.shape
    image_losses = logits.new_empty(paths, images)
    for path in range(paths):
        image_losses[path] = F.cross_entropy(logits[path], targets, reduction="none", label_smoothing=label_smoothing)
    correct = (logits.argmax(dim=2) == targets).sum(dim=1)
    return image_losses.mean(dim=1), image_losses, correct


def select_top_k(losses: Tensor, k: int) -> Tensor:
    """`ops.select_top_k` by a stable sort.

    Args:
        losses: floating point [m].
        k: in [0, m].

    Returns:
        int64 [k], lowest loss first, NaN last, ties by index.
    """
    return torch.sort(losses, stable=True).indices[:k]


def mixed_op(
    inputs: Tensor, input_index: Tensor, op_index: Tensor, block: PackedBlock, statistics: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`ops.mixed_op` by torch's convolutions and BatchNorm, one node after the other, from the same packed block.

    Args:
        inputs: floating point [B, N, H, W, C].
        input_index: int64 [P].
        op_index: int64 [P].
        block: of the inputs' dtype.
        statistics: [P, S] or None for those of the batch.

    Returns:
        outputs [P, N, H', W', C'] and used_statistics [P, S].
    """
    nodes, (_, images, height, width, _) = len(op_index), inputs.shape
    size = ((height - 1) // block.stride + 1, (width - 1) // block.stride + 1)
    outputs = inputs.new_empty(nodes, images, *size, block.out_channels)
    used = inputs.new_zeros(nodes, block.statistics_width)
    with torch.autocast(inputs.device.type, enabled=False):  # its convolutions would be rounded
        for p, (source, op) in enumerate(zip(input_index.tolist(), op_index.tolist(), strict=True)):
            node = _Node(block, op, None if statistics is None else statistics[p], used[p])
            outputs[p] = node(inputs[source].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return outputs, used


class _Node:
    """One operation of a block, on images [N, C, H, W]."""

    def __init__(self, block: PackedBlock, op: int, given: Tensor | None, used: Tensor) -> None:
        self._weights = block.weights
        self._row = block.operation(op)
        self._eps = dict(zip(("expand", "depthwise", "project"), block.bn_eps[3 * op : 3 * op + 3], strict=True))
        self._given, self._used = given, used

    def __call__(self, x: Tensor) -> Tensor:
        row = self._row
        act = _ACTIVATIONS[row["activation"]]
        if row["kind"] == KINDS["identity"]:
            return x
        if row["kind"] == KINDS["conv_bn"]:
            weight = self._pointwise("project_weight", row["in_channels"], row["out_channels"])
            return act(self._batch_norm("project", F.conv2d(x, weight, stride=row["stride"])))
        hidden, kernel = row["hidden_channels"], row["kernel"]
        y = x
        if row["expand_weight"] >= 0:
            y = F.conv2d(y, self._pointwise("expand_weight", row["in_channels"], hidden))
            y = act(self._batch_norm("expand", y))
        taps = self._rows("depthwise_weight", kernel * kernel, hidden).t().reshape(hidden, 1, kernel, kernel)
        y = F.conv2d(y, taps, stride=row["stride"], padding=kernel // 2, groups=hidden)
        y = _ACTIVATIONS[row["depthwise_activation"]](self._batch_norm("depthwise", y))
        if row["se_channels"] > 0:
            y = y * self._gates(y, hidden, row["se_channels"])
        y = F.conv2d(y, self._pointwise("project_weight", hidden, row["out_channels"]))
        y = _ACTIVATIONS[row["project_activation"]](self._batch_norm("project", y))
        return x + y if row["residual"] else y

    def _gates(self, y: Tensor, hidden: int, squeezed: int) -> Tensor:
        z = y.mean(dim=(2, 3), keepdim=True)
        reduce_bias = self._rows("se_reduce_bias", 1, squeezed)[0]
        z = F.relu(F.conv2d(z, self._pointwise("se_reduce_weight", hidden, squeezed), reduce_bias))
        expand_bias = self._rows("se_expand_bias", 1, hidden)[0]
        z = F.conv2d(z, self._pointwise("se_expand_weight", squeezed, hidden), expand_bias)
        return _GATES[self._row["se_gate"]](z)

    def _rows(self, field: str, rows: int, channels: int) -> Tensor:
        """A section [rows, channels] without its padding."""
        start = self._row[field]
        return self._weights[start : start + rows * padded(channels)].view(rows, -1)[:, :channels]

    def _pointwise(self, field: str, into: int, out: int) -> Tensor:
        return self._rows(field, into, out).t().reshape(out, into, 1, 1)

    def _batch_norm(self, stage: str, x: Tensor) -> Tensor:
        weight, bias = self._rows(f"{stage}_bn", 2, x.shape[1])
        start, channels = self._row[f"{stage}_statistics"], x.shape[1]
        places = [slice(first, first + channels) for first in (start, start + padded(channels))]
        if self._given is None:
            var, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
            y = F.batch_norm(x, None, None, weight, bias, training=True, eps=self._eps[stage])
        else:
            mean, var = (self._given[place] for place in places)
            y = F.batch_norm(x, mean, var, weight, bias, training=False, eps=self._eps[stage])
        self._used[places[0]], self._used[places[1]] = mean, var
        return y
