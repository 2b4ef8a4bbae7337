"""`explain`: what `evaluate_paths` would run fused, what not and why, what it shares, and where the time would go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from greedynas_ext import arguments, evaluate
from greedynas_ext.adapted import WholeSupernet
from greedynas_ext.arguments import Chain, SupernetLike
from greedynas_ext.checks import check_count
from greedynas_ext.evaluate import Decision
from greedynas_ext.explanation import ExplainedOperation, ExplainedStage, Explanation
from greedynas_ext.fused import refused
from greedynas_ext.fused_chain import Description, Part
from greedynas_ext.isolation import held_interrupts
from greedynas_ext.plan import STEM
from greedynas_ext.work import Cost, Work

# Multiply-accumulates that take as long as writing a byte of a map and reading it again.
_MACS_PER_BYTE = {"fp64": 4.0, "fp32": 8.0, "bf16": 32.0, "fp16": 32.0}


def explain(
    supernet: SupernetLike,
    paths: Tensor | Sequence[Sequence[int]],
    images: Tensor | None = None,
    *,
    resolution: int | tuple[int, int] | None = None,
    bn: Literal["batch", "running", "recalibrated"] = "batch",
    precision: Literal["fp32", "bf16", "fp16"] | None = None,
    fused: bool | None = None,
) -> Explanation:
    """Says what `evaluate_paths` would do with the same arguments, layer by layer, without evaluating.

    The decisions are those of `evaluate_paths`, made by the same code, and so are `kernels` and the counts of
    multiply-accumulates. What modules cost is counted while each node of the plan runs once on two images; what the
    fused engine costs follows from shapes. An adapted supernet is not compared with its own forward here (`verify` does
    that). Calibration images, with bn="recalibrated", are taken to be as large as the images.

    The expected share of time is a model: multiply-accumulates, plus 8 in float32 (4 in float64, 32 with 16 bits) for
    each byte that is written to a map and read again. It knows nothing of caches, instruction sets, or how well a
    shape suits the kernels. On 2 cores of a Xeon with AMX it gave 4% to 15% of the time in float32, and 12% to 32% in
    bfloat16, to another stage than took it (`mbv2-7`, `mini-28`, `mini-16`); `evaluate_paths(..., profile=True)`
    measures.

    Args:
        supernet: as for `evaluate_paths`.
        paths: int64 [m, layers] or nested lists.
        images: floating [N, C, H, W] on the supernet's device, of which the first two are used.
        resolution: instead of images, their height and width, or one number for both; their channels are those of the
            first convolution of the stem.
        bn: "batch", "running" or "recalibrated".
        precision: None, "fp32", "bf16" or "fp16".
        fused: None, False or True, which raises ValueError where `evaluate_paths` would.

    Returns:
        Explanation: `str` of it is a table, `as_dict()` plain data.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
        RuntimeError: where an adapted supernet has changed since.
    """
    given = Chain.of(supernet)
    checked = arguments.check_paths(paths, given)
    chain, operations = evaluate.planned(supernet, given, checked)
    arguments.check_one_of("bn", bn, ("batch", "running", "recalibrated"))
    modules = chain.modules_of(operations)
    device, dtype = evaluate.device_and_dtype(modules)
    arguments.check_precision(precision, device or torch.device("cpu"))
    few = _few_images(images, resolution, modules, device, dtype)
    decision = evaluate.decided(chain, operations, modules, few, None, bn, precision, fused)
    engine = evaluate.engine_for(decision, bn, 0.0, precision, None, profile=False)
    work = engine.work(few)
    per_layer = chain.nodes_per_column(decision.trie.nodes_per_layer())
    return Explanation(
        len(checked),
        len(per_layer),
        (int(few.shape[2]), int(few.shape[3])),
        sum(per_layer),
        per_layer,
        engine.kernels,
        *work.macs(decision.trie),
        work.macs_fused(),
        _stages(decision, work, _Reasons(decision, few, work, engine.unfused)),
    )


def _few_images(
    images: Tensor | None,
    resolution: int | tuple[int, int] | None,
    modules: Sequence[nn.Module],
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> Tensor:
    """[2, C, H, W], or [1, C, H, W] where there is one: one in a map of one pixel has no statistics."""
    if (images is None) == (resolution is None):
        raise TypeError("images: expected either images or resolution=, got " + ("none" if images is None else "both"))
    if images is not None:
        return arguments.check_images("images", images, device)[:2]
    sides = resolution if isinstance(resolution, tuple) else (resolution, resolution)
    if len(sides) != 2:
        raise ValueError(f"resolution: expected a number or (height, width), got {resolution!r}")
    for side in sides:
        check_count("resolution", side, 1)
    weights = (inner.weight.shape[1] * inner.groups for module in modules for inner in _convolutions(module))
    channels = next(weights, None)
    if channels is None:
        raise TypeError("images: expected images, since no convolution says how many channels they have, got none")
    return torch.zeros(2, channels, *sides, device=device, dtype=dtype or torch.float32)  # type: ignore[arg-type]


def _convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [inner for inner in module.modules() if isinstance(inner, nn.Conv2d)]


class _Reasons:
    """Why parts do not run fused; None where they do."""

    def __init__(self, decision: Decision, images: Tensor, work: Work, unfused: Mapping[str, str] | None) -> None:
        """`unfused`: the engine's own."""
        self._decision, self._work, self._unfused = decision, work, unfused
        self._problems: dict[Part, str] = {}
        looked_at = (
            unfused is None
            and decision.described != decision.beside
            and not isinstance(decision.chain, WholeSupernet)
            and refused(images, decision.kind, decision.device) is None
        )
        if looked_at:
            with held_interrupts(), torch.no_grad():
                description = Description(decision.chain, decision.trie, decision.device)
                for part, problem in description.problems():
                    self._problems.setdefault(part, problem)

    def of(self, part: Part, place: str, costs: list[tuple[Cost, int]]) -> str | None:
        """Of an operation (layer, op), "stem" or "head" at `place`, that costs as much."""
        described = self._decision.described
        if self._work.whole or any(cost.by_kernels for cost, _ in costs):
            return None
        assert isinstance(described, str)
        if self._unfused is not None:
            multiplies = any(cost.macs for cost, _ in costs)
            other = "recognised, but not what its fused kernel takes" if multiplies else "nothing to multiply"
            return self._unfused.get(place, other)
        if part in self._problems:
            return self._problems[part].split(": ", 1)[1]
        if isinstance(self._decision.chain, WholeSupernet) or not self._problems:
            return described
        return self._decision.beside or described


