"""The operations of `torch.ops.greedynas`, documented, with fake kernels for `torch.compile` and `torch.export`.

They serve evaluation: none has a gradient formula. With an argument that requires a gradient they still compute;
calling `backward` on the result then raises NotImplementedError. Arguments are checked, on a CPU in C++, on a GPU those
of `mixed_op` in the same words: a failed check is a ValueError that names the argument, what was expected and what
came. Where the native library is missing, every function raises ImportError saying how to build it. The CPU kernels
release the GIL, use torch's threads, and their results do not depend on the number of threads, bit for bit; several
threads may call at once.

They compute in the dtypes of their arguments, whether autocast is on or not. `torch.compile` takes them into one graph,
with symbolic sizes too; numbers beside tensors (`k`, the description of a block) are constants of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from greedynas_ext import _library, ops_cuda
from greedynas_ext.block_layout import FIELDS, PackedBlock, statistics_width


def path_cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of m paths on the same N images, without a temporary as large as the logits.

    What `torch.nn.functional.cross_entropy` computes, in nats, for each path; there is no `ignore_index`. Arithmetic
    is in float64 whatever the logits are. Infinite and NaN logits have the effect that they have there.

    Cost: one exponential and about four additions for each of m·N·C logits, which are read once; m·N losses are
    written. Working memory is one row of C doubles for each thread.

    Args:
        logits: float64, float32, bfloat16 or float16 [m, N, C] of any strides; N and C at least 1.
        targets: int64 [N], each in [0, C).
        label_smoothing: in [0, 1].

    Returns:
        losses [m]: means over the images. float64 for float64 logits, otherwise float32.
        image_losses [m, N]: of the same dtype.
        correct int64 [m]: number of images whose largest logit is the target's; of equal logits the first counts, and
            NaN is larger than all (as `torch.argmax` has it).

    Raises:
        ValueError: for arguments of other shapes, dtypes or values; a bad target is named by its position.
        ImportError: if the native library is missing.
    """
    result: tuple[Tensor, Tensor, Tensor] = _call("path_cross_entropy", logits, targets, label_smoothing)
    return result


def select_top_k(losses: Tensor, k: int) -> Tensor:
    """The indices of the k lowest losses, lowest first.

    Infinity comes before NaN, NaN last; equal losses (0.0 and -0.0 too) stand in the order of their indices. That NaN
    or infinity was selected is for the caller to see.

    Cost: about m·log2(k) comparisons; one index for each loss of working memory.

    Args:
        losses: float64 or float32 [m].
        k: in [0, m].

    Returns:
        int64 [k].

    Raises:
        ValueError: for losses of another shape or dtype, or k out of range.
        ImportError: if the native library is missing.
    """
    result: Tensor = _call("select_top_k", losses, k)
    return result


def mixed_op(
    inputs: Tensor, input_index: Tensor, op_index: Tensor, block: PackedBlock, statistics: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One choice block for P nodes at once: node p runs operation `op_index[p]` on `inputs[input_index[p]]`.

    BatchNorm normalises with the given statistics, or, where there are none, with those of the node's own N images:
    mean and biased variance of each channel over images, height and width. The statistics that were used are returned
    as well: on calibration images they are what `recalibrated` evaluation wants, and the outputs beside them are the
    calibration input of the next layer. Given back as `statistics` they repeat the outputs bit for bit.

    Cost of an inverted bottleneck, in multiply-accumulates: N·H·W·C·hidden for the expansion, N·H'·W'·hidden·k² for the
    depthwise convolution, N·H'·W'·hidden·C' for the projection, and for batch statistics N·H·W·C²/2 once for each
    input. In elements moved: with batch statistics the input is read twice, the depthwise output [N, H', W', hidden]
    written and read, the output written twice and read once; with given statistics the input is read and the output
    written. The expanded map is never stored. Besides, inputs and outputs are copied once, from and to dense rows of
    channels, and weights of the operations that nodes use are put into the kernels' order.

    Working memory: the depthwise output of the node that runs, or with given statistics that of a few images for each
    thread; beside it one input and one output, channels padded to a multiple of 16. The kernels are those of
    `evaluate_paths`.

    On a GPU float32, bfloat16 and float16 are computed by kernels, the latter two with weights and statistics of
    float32: nodes of like operations share launches, whose depthwise outputs take up to
    256 MB, or one node's if that is more; inputs and outputs are copied where their channels are no multiple of 8.
    float64, and operations for which there are no kernels (depthwise kernels other than 3, 5 and 7, depthwise strides
    above 2, expansions of more than 4,096 channels), are computed in plain torch, where outputs repeat to rounding
    only. The host reads the indices, and so waits for the GPU unless they lie on the CPU.

    Args:
        inputs: float64 or float32, or on a GPU bfloat16 or float16, [B, N, H, W, C], N, H, W and C at least 1; made
            contiguous if they are not.
        input_index: int64 [P], each in [0, B); with inputs on a GPU there or on the CPU.
        op_index: int64 [P], each in [0, O) for a block of O operations; like `input_index`.
        block: made by `greedynas_ext.packing.pack_choice_block`, of the inputs' dtype; float32 where that has 16 bits.
        statistics: [P, S] with S = `block.statistics_width`, of the block's dtype: one row per node, each in the layout
            that its operation has (`packing.running_statistics`, or an earlier call). None: those of the batch.

    Returns:
        outputs [P, N, H', W', C'] with H' = ceil(H / stride), W' = ceil(W / stride) and C' = `block.out_channels`.
        used_statistics [P, S]; columns that an operation has no use for are 0. `block_layout.unpack_statistics` reads a
            row.

    Raises:
        ValueError: for arguments of other shapes, dtypes or values, and for batch statistics of a single value per
            channel.
        ImportError: if the native library is missing.
    """
    result: tuple[Tensor, Tensor] = _call(
        "mixed_op", inputs, input_index, op_index, block.weights, block.op_table, block.bn_eps, statistics
    )
    return result


def _call(name: str, *arguments: Any) -> Any:
    _library.require_ops()
    return getattr(torch.ops.greedynas, name)(*arguments)


def _fake_path_cross_entropy(
    logits: Tensor, targets: Tensor, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    paths, images, _ = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return (
        logits.new_empty(paths, dtype=dtype),
        logits.new_empty(paths, images, dtype=dtype),
        logits.new_empty(paths, dtype=torch.int64),
    )


def _fake_select_top_k(losses: Tensor, k: int) -> Tensor:
    return losses.new_empty(k, dtype=torch.int64)


def _fake_mixed_op(
    inputs: Tensor,
    input_index: Tensor,
    op_index: Tensor,
    weights: Tensor,
    op_table: Sequence[int],
    bn_eps: Sequence[float],
    statistics: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _, images, height, width, _ = inputs.shape
    nodes = input_index.shape[0]
    stride, channels = op_table[FIELDS.index("stride")], op_table[FIELDS.index("out_channels")]
    outputs = inputs.new_empty(nodes, images, -(-height // stride), -(-width // stride), channels)
    return outputs, weights.new_empty(nodes, statistics_width(op_table))


def _no_gradient(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError(f"greedynas::{name} is for evaluation and has no gradient; call it under no_grad")

    return backward


if _library.ops_available():
    for _name, _fake in (
        ("path_cross_entropy", _fake_path_cross_entropy),
        ("select_top_k", _fake_select_top_k),
        ("mixed_op", _fake_mixed_op),
    ):
        torch.library.register_fake(f"greedynas::{_name}", _fake)
        torch.library.register_autograd(f"greedynas::{_name}", _no_gradient(_name))
    ops_cuda.register()
