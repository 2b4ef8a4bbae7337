"""`evaluate_paths`: the losses of many supernet paths on the same images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from greedynas_ext import arguments
from greedynas_ext.adapted import AdaptedSupernet, WholeSupernet
from greedynas_ext.arguments import Chain, SupernetLike
from greedynas_ext.checks import check_probability
from greedynas_ext.fused import FusedEngine, fused_precision, refused
from greedynas_ext.fused_chain import FusedChain
from greedynas_ext.fused_cuda import CudaEngine, unsupported
from greedynas_ext.isolation import held_interrupts
from greedynas_ext.module_engine import ModuleEngine
from greedynas_ext.plan import Trie
from greedynas_ext.results import PathEvaluation, Sums, result_of


def evaluate_paths(
    supernet: SupernetLike,
    paths: Tensor | Sequence[Sequence[int]],
    images: Tensor | Iterable[tuple[Tensor, Tensor]],
    targets: Tensor | None = None,
    *,
    k: int | None = None,
    bn: Literal["batch", "running", "recalibrated"] = "batch",
    calibration: Tensor | None = None,
    label_smoothing: float = 0.0,
    precision: Literal["fp32", "bf16", "fp16"] | None = None,
    max_memory: int | None = None,
    micro_batch: int | None = None,
    per_image: bool = False,
    profile: bool = False,
    fused: bool | None = None,
) -> PathEvaluation:
    """Computes the loss of each of m paths of a supernet on the same images, sharing what the paths share.

    Activations after a layer, and batch statistics too, depend on the choices up to it alone, so each unique prefix of
    the paths is computed once and the result is that of a loop over the paths, without gradients, dropout and drop-path
    off, batch normalisations by the policy `bn`. On a CPU, and in fp32, bf16 and fp16 on a GPU, where stem, operations
    and head are all recognised by what they compute (convolution, BN, activation; inverted bottlenecks, with squeeze-
    excitation or without; identities; 1x1 convolution, BN, activation, mean, linear), fused kernels evaluate them;
    anything else runs as the modules that it is. Of what `adapt` returns, parts that are recognised run fused beside
    others that are not: the operations named, convolutions of any odd size with BN and activation, separable
    convolutions and pooling as DARTS has them, several in a row, and units that split channels, branch, concatenate and
    shuffle, as those of ShuffleNetV2. `plan.kernels` and `plan.macs_fused` say which, and why.
    To see what it computes, the forward of a new or changed module runs once on a symbol instead of a tensor.

    The supernet is not changed: parameters, buffers, flags, gradients and random generators are afterwards as before,
    also after an exception or Ctrl-C, which is delivered between two operations.

    Path filtering by the loss of a batch is the method of You et al., "GreedyNAS: Towards Fast One-Shot NAS with
    Greedy Supernet", CVPR 2020.

    Args:
        supernet: a chain with `stem`, `choices[layer][op]` and `head`; modules, or functions of one tensor. The head
            gives logits [N, classes]. Or what `adapt` returns.
        paths: int64 [m, layers] or nested lists: for each path one operation index per layer.
        images: floating [N, C, H, W] on the supernet's device, or an iterable of such (images, targets) pairs; it
            is read once. With an iterable, batch statistics are of each batch, and losses are means over all images.
        targets: int64 [N] classes, with `images` as a tensor.
        k: how many paths of lowest loss `top_k` names, 1 <= k <= m. NaN ranks last and ties go to the lower index.
        bn: "batch": the (biased) statistics of the batch at hand; "running": the stored running statistics, or the
            batch's where a module stores none; "recalibrated": for each path the biased batch statistics of one
            pass of the calibration images, used as constants.
        calibration: floating [M, C, H, W], with bn="recalibrated" only.
        label_smoothing: of the cross-entropy, in [0, 1].
        precision: None follows the supernet's dtype and an active autocast; "fp32" does the arithmetic on weights in
            float32 with autocast off; "bf16" rounds activations and weights to bfloat16 (modules: under bfloat16
            autocast) and sums in float32; fused, the depthwise convolution is in half precision on a GPU and where
            there are matrix tiles (AMX, AVX512-FP16), and on a CPU without bfloat16 products it is "fp32"; "fp16"
            rounds to half precision instead (modules: under float16 autocast) and needs a supernet on a GPU. Fused on
            a GPU "bf16" needs compute capability 8.0, "fp32" (float32 multiply-adds, no TF32) and "fp16" 7.5. Fused,
            weights of any scale keep their digits in half precision, since BatchNorm takes away the powers of two by
            which they are multiplied; activations above 65504 are infinite there.
        max_memory: bytes for activations and working memory. Layer by layer is used where it fits, depth-first
            elsewhere; where that does not fit either, images are split where the statistics allow it (not where
            those of the batch are used), or ValueError is raised. None: depth-first on a CPU; on a GPU half of what is
            free there.
        micro_batch: evaluate at most this many images at once; with bn="batch" statistics are then those of each
            part, which `statistics` says.
        per_image: also return the loss of each image.
        profile: also return time, operations and bytes by stage and its parts.
        fused: None uses the fused kernels where they can be used; False runs the modules; True raises ValueError,
            saying why, where the fused kernels cannot be used.

    Returns:
        PathEvaluation.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; ValueError also where an adapted
            supernet computes something else than its own forward, with the difference.
        RuntimeError: where an operation writes to its parameters, targets exceed the number of classes, or an adapted
            supernet has changed since.

    Warns:
        RuntimeWarning: where fewer than `k` losses are finite, or an operation drew random numbers.
    """
    given = Chain.of(supernet)
    checked_paths = arguments.check_paths(paths, given)
    chain, operations = planned(supernet, given, checked_paths)
    arguments.check_top_k(k, len(checked_paths))
    check_options(bn, calibration, label_smoothing, max_memory)
    arguments.check_positive("micro_batch", micro_batch)
    modules = chain.modules_of(operations)
    device, _ = device_and_dtype(modules)
    arguments.check_precision(precision, device or torch.device("cpu"))
    if calibration is not None:
        calibration = arguments.check_images("calibration", calibration, device)

    decision = decided(chain, operations, modules, images, calibration, bn, precision, fused)
    trie = decision.trie
    engine = engine_for(decision, bn, label_smoothing, precision, max_memory, profile)
    if calibration is not None:
        engine.check_values("calibration", calibration, None)
        engine.calibrate(calibration)
    sums = Sums(trie, per_image)
    for batch_images, batch_targets in arguments.iterate_batches(images, targets, device, engine.check_values):
        if isinstance(supernet, AdaptedSupernet):
            supernet.before_batch(batch_images)
        parts = 1 if micro_batch is None else math.ceil(len(batch_images) / micro_batch)
        for part in zip(batch_images.tensor_split(parts), batch_targets.tensor_split(parts), strict=True):
            sums.sizes += engine.evaluate(*part, sums.add)
    return result_of(chain, trie, engine, sums, k=k, bn=bn, micro_batch=micro_batch, profile=profile)


def planned(supernet: SupernetLike, given: Chain, paths: Tensor) -> tuple[Chain, Tensor]:
    """The chain that evaluates `paths` [m, columns] of `supernet`, and the operations [m, layers] of each path.

    `given`: Chain.of(supernet).
    """
    if isinstance(supernet, AdaptedSupernet):
        supernet.check_unchanged(paths)
    return given.planned(paths)


def check_options(bn: object, calibration: object, label_smoothing: object, max_memory: object) -> None:
    """Raises TypeError and ValueError for what an evaluation cannot be asked for."""
    arguments.check_one_of("bn", bn, ("batch", "running", "recalibrated"))
    arguments.check_positive("max_memory", max_memory)
    check_probability("label_smoothing", label_smoothing)
    if (calibration is not None) != (bn == "recalibrated"):
        came = "None" if calibration is None else "a value"
        raise ValueError(f"calibration: expected images with bn='recalibrated' and only then, got {came}, bn={bn!r}")


@dataclass(frozen=True)
class Decision:
    """What evaluates a set of paths.

    Attributes:
        chain: the supernet as evaluation sees it.
        trie: the plan of the paths.
        modules: those that the paths use.
        device: the supernet's.
        dtype: the supernet's, where it has any.
        kind: in what the fused engine computes, or why it does not: `fused_precision`.
        described: what the fused engine evaluates, or why it does not.
        beside: why no fused kernels run operations beside modules; None where they run those that are recognised.
    """

    chain: Chain
    trie: Trie
    modules: list[nn.Module]
    device: torch.device
    dtype: torch.dtype | None
    kind: str
    described: FusedChain | str
    beside: str | None


def decided(
    chain: Chain,
    operations: Tensor,
    modules: list[nn.Module],
    images: object,
    calibration: Tensor | None,
    bn: str,
    precision: str | None,
    fused: bool | None,
) -> Decision:
    """What evaluates `operations` [m, layers] of `chain`, which use `modules`; the other arguments are checked.

    Raises:
        ValueError: for fused=True where the fused engine does not.
    """
    device, dtype = device_and_dtype(modules)
    where = device or torch.device("cpu")
    kind = fused_precision(dtype, precision, where.type)
    trie = Trie(operations)
    described: FusedChain | str = "fused=False"
    if fused is not False:
        described = description(chain, trie, images, calibration, kind, bn, where)
    if isinstance(described, str) and fused:
        raise ValueError(f"fused: expected a supernet that the fused kernels can evaluate; {described}")
    beside: str | None = described if isinstance(described, str) else "the fused engine runs all of it"
    if isinstance(described, str) and fused is not False:
        beside = not_beside(chain, images, kind, where)
    return Decision(chain, trie, modules, where, dtype, kind, described, beside)


def not_beside(chain: Chain, images: object, kind: str, device: torch.device) -> str | None:
    """Why no fused kernels run single operations beside modules; None where they do."""
    if not chain.partly_fused:
        return "fused kernels run all of a chain that is not adapted, or nothing"
    return refused(images, kind, device)


def engine_for(
    decision: Decision,
    bn: str,
    label_smoothing: float,
    precision: str | None,
    max_memory: int | None,
    profile: bool,
) -> FusedEngine | ModuleEngine:
    """The engine that evaluates what was decided."""
    described, trie = decision.described, decision.trie
    if not isinstance(described, str):
        return fused_engine(described, trie, decision.device, decision.kind, bn, label_smoothing, max_memory, profile)
    return ModuleEngine(
        decision.chain,
        trie,
        decision.modules,
        decision.dtype,
        bn,
        label_smoothing,
        precision,
        max_memory,
        profile,
        described,
        decision.kind if decision.beside is None else None,
    )


def description(
    chain: Chain,
    trie: Trie,
    images: object,
    calibration: Tensor | None,
    kind: str,
    bn: str,
    device: torch.device,
) -> FusedChain | str:
    """What the fused engine evaluates, or why it does not."""
    if isinstance(chain, WholeSupernet):
        return f"called path by path: {chain.reason}"
    reason = refused(images, kind, device)
    if reason is not None:
        return reason
    with held_interrupts(), torch.no_grad():
        described = FusedChain.of(chain, trie, device)
    if not isinstance(described, str) and described.head.side:
        if not isinstance(images, Tensor):
            return "supernet.head: pools a given size, and that of the batches is not known before"
        seen = [tuple(each.shape[2:]) for each in (images, calibration) if each is not None and each.dim() == 4]
        described = described.pools_otherwise(trie, seen) or described  # type: ignore[arg-type]
    if bn == "running" and not isinstance(described, str) and described.lacks_running_statistics():
        return "a batch normalisation stores no running statistics"
    if device.type == "cuda" and not isinstance(described, str):
        return unsupported(described, device, kind) or described
    return described


def fused_engine(
    described: FusedChain,
    trie: Trie,
    device: torch.device,
    precision: str,
    bn: str,
    label_smoothing: float,
    max_memory: int | None,
    profile: bool,
) -> FusedEngine:
    """The engine of the device."""
    engine_type = CudaEngine if device.type == "cuda" else FusedEngine
    return engine_type(described, trie, precision, bn, label_smoothing, max_memory, profile)


def device_and_dtype(modules: Sequence[nn.Module]) -> tuple[torch.device | None, torch.dtype | None]:
    """Of the first floating parameter or buffer; None where there is none."""
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                return tensor.device, tensor.dtype
    return None, None
