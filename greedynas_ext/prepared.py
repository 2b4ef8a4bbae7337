"""`prepare_paths`: an evaluation that is launched again and again, by itself or as a CUDA graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from greedynas_ext import arguments, evaluate
from greedynas_ext.adapted import AdaptedSupernet
from greedynas_ext.arguments import Chain, SupernetLike
from greedynas_ext.fused import FusedEngine, fused_precision
from greedynas_ext.fused_chain import FusedChain
from greedynas_ext.isolation import held_interrupts
from greedynas_ext.plan import Trie
from greedynas_ext.results import PathEvaluation, Sums, result_of


class PreparedEvaluation:
    """Fixed paths of a supernet on fixed tensors; what is in the tensors, and in the weights, may change.

    Made by `prepare_paths`. On a GPU `launch` waits for nothing and reads nothing back, so it can be captured:

        prepared = prepare_paths(supernet, paths, images, targets, k=5, precision="bf16")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            prepared.launch()
        ...                        # train; images.copy_(next_images)
        graph.replay()
        result = prepared.result()

    Weights are packed, and statistics taken, in every launch and every replay: losses are of the weights as they were
    then. `result` raises an error where the supernet's parameters have moved to other memory, so that a graph cannot
    go on with what they have left.
    """

    def __init__(
        self,
        supernet: SupernetLike,
        paths: Tensor,
        operations: Tensor,
        trie: Trie,
        engine: FusedEngine,
        device: torch.device,
        images: Tensor,
        targets: Tensor,
        calibration: Tensor | None,
        *,
        k: int | None,
        bn: str,
        per_image: bool,
    ) -> None:
        self._supernet, self._paths, self._device = supernet, paths, device
        self._operations, self._trie, self._engine = operations, trie, engine
        self._images, self._targets, self._calibration = images, targets, calibration
        self._k, self._bn, self._per_image = k, bn, per_image
        self._captured = False
        engine.hold_weights()
        self.launch()

    def launch(self) -> None:
        """Computes the losses; on a GPU on the current stream, without waiting.

        Raises:
            RuntimeError: after a launch that was captured: its graph is what can be replayed.
            ValueError: on a CPU, for images that are not finite and targets out of range; on a GPU `result` does.
        """
        if self._captured:
            raise RuntimeError("launch: expected no launch after one that a CUDA graph has captured; replay the graph")
        self._captured = self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        engine = self._engine
        engine.pack_again()
        if self._calibration is not None:
            engine.check_values("calibration", self._calibration, None)
            engine.calibrate(self._calibration)
        self._sums = Sums(self._trie, self._per_image)
        engine.check_values("images", self._images, self._targets)
        self._sums.sizes += engine.evaluate(self._images, self._targets, self._sums.add)

    def result(self) -> PathEvaluation:
        """What the last launch or replay found, on a GPU once it is done; the current stream has to be behind it.

        Raises:
            RuntimeError: where the supernet's operations, or the memory of its parameters, are not those that were
                prepared.
            ValueError: on a GPU, for images that are not finite and targets out of range.

        Warns:
            RuntimeWarning: where fewer than `k` losses are finite.
        """
        chain, operations = evaluate.planned(self._supernet, Chain.of(self._supernet), self._paths)
        described: FusedChain | str = "paths run other operations"
        if torch.equal(operations, self._operations):
            with held_interrupts(), torch.no_grad():
                described = FusedChain.of(chain, self._trie, self._device)
        if isinstance(described, str) or not self._engine.reads_what(described):
            why = f": {described}" if isinstance(described, str) else ""
            raise RuntimeError(
                f"supernet: expected the operations and parameters, in the same memory, that were prepared; "
                f"prepare again{why}"
            )
        return result_of(chain, self._trie, self._engine, self._sums, k=self._k, bn=self._bn)


def prepare_paths(
    supernet: SupernetLike,
    paths: Tensor | Sequence[Sequence[int]],
    images: Tensor,
    targets: Tensor,
    *,
    k: int | None = None,
    bn: Literal["batch", "running", "recalibrated"] = "batch",
    calibration: Tensor | None = None,
    label_smoothing: float = 0.0,
    precision: Literal["fp32", "bf16", "fp16"] | None = None,
    max_memory: int | None = None,
    per_image: bool = False,
) -> PreparedEvaluation:
    """Recognises a supernet and plans the evaluation of m paths once, for many evaluations; launches the first.

    The arguments are those of `evaluate_paths`, and so are the losses. `images`, `targets` and `calibration` are read
    in place by every launch: write the next ones into them. Of the supernet too what is read is the memory that its
    parameters have now.

    Args:
        supernet: one that the fused kernels can evaluate.
        paths: int64 [m, layers].
        images: floating [N, C, H, W] on the supernet's device.
        targets: int64 [N].
        k: how many paths of lowest loss `top_k` names.
        bn: "batch", "running" or "recalibrated".
        calibration: floating [M, C, H, W], with bn="recalibrated" only.
        label_smoothing: of the cross-entropy, in [0, 1].
        precision: None, "fp32", "bf16" or "fp16".
        max_memory: bytes for activations and working memory.
        per_image: also return the loss of each image.

    Returns:
        PreparedEvaluation, launched once.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    given = Chain.of(supernet)
    checked_paths = arguments.check_paths(paths, given)
    chain, operations = evaluate.planned(supernet, given, checked_paths)
    arguments.check_top_k(k, len(checked_paths))
    evaluate.check_options(bn, calibration, label_smoothing, max_memory)
    device, dtype = evaluate.device_and_dtype(chain.modules_of(operations))
    where = device or torch.device("cpu")
    arguments.check_precision(precision, where)
    images = arguments.check_images("images", images, device)
    targets = arguments.check_targets(targets, images).detach()
    if calibration is not None:
        calibration = arguments.check_images("calibration", calibration, device)
    trie = Trie(operations)
    kind = fused_precision(dtype, precision, where.type)
    described = evaluate.description(chain, trie, images, calibration, kind, bn, where)
    if isinstance(described, str):
        raise ValueError(f"supernet: expected one that the fused kernels can evaluate; {described}")
    if isinstance(supernet, AdaptedSupernet):
        supernet.before_batch(images)
    engine = evaluate.fused_engine(described, trie, where, kind, bn, label_smoothing, max_memory, profile=False)
    return PreparedEvaluation(
        supernet,
        checked_paths,
        operations,
        trie,
        engine,
        where,
        images,
        targets,
        calibration,
        k=k,
        bn=bn,
        per_image=per_image,
    )
