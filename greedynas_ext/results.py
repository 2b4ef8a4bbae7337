"""What an evaluation found, and how the losses of images become it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from greedynas_ext import ops
from greedynas_ext.arguments import Chain
from greedynas_ext.fused import FusedEngine
from greedynas_ext.module_engine import ModuleEngine
from greedynas_ext.plan import EvaluationPlan, Trie
from greedynas_ext.profile import StageProfile


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
        profile: time, operations and bytes by stage and its parts, on request.
    """

    losses: Tensor
    accuracy: Tensor
    top_k: Tensor | None
    image_losses: Tensor | None
    plan: EvaluationPlan
    statistics: str
    profile: tuple[StageProfile, ...] | None


class Sums:
    """What the engine finds for each leaf of the trie, summed over images on their device."""

    def __init__(self, trie: Trie, per_image: bool) -> None:
        self._trie, self._per_image = trie, per_image
        self._losses: dict[int, Tensor] = {}
        self._correct: dict[int, Tensor] = {}
        self._image_losses: dict[int, list[Tensor]] = {}  # only on request
        self._dtype = torch.float32
        self.sizes: list[int] = []  # of the parts of batches

    def add(self, leaves: Sequence[int], image_losses: Tensor, correct: Tensor) -> None:
        """`image_losses` [leaves, n] and `correct` [leaves] of n images."""
        self._dtype = image_losses.dtype
        totals = image_losses.double().sum(1)
        for position, leaf in enumerate(leaves):
            if self._per_image:
                self._image_losses.setdefault(leaf, []).append(image_losses[position])
            self._losses[leaf] = self._losses.get(leaf, 0) + totals[position]
            self._correct[leaf] = self._correct.get(leaf, 0) + correct[position]

    def means(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Losses [m], accuracy [m], and, on request, losses of images [m, N]."""
        leaves = self._trie.leaf_of_path
        count = sum(self.sizes)
        losses = (torch.stack([self._losses[leaf] for leaf in leaves]) / count).to(self._dtype)
        accuracy = (torch.stack([self._correct[leaf] for leaf in leaves]).double() / count).to(self._dtype)
        image_losses = None
        if self._per_image:
            image_losses = torch.stack([torch.cat(self._image_losses[leaf]) for leaf in leaves])
        return losses, accuracy, image_losses


def result_of(
    chain: Chain,
    trie: Trie,
    engine: FusedEngine | ModuleEngine,
    sums: Sums,
    *,
    k: int | None,
    bn: str,
    micro_batch: int | None = None,
    profile: bool = False,
) -> PathEvaluation:
    """What `engine` found, once all batches have been evaluated into `sums`."""
    losses, accuracy, image_losses = sums.means()
    engine.check()
    per_layer = chain.nodes_per_column(trie.nodes_per_layer())
    plan = EvaluationPlan(
        len(trie.leaf_of_path),
        len(per_layer),
        sum(per_layer),
        per_layer,
        engine.traversal,
        *engine.macs(),
        engine.split,
        engine.kernels,
        engine.macs_fused(),
    )
    return PathEvaluation(
        losses,
        accuracy,
        _top_k(losses, k),
        image_losses,
        plan,
        _statistics_in_words(bn, engine.needs_batch, sums.sizes, micro_batch),
        engine.profile(sum(sums.sizes)) if profile else None,
    )


def _top_k(losses: Tensor, k: int | None) -> Tensor | None:
    if k is None:
        return None
    finite = int(torch.isfinite(losses).sum())
    if finite < k:
        warnings.warn(
            f"evaluate_paths: only {finite} of {len(losses)} paths have a finite loss, fewer than k={k}; "
            f"top_k names others after them",
            RuntimeWarning,
            stacklevel=4,
        )
    return ops.select_top_k(losses, k)


def _statistics_in_words(bn: str, needs_batch: bool, sizes: Sequence[int], micro_batch: int | None) -> str:
    if bn == "recalibrated":
        return "constants from the calibration images"
    if bn == "running" and not needs_batch:
        return "running statistics"
    distinct = sorted(set(sizes))
    span = str(distinct[0]) if len(distinct) == 1 else f"{distinct[0]} to {distinct[-1]}"
    why = "" if micro_batch is None else f" (micro_batch={micro_batch})"
    text = f"batch statistics of {span} images at a time{why}"
    return text if bn == "batch" else f"running statistics; where none are stored, {text}"