def _stages(decision: Decision, work: Work, reasons: _Reasons) -> tuple[ExplainedStage, ...]:
    """Stem, layers and head, in the order of a path."""
    trie, chain = decision.trie, decision.chain
    paths = len(trie.leaf_of_path)
    through = [0] * len(trie.nodes)  # paths that go through each node
    for leaf in trie.leaf_of_path:
        number = leaf
        while number != STEM:
            through[number] += 1
            number = trie.nodes[number].parent
    weight = _MACS_PER_BYTE.get(decision.kind, _MACS_PER_BYTE["fp32"])
    effort = sum(_effort(cost, weight) for cost in (work.stem, *work.nodes, *work.heads.values()))

    def operation(part: Part, name: str, costs: list[tuple[Cost, int]]) -> ExplainedOperation:
        macs = sum(cost.macs for cost, _ in costs)
        return ExplainedOperation(
            name,
            len(costs),
            sum(count for _, count in costs),
            macs,
            sum(cost.macs * count for cost, count in costs),
            sum(cost.fused for cost, _ in costs),
            sum(cost.written for cost, _ in costs),
            sum(_effort(cost, weight) for cost, _ in costs) / max(1.0, effort),
            reasons.of(part, name, costs),
        )

    used: dict[tuple[int, int], list[tuple[Cost, int]]] = {}
    for node, cost, count in zip(trie.nodes, work.nodes, through, strict=True):
        used.setdefault((node.layer, node.op), []).append((cost, count))
    heads = [(work.heads[leaf], through[leaf]) for leaf in sorted(work.heads)]
    stages = [ExplainedStage.of("stem", [operation("stem", "supernet.stem", [(work.stem, paths)])])]
    for layer in range(trie.num_layers):
        ops = [
            operation((layer, op), chain.place(layer, op), used[layer, op])
            for op in range(len(chain.choices[layer]))
            if (layer, op) in used
        ]
        stages.append(ExplainedStage.of(chain.stage(layer), ops))
    stages.append(ExplainedStage.of("head", [operation("head", "supernet.head", heads)]))
    return tuple(stages)


def _effort(cost: Cost, macs_per_byte: float) -> float:
    return cost.macs + macs_per_byte * cost.written
