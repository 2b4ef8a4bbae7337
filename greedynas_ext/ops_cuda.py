"""The operations on CUDA tensors: by the kernels of csrc/cuda where those compute the dtype, else in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from greedynas_ext import _library, reference
from greedynas_ext.block_layout import PackedBlock

_ON = "CUDA"  # the dispatch key


def _kernels(tensor: Tensor) -> Any | None:
    """The module of kernels, for contiguous float32 on a GPU that they run on; None elsewhere."""
    if tensor.dtype != torch.float32 or not tensor.is_contiguous() or not _library.cuda_available():
        return None
    if torch.cuda.get_device_capability(tensor.device) < (7, 5):
        return None
    return _library.require_cuda().kernels


def _stream(tensor: Tensor) -> int:
    return int(torch.cuda.current_stream(tensor.device).cuda_stream)


def path_cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.path_cross_entropy`; a target out of range gives NaN, where the CPU raises an error."""
    kernels = _kernels(logits)
    if kernels is None:
        return reference.path_cross_entropy(logits, targets, label_smoothing)
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
            _stream(logits),
        )
    return image_losses.double().mean(1).float(), image_losses, correct


def select_top_k(losses: Tensor, k: int) -> Tensor:
    """`ops.select_top_k`."""
    kernels = _kernels(losses)
    if kernels is None or k == 0:
        return reference.select_top_k(losses, k)
    indices = losses.new_empty(k, dtype=torch.int64)
    with torch.cuda.device(losses.device):
        kernels.select_top_k(
            kernels.SelectTopK(losses=losses.data_ptr(), indices=indices.data_ptr(), count=len(losses), k=k),
            _stream(losses),
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
    """`ops.mixed_op` in plain torch: its kernels are the chain's, which take no packed choice block yet."""
    block = PackedBlock(weights, tuple(op_table), tuple(bn_eps))
    return reference.mixed_op(inputs, input_index, op_index, block, statistics)


def register() -> None:
    """With torch's dispatcher, once."""
    for name, function in (
        ("path_cross_entropy", path_cross_entropy),
        ("select_top_k", select_top_k),
        ("mixed_op", mixed_op),
    ):
        torch.library.impl(f"greedynas::{name}", _ON, function)
