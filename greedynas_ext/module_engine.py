"""The module engine: every operation runs its own forward, each unique prefix of the paths once."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from greedynas_ext import arguments, ops
from greedynas_ext.arguments import Chain
from greedynas_ext.fused_operation import with_fused_parts
from greedynas_ext.intercept import Interceptor, Normalisation
from greedynas_ext.isolation import held_interrupts, undisturbed, version_of
from greedynas_ext.memory import MemoryEstimate, estimate_memory
from greedynas_ext.plan import Trie
from greedynas_ext.profile import Profile, StageProfile
from greedynas_ext.ranges import named
from greedynas_ext.runner import Runner
from greedynas_ext.work import Traffic, Work

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_LOGITS_BYTES = 64 << 20  # logits are gathered up to this size before their loss is computed


class ModuleEngine:
    """Evaluates the paths of `trie` on batches of images.

    Attributes:
        traversal: of the last batch.
        split: the most parts that a batch was evaluated in.
        kernels: what computes, in words.
        unfused: why parts run as modules beside fused ones, by their places; None where no fused kernel runs.
    """

    def __init__(
        self,
        chain: Chain,
        trie: Trie,
        modules: Sequence[nn.Module],
        dtype: torch.dtype | None,
        bn: str,
        label_smoothing: float,
        precision: str | None,
        max_memory: int | None,
        profiling: bool,
        reason: str,
        fuses: str | None = None,
    ) -> None:
        """`reason`: why the fused engine is not used; `fuses`: in which precision fused kernels run what they can."""
        self._chain, self._trie, self._modules, self._dtype = chain, trie, modules, dtype
        self._bn, self._label_smoothing, self._precision = bn, label_smoothing, precision
        self._max_memory, self._profiling = max_memory, profiling
        cast_to, cast_from = _casts(precision)
        self._interceptor = Interceptor(cast_to, cast_from)
        self.unfused: dict[str, str] | None = None
        if fuses is not None:
            used = {(node.layer, node.op) for node in trie.nodes}
            with held_interrupts(), torch.no_grad():
                self._chain, self.unfused = with_fused_parts(chain, used, fuses, self._interceptor)
        self._runner: Runner | None = None
        self._profile: Profile
        self._estimates: dict[tuple[torch.Size, torch.dtype, bool], MemoryEstimate] = {}
        self._work: Work | None = None
        self.traversal, self.split = "depth-first", 1
        self.kernels = _in_words(reason, self.unfused)

    @property
    def needs_batch(self) -> bool:
        """Whether a batch normalisation ran that stored statistics do not serve."""
        return self._interceptor.needs_batch

    def calibrate(self, images: Tensor) -> None:
        """One pass whose batch statistics become the constants of each node."""
        with self._running(images) as (runner, safe_point):
            traversal, _, _ = self._choose_traversal("calibration", images, safe_point)
            runner.run(self._cast(images), traversal, "capture", lambda leaf, logits: None, safe_point)

    def evaluate(
        self, images: Tensor, targets: Tensor, on_scores: Callable[[Sequence[int], Tensor, Tensor], None]
    ) -> list[int]:
        """Calls `on_scores(leaves, image_losses [leaves, n], correct [leaves])` for parts of n images; their sizes."""
        normalisation: Normalisation = {"batch": "batch", "running": "running", "recalibrated": "constants"}[self._bn]  # type: ignore[assignment]
        sizes = []
        with self._running(images) as (runner, safe_point):
            self.traversal, split, gathered = self._choose_traversal("images", images, safe_point)
            self.split = max(self.split, split)
            for part, part_targets in zip(images.tensor_split(split), targets.tensor_split(split), strict=True):
                gather = _LogitsGatherer(functools.partial(self._score, part_targets, on_scores), gathered)
                runner.run(self._cast(part), self.traversal, normalisation, gather.add, safe_point)
                gather.flush()
                sizes.append(len(part))
            if self._work is None:
                self._work = self._work_of(runner)
        return sizes

    def work(self, images: Tensor) -> Work:
        """What each part costs, counted while it runs on `images` [N, C, H, W]; no losses are computed.

        Constants, for "recalibrated", are taken to be the statistics of these images.
        """
        policy: Normalisation = "running" if self._bn == "running" else "batch"
        with self._running(images) as (runner, safe_point), Traffic(self._bn == "batch") as traffic:
            runner.run(self._cast(images), "depth-first", policy, lambda leaf, logits: None, safe_point, traffic)
        return self._work_of(runner)

    def _work_of(self, runner: Runner) -> Work:
        return Work(runner.stem_cost, list(runner.node_costs), dict(runner.head_costs), whole=False)

    def check_values(self, name: str, images: Tensor, targets: Tensor | None) -> None:
        """Raises ValueError for values that are not allowed in what is evaluated next."""
        arguments.check_values(name, images, targets)

    def check(self) -> None:
        """Raises what is known only when all is computed: nothing."""

    def macs(self) -> tuple[int, int]:
        """Of one image: (computed, saved)."""
        assert self._work is not None
        return self._work.macs(self._trie)

    def macs_fused(self) -> int:
        """Of those computed."""
        assert self._work is not None
        return self._work.macs_fused()

    def profile(self, images: int) -> tuple[StageProfile, ...]:
        """Time, operations and bytes by stage, over all batches; of `images` in all."""
        return self._profile.stages()

    def _score(
        self,
        targets: Tensor,
        on_scores: Callable[[Sequence[int], Tensor, Tensor], None],
        leaves: Sequence[int],
        logits: Tensor,
    ) -> None:
        since = self._profile.now()
        classes = logits.shape[-1]
        if int(targets.max()) >= classes:
            raise ValueError(f"targets: expected classes below {classes} (the head's logits), got {int(targets.max())}")
        with named("loss", logits.device):
            _, image_losses, correct = ops.path_cross_entropy(logits, targets, self._label_smoothing)
        self._profile.add("loss", since, 0, image_losses.numel() * image_losses.element_size(), "loss")
        on_scores(leaves, image_losses, correct)

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
        if self._precision is not None and dtype != _AUTOCAST.get(self._precision):
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


def _in_words(reason: str, unfused: dict[str, str] | None) -> str:
    """What computes. `unfused`: why parts of the chain run as modules where others are fused; None: all do."""
    if unfused is None:
        return f"modules: {reason}"
    if not unfused:
        return f"fused part by part: {reason}"
    more = f" (and {len(unfused) - 1} more)" if len(unfused) > 1 else ""
    place, why = next(iter(unfused.items()))
    return f"partly fused; modules: {place}: {why}{more}"


def _casts(precision: str | None) -> tuple[torch.dtype | None, frozenset[torch.dtype]]:
    """Which arguments of arithmetic on weights are cast, and to what; autocast does the rest for bf16 and fp16."""
    if precision is None:
        return None, frozenset()
    return torch.float32, frozenset({torch.bfloat16, torch.float16, torch.float64}) - {_AUTOCAST.get(precision)}


def _autocast(device: torch.device, precision: str | None) -> contextlib.AbstractContextManager[Any]:
    """The autocast state for `precision`.

    Weights that autocast keeps rounded outlive the operation that cast them, so one kept without gradients would
    be found by a training step in the same autocast region: nothing is kept.
    """
    active = torch.is_autocast_enabled(device.type)
    if precision == "fp32":
        return torch.autocast(device.type, enabled=False) if active else contextlib.nullcontext()
    if precision in _AUTOCAST:
        return torch.autocast(device.type, dtype=_AUTOCAST[precision], cache_enabled=False)
    if active:
        dtype = torch.get_autocast_dtype(device.type)
        return torch.autocast(device.type, dtype=dtype, cache_enabled=False)
    return contextlib.nullcontext()
