"""`evaluate_paths`: the losses of many supernet paths on the same images."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from greedynas_ext import arguments, ops
from greedynas_ext.arguments import Chain, SupernetLike
from greedynas_ext.intercept import Interceptor, Normalisation
from greedynas_ext.isolation import held_interrupts, undisturbed, version_of
from greedynas_ext.memory import MemoryEstimate, estimate_memory
from greedynas_ext.plan import EvaluationPlan, Trie
from greedynas_ext.runner import Profile, Runner, StageProfile

_LOGITS_BYTES = 64 << 20  # logits are gathered up to this size before their loss is computed


@dataclass(frozen=True)
class PathEvaluation:
    """What `evaluate_paths` found for m paths on N images.

    Attributes:
        losses: [m] mean cross-entropy in nats; float64 for a float64 supernet, else float32.
        accuracy: [m] fraction of images whose class has the highest logit, same dtype.
        top_k: int64 [k] indices of the paths of lowest loss, lowest first; None without `k`.
        image_losses: [m, N] loss of each image, on request.
        plan: what was computed, and what sharing prefixes saved.
        statistics: in words, which statistics the batch normalisations used.
        profile: time, operations and bytes by stage, on request.
    """

    losses: Tensor
    accuracy: Tensor
    top_k: Tensor | None
    image_losses: Tensor | None
    plan: EvaluationPlan
    statistics: str
    profile: tuple[StageProfile, ...] | None


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
    precision: Literal["fp32", "bf16"] | None = None,
    max_memory: int | None = None,
    micro_batch: int | None = None,
    per_image: bool = False,
    profile: bool = False,
) -> PathEvaluation:
    """Computes the loss of each of m paths of a supernet on the same images, sharing what the paths share.

    Activations after a layer, and batch statistics too, depend on the choices up to it alone, so each unique prefix
    of the paths is computed once and the result is that of a loop over the paths. Modules run as they are, without
    gradients, in evaluation mode (dropout and drop-path off), their batch normalisations by the policy `bn`. The
    supernet is not changed: parameters, buffers, flags, gradients and random generators are afterwards as before,
    also after an exception or Ctrl-C, which is delivered between two operations.

    Path filtering by the loss of a batch is the method of You et al., "GreedyNAS: Towards Fast One-Shot NAS with
    Greedy Supernet", CVPR 2020.

    Args:
        supernet: a chain with `stem`, `choices[layer][op]` and `head`; modules, or functions of one tensor. The head
            gives logits [N, classes].
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
            float32 with autocast off; "bf16" runs under bfloat16 autocast.
        max_memory: bytes for activations. Layer by layer is used where it fits, depth-first elsewhere; where that
            does not fit either, images are split where the statistics allow it (not where those of the batch are
            used), or ValueError is raised. None: depth-first.
        micro_batch: evaluate at most this many images at once; with bn="batch" statistics are then those of each
            part, which `statistics` says.
        per_image: also return the loss of each image.
        profile: also return time, operations and bytes by stage.

    Returns:
        PathEvaluation.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: where an operation writes to its parameters, or targets exceed the number of classes.

    Warns:
        RuntimeWarning: where fewer than `k` losses are finite, or an operation drew random numbers.
    """
    chain = Chain.of(supernet)
    checked_paths = arguments.check_paths(paths, chain)
    arguments.check_top_k(k, len(checked_paths))
    arguments.check_one_of("bn", bn, ("batch", "running", "recalibrated"))
    arguments.check_one_of("precision", precision, (None, "fp32", "bf16"))
    arguments.check_positive("max_memory", max_memory)
    arguments.check_positive("micro_batch", micro_batch)
    arguments.check_fraction("label_smoothing", label_smoothing)
    modules = chain.modules_of(checked_paths)
    device, dtype = _device_and_dtype(modules)
    if (calibration is not None) != (bn == "recalibrated"):
        came = "None" if calibration is None else "a value"
        raise ValueError(f"calibration: expected images with bn='recalibrated' and only then, got {came}, bn={bn!r}")
    if calibration is not None:
        calibration = arguments.check_images("calibration", calibration, device)

    evaluation = _Evaluation(
        chain, checked_paths, modules, dtype, bn, label_smoothing, precision, max_memory, per_image, profile
    )
    if calibration is not None:
        evaluation.calibrate(calibration)
    for batch_images, batch_targets in arguments.iterate_batches(images, targets, device):
        parts = 1 if micro_batch is None else math.ceil(len(batch_images) / micro_batch)
        for part in zip(batch_images.tensor_split(parts), batch_targets.tensor_split(parts), strict=True):
            evaluation.add(*part)
    return evaluation.result(k, micro_batch)


def _device_and_dtype(modules: Sequence[nn.Module]) -> tuple[torch.device | None, torch.dtype | None]:
    """Of the first floating parameter or buffer; None where there is none."""
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                return tensor.device, tensor.dtype
    return None, None


class _Evaluation:
    """One call of `evaluate_paths`: batches come in, sums are kept."""

    def __init__(
        self,
        chain: Chain,
        paths: Tensor,
        modules: Sequence[nn.Module],
        dtype: torch.dtype | None,
        bn: str,
        label_smoothing: float,
        precision: str | None,
        max_memory: int | None,
        per_image: bool,
        profile: bool,
    ) -> None:
        self._chain, self._modules, self._dtype = chain, modules, dtype
        self._bn, self._label_smoothing, self._precision = bn, label_smoothing, precision
        self._max_memory, self._per_image, self._profiling = max_memory, per_image, profile
        self._trie = Trie(paths)
        cast_to, cast_from = _casts(precision)
        self._interceptor = Interceptor(cast_to, cast_from)
        self._runner: Runner | None = None
        self._profile: Profile
        self._traversal, self._split = "depth-first", 1
        self._estimates: dict[tuple[torch.Size, torch.dtype, bool], MemoryEstimate] = {}
        self._macs: tuple[int, int] | None = None
        # Sums over images for each leaf, on the images' device; the number of images; losses of each image
        self._loss_sums: dict[int, Tensor] = {}
        self._correct: dict[int, Tensor] = {}
        self._image_losses: dict[int, list[Tensor]] = {}  # only on request
        self._result_dtype = torch.float32
        self._image_counts: list[int] = []

    def calibrate(self, images: Tensor) -> None:
        """One pass whose batch statistics become the constants of each node."""
        with self._running(images) as (runner, safe_point):
            traversal, _, _ = self._choose_traversal("calibration", images, safe_point)
            runner.run(self._cast(images), traversal, "capture", lambda leaf, logits: None, safe_point)

    def add(self, images: Tensor, targets: Tensor) -> None:
        """Evaluates one batch."""
        normalisation: Normalisation = {"batch": "batch", "running": "running", "recalibrated": "constants"}[self._bn]  # type: ignore[assignment]
        with self._running(images) as (runner, safe_point):
            self._traversal, split, gathered = self._choose_traversal("images", images, safe_point)
            self._split = max(self._split, split)
            for part, part_targets in zip(images.tensor_split(split), targets.tensor_split(split), strict=True):
                gather = _LogitsGatherer(functools.partial(self._score, part_targets), gathered)
                runner.run(self._cast(part), self._traversal, normalisation, gather.add, safe_point)
                gather.flush()
                self._image_counts.append(len(part))
            if self._macs is None:
                self._macs = self._trie.macs(runner.stem_macs, runner.node_macs, runner.head_macs)

    def result(self, k: int | None, micro_batch: int | None) -> PathEvaluation:
        """Means over all images so far."""
        leaves = self._trie.leaf_of_path
        count = sum(self._image_counts)
        dtype = self._result_dtype
        losses = (torch.stack([self._loss_sums[leaf] for leaf in leaves]) / count).to(dtype)
        accuracy = (torch.stack([self._correct[leaf] for leaf in leaves]).double() / count).to(dtype)
        top_k = None
        if k is not None:
            finite = int(torch.isfinite(losses).sum())
            if finite < k:
                warnings.warn(
                    f"evaluate_paths: only {finite} of {len(leaves)} paths have a finite loss, fewer than k={k}; "
                    f"top_k names others after them",
                    RuntimeWarning,
                    stacklevel=3,
                )
            top_k = ops.select_top_k(losses, k)
        image_losses = None
        if self._per_image:
            image_losses = torch.stack([torch.cat(self._image_losses[leaf]) for leaf in leaves])
        assert self._macs is not None
        per_layer = self._trie.nodes_per_layer()
        plan = EvaluationPlan(
            len(leaves), self._trie.num_layers, sum(per_layer), per_layer, self._traversal, *self._macs, self._split
        )
        profile = self._profile.stages() if self._profiling else None
        return PathEvaluation(losses, accuracy, top_k, image_losses, plan, self._statistics(micro_batch), profile)

    def _statistics(self, micro_batch: int | None) -> str:
        if self._bn == "recalibrated":
            return "constants from the calibration images"
        if self._bn == "running" and not self._interceptor.needs_batch:
            return "running statistics"
        sizes = sorted(set(self._image_counts))
        span = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        why = "" if micro_batch is None else f" (micro_batch={micro_batch})"
        text = f"batch statistics of {span} images at a time{why}"
        return text if self._bn == "batch" else f"running statistics; where none are stored, {text}"

    def _score(self, targets: Tensor, leaves: Sequence[int], logits: Tensor) -> None:
        since = self._profile.now()
        classes = logits.shape[-1]
        if int(targets.max()) >= classes:
            raise ValueError(f"targets: expected classes below {classes} (the head's logits), got {int(targets.max())}")
        _, image_losses, correct = ops.path_cross_entropy(logits, targets, self._label_smoothing)
        self._result_dtype = image_losses.dtype
        self._profile.add("loss", since, 0, image_losses.numel() * image_losses.element_size())
        for position, leaf in enumerate(leaves):
            losses = image_losses[position]
            if self._per_image:
                self._image_losses.setdefault(leaf, []).append(losses)
            self._loss_sums[leaf] = self._loss_sums.get(leaf, 0) + losses.double().sum()
            self._correct[leaf] = self._correct.get(leaf, 0) + correct[position]

    def _choose_traversal(self, argument: str, images: Tensor, safe_point: Callable[[], None]) -> tuple[str, int, int]:
        """(traversal, number of parts of the batch, bytes for gathering logits) within `max_memory`."""
        budget, count = self._max_memory, len(images)
        if budget is None:
            return "depth-first", 1, _LOGITS_BYTES

        def may_split() -> bool:
            # Known once operations have run: with "running" one may have no statistics stored.
            by_images = self._bn == "recalibrated" or (self._bn == "running" and not self._interceptor.needs_batch)
            return argument == "images" and by_images

        key = (images.shape[1:], images.dtype, count > 1)
        if key not in self._estimates:
            self._estimates[key] = estimate_memory(
                self._chain,
                self._trie,
                self._interceptor,
                images,
                self._cast,
                lambda of_one: may_split() and of_one.needed("depth-first", 2) > budget,
                safe_point,
            )
        estimate = self._estimates[key]
        for traversal in ("layer-by-layer", "depth-first"):
            needed = estimate.needed(traversal, count)
            if needed <= budget:
                return traversal, 1, min(_LOGITS_BYTES, budget - needed)
        fitting = estimate.images_within("depth-first", budget)
        if may_split() and fitting > 0:
            return "depth-first", math.ceil(count / fitting), 0
        smallest = estimate.needed("depth-first", 1 if may_split() else count)
        advice = ""
        if argument == "calibration":
            advice = "; fewer calibration images need less"
        elif not may_split():
            advice = "; fewer images, or micro_batch=, which changes the statistics, need less"
        raise ValueError(f"max_memory: expected at least {smallest} bytes for these paths, got {budget}{advice}")

    def _cast(self, images: Tensor) -> Tensor:
        dtype = self._dtype or images.dtype
        if self._precision == "fp32" or (self._precision == "bf16" and dtype != torch.bfloat16):
            dtype = torch.float32
        return images.to(dtype)

    @contextlib.contextmanager
    def _running(self, images: Tensor) -> Iterator[tuple[Runner, Callable[[], None]]]:
        if self._runner is None:
            self._profile = Profile(self._profiling, images.device)
            self._runner = Runner(self._chain, self._trie, self._modules, self._interceptor, self._profile)
        with (
            held_interrupts() as safe_point,
            undisturbed(self._modules, images.device),
            torch.no_grad(),
            _autocast(images.device, self._precision),
        ):
            yield self._runner, safe_point


class _LogitsGatherer:
    """Gathers leaves' logits so that the loss kernel works on several paths at once, within `limit` bytes."""

    def __init__(self, score: Callable[[Sequence[int], Tensor], None], limit: int) -> None:
        self._score = score
        self._limit = limit
        self._leaves: list[int] = []
        self._logits: list[Tensor] = []
        self._versions: list[int] = []

    def add(self, leaf: int, logits: Tensor) -> None:
        self._leaves.append(leaf)
        self._logits.append(logits)
        self._versions.append(version_of(logits))
        # Stacking holds them twice; with one more they shall not exceed the limit.
        if 2 * (len(self._logits) + 1) * logits.nbytes > self._limit:
            self.flush()

    def flush(self) -> None:
        if list(map(version_of, self._logits)) != self._versions:
            raise RuntimeError(
                "supernet.head: expected logits of its own, got some that were written to while they were still "
                "needed; a head that keeps its output's memory has to register it as a buffer"
            )
        if self._leaves:
            self._score(self._leaves, torch.stack(self._logits))
        self._leaves, self._logits, self._versions = [], [], []


def _casts(precision: str | None) -> tuple[torch.dtype | None, frozenset[torch.dtype]]:
    """Which arguments of arithmetic on weights are cast, and to what; autocast does the rest for bf16."""
    if precision == "fp32":
        return torch.float32, frozenset({torch.bfloat16, torch.float16, torch.float64})
    if precision == "bf16":
        return torch.float32, frozenset({torch.float16, torch.float64})
    return None, frozenset()


def _autocast(device: torch.device, precision: str | None) -> contextlib.AbstractContextManager[Any]:
    """The autocast state for `precision`.

    Weights that autocast keeps as bfloat16 outlive the operation that cast them, so one kept without gradients would
    be found by a training step in the same autocast region: nothing is kept.
    """
    active = torch.is_autocast_enabled(device.type)
    if precision == "fp32":
        return torch.autocast(device.type, enabled=False) if active else contextlib.nullcontext()
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)
    if active:
        dtype = torch.get_autocast_dtype(device.type)
        return torch.autocast(device.type, dtype=dtype, cache_enabled=False)
    return contextlib.nullcontext()
