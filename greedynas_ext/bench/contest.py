"""One case, measured: `evaluate_paths` against every PyTorch way to the same losses that we know of.

All ways are warmed up (compiled ones are compiled), their losses compared with accurate ones (nothing is timed where
one is wrong), and timed once; the plain loop, and those within 1.5 times the fastest of their kind, are then timed in
interleaved rounds. "plain" is the loop that people write, "loop" the fastest way that evaluates each path by itself,
"sharing" the fastest that computes common prefixes once, as nobody's PyTorch code does unless written for it. A ratio
is the median over rounds of the ratios within each, with quartiles. Errors, in nats, are against those accurate losses
as well; see `ways.reference_losses`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from greedynas_ext.bench import ceilings
from greedynas_ext.bench.cases import Case
from greedynas_ext.bench.inputs import make_images, make_targets, paths_from
from greedynas_ext.bench.measure import Spread, Times, interleave, machine, time_once
from greedynas_ext.bench.ours import evaluate
from greedynas_ext.bench.subjects import Subject, subject_of
from greedynas_ext.bench.ways import WAYS, Way, reference_losses
from greedynas_ext.explain import explain

OURS, MODULES = "evaluate_paths", "evaluate_paths, modules"
_OURS_TOLERANCE = 1e-3  # nats, of losses near 8, in fp32; for the rest see `tolerance`
_PLAIN = {"fp32": ("eager, fp32", "own forward, fp32"), "bf16": ("eager, autocast", "own forward, autocast")}
_CONTENDER = 1.5  # ways slower than the fastest of their kind by more than this are not timed in rounds


def ways_of(case: Case, supernet: Any, compiled: bool) -> list[Way]:
    """The PyTorch ways that a case is measured against, of its precision and policy."""
    return [
        way
        for way in WAYS
        if way.precision == case.precision
        and case.bn in way.policies
        and (compiled or not way.compiled)
        and way.serves(supernet)
    ]


def tolerance(precision: str, plain_error: float) -> float:
    """How far from the reference a PyTorch loss may be, in nats: three times as far as that of the plain loop.

    That one's own error is measured since it depends on the sizes: the batch normalisation of PyTorch in channels_last
    adds up many numbers in float32, which alone costs 2e-3 at 32 images of 224x224. In bfloat16 autocast's counts.
    """
    return max({"fp32": 1e-3, "bf16": 2e-2}[precision], 3 * plain_error)


def errors_of(losses: dict[str, list[float]], reference: list[float]) -> dict[str, float]:
    """Largest absolute difference of each way's losses to the reference; NaN where one is."""
    exact = torch.tensor(reference, dtype=torch.float64)
    differences = {name: torch.tensor(given, dtype=torch.float64) - exact for name, given in losses.items()}
    return {name: float(difference.abs().max()) for name, difference in differences.items()}


def check_agreement(errors: dict[str, float], allowed: dict[str, float]) -> None:
    """Refuses to time ways that do not compute the same.

    Raises:
        ValueError: naming those that differ by more than is allowed to them.
    """
    differing = [
        f"{name} by {error:.3g}, more than {allowed[name]:.3g}"
        for name, error in errors.items()
        if not error <= allowed[name]
    ]
    if differing:
        raise ValueError(
            f"losses: expected those of the reference, got other ones: {'; '.join(differing)}; nothing is timed"
        )


def contenders(seconds: dict[str, float], ways: list[Way], plain: str) -> list[str]:
    """Names of the ways worth timing in rounds: the plain loop, the fastest of each kind, and what came near it."""
    chosen = [plain]
    for shares in (False, True):
        kind = [way.name for way in ways if way.shares == shares]
        fastest = min((seconds[name] for name in kind), default=0.0)
        chosen += [name for name in kind if name != plain and seconds[name] <= _CONTENDER * fastest]
    return chosen


def run_case(case: Case, rounds: int, compiled: bool, quick: bool = False) -> dict[str, Any]:
    """Measures one case in this process.

    Args:
        case: the case.
        rounds: interleaved rounds, at least 2.
        compiled: whether ways under torch.compile take part.
        quick: ceilings on small matrices, which say nothing of the machine.

    Returns:
        What there is to know, fit for JSON.
    """
    subject, device = subject_of(case), torch.device(case.device)
    supernet = subject.supernet
    images = make_images(case.images, subject.channels, subject.resolution).to(device)
    targets = make_targets(case.images, subject.classes).to(device)
    paths = paths_from(case.source, case.paths, subject.sizes, subject.name)
    ways = ways_of(case, supernet, compiled)
    plain = next(name for name in _PLAIN[case.precision] if any(way.name == name for way in ways))
    calls: dict[str, Callable[[], list[float]]] = {
        way.name: way.make(supernet, paths, images, targets, case.bn) for way in ways
    }
    for name, fused in ((OURS, True if case.fused else None), (MODULES, False)):
        calls[name] = partial(_ours, supernet, paths, images, targets, case, fused)

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    reference = reference_losses(supernet, paths, images, targets, case.bn)
    errors = errors_of({name: call() for name, call in calls.items()}, reference)
    allowed = dict.fromkeys(calls, tolerance(case.precision, errors[plain]))
    if case.precision == "fp32":
        allowed[OURS] = _OURS_TOLERANCE
    check_agreement(errors, allowed)

    once = {way.name: time_once(calls[way.name]) for way in ways}
    timed = contenders(once, ways, plain)
    times = interleave({name: calls[name] for name in [*timed, OURS, MODULES]}, rounds)
    kinds = {
        shares: [way.name for way in ways if way.shares == shares and way.name in timed] for shares in (False, True)
    }
    best = {"plain": plain, "loop": times.fastest(kinds[False])}
    if kinds[True]:
        best["sharing"] = times.fastest(kinds[True])
    return {
        "case": asdict(case),
        "rounds": rounds,
        "compiled_ways": compiled,
        **best,
        "milliseconds": {name: asdict(_scaled(times.spread(name))) for name in times.seconds},
        **{f"ratio_{kind}": asdict(times.ratio(name, OURS)) for kind, name in best.items()},
        **_work(case, subject, paths, images, times, quick),
        "errors": errors,
        "tolerances": allowed,
        "seconds": times.seconds,
        "seconds_once": once,
        "machine": machine(),
    }


def _ours(
    supernet: Any, paths: torch.Tensor, images: torch.Tensor, targets: torch.Tensor, case: Case, fused: bool | None
) -> list[float]:
    losses: list[float] = evaluate(supernet, paths, images, targets, case.bn, case.precision, fused).losses.tolist()
    return losses


def _work(
    case: Case, subject: Subject, paths: torch.Tensor, images: torch.Tensor, times: Times, quick: bool
) -> dict[str, Any]:
    """What was computed, and how near that came to the machine's ceilings."""
    plan = explain(subject.supernet, paths, images, bn=case.bn, precision=case.precision)  # type: ignore[arg-type]
    found = ceilings.measure(images.device, case.precision, *((256, 1 << 20) if quick else ()))
    seconds = times.spread(OURS).median
    moved = 2 * len(images) * sum(stage.written for stage in plan.stages)
    return {
        "kernels": plan.kernels,
        "macs_left": 1.0 - plan.shared_fraction,
        "macs_fused": plan.fused_fraction,
        "ceilings": asdict(found),
        "of_ceilings": {
            "products": len(images) * plan.macs_computed / seconds / found.macs,
            "memory": moved / seconds / found.bytes,
        },
    }


def _scaled(spread: Spread) -> Spread:
    return Spread(spread.median * 1e3, spread.lower * 1e3, spread.upper * 1e3)
