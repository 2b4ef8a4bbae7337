"""How long `evaluate_paths` takes against every PyTorch way to the same losses that we know of.

Run: python bench/evaluate_paths.py [--case NAME ...] [--rounds 9] [--quick] [--tuned-malloc] [--output FILE.json]
     python bench/evaluate_paths.py --list

Each case runs in a process of its own. All ways are warmed up (compiled ones are compiled), their losses compared with
accurate ones (nothing is timed where one is wrong), and timed once; those within 1.5 times the fastest of their kind
are then timed in interleaved rounds. A ratio is the median over rounds of the ratios within each, with quartiles.
"loop" is the fastest way that evaluates each path by itself, "sharing" the fastest that computes common prefixes once,
as nobody's PyTorch code does unless written for it. Errors, in nats, are against those accurate losses as well; see
`ways.reference_losses`.

The environment stays as it is, OMP_WAIT_POLICY among it, and is recorded. --tuned-malloc runs the same with glibc told
to keep its memory, which helps whatever allocates large tensors: mostly PyTorch.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cases import CASES, ISA_LIMITS, Case
from inputs import make_images, make_paths, make_supernet, make_targets
from measure import Spread, interleave, machine, time_once
from ours import evaluate
from ways import WAYS, Way, reference_losses

from greedynas import get_space
from greedynas_ext.strict_json import write_json

TUNED_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_TOP_PAD_": "268435456"}
OURS, MODULES = "evaluate_paths", "evaluate_paths, modules"
OURS_TOLERANCE = 1e-3  # nats, of losses near 8, in fp32; for the rest see `tolerance`
BASELINE = {"fp32": "eager, fp32", "bf16": "eager, autocast"}
_CONTENDER = 1.5  # ways slower than the fastest of their kind by more than this are not timed in rounds


def ways_of(case: Case, compiled: bool) -> list[Way]:
    """The PyTorch ways that a case is measured against, of its precision and policy."""
    return [
        way
        for way in WAYS
        if way.precision == case.precision and case.bn in way.policies and (compiled or not way.compiled)
    ]


def tolerance(precision: str, baseline_error: float) -> float:
    """How far from the reference a PyTorch loss may be, in nats: three times as far as that of the eager loop.

    That one's own error is measured since it depends on the sizes: the batch normalisation of PyTorch in channels_last
    adds up many numbers in float32, which alone costs 2e-3 at 32 images of 224x224. In bfloat16 autocast's counts.
    """
    return max({"fp32": 1e-3, "bf16": 2e-2}[precision], 3 * baseline_error)


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


def contenders(seconds: dict[str, float], ways: list[Way]) -> list[str]:
    """Names of the ways worth timing in rounds: the fastest of each kind, and what came near it."""
    chosen = []
    for shares in (False, True):
        kind = [way.name for way in ways if way.shares == shares]
        fastest = min(seconds[name] for name in kind)
        chosen += [name for name in kind if seconds[name] <= _CONTENDER * fastest]
    return chosen


def run_case(case: Case, rounds: int, compiled: bool) -> dict[str, Any]:
    """Measures one case in this process."""
    space = get_space(case.space)
    supernet = make_supernet(space)
    images = make_images(case.images, space.in_channels, case.resolution or space.resolution)
    targets = make_targets(case.images, space.num_classes)
    paths = make_paths(case.source, case.paths, space)
    ways = ways_of(case, compiled)
    calls: dict[str, Callable[[], list[float]]] = {
        way.name: way.make(supernet, paths, images, targets, case.bn) for way in ways
    }
    for name, fused in ((OURS, True), (MODULES, False)):
        calls[name] = partial(_ours, supernet, paths, images, targets, case, fused)

    reference = reference_losses(supernet, paths, images, targets, case.bn)
    errors = errors_of({name: call() for name, call in calls.items()}, reference)
    allowed = dict.fromkeys(calls, tolerance(case.precision, errors[BASELINE[case.precision]]))
    if case.precision == "fp32":
        allowed[OURS] = OURS_TOLERANCE
    check_agreement(errors, allowed)

    once = {way.name: time_once(calls[way.name]) for way in ways}
    timed = contenders(once, ways)
    times = interleave({name: calls[name] for name in [*timed, OURS, MODULES]}, rounds)
    loop, sharing = (times.fastest([way.name for way in ways if way.shares == s and way.name in timed]) for s in (0, 1))
    plan = evaluate(supernet, paths, images[:2], targets[:2], case.bn, case.precision).plan
    return {
        "case": asdict(case),
        "rounds": rounds,
        "compiled_ways": compiled,
        "loop": loop,
        "sharing": sharing,
        "milliseconds": {name: asdict(_scaled(times.spread(name))) for name in times.seconds},
        "ratio_loop": asdict(times.ratio(loop, OURS)),
        "ratio_sharing": asdict(times.ratio(sharing, OURS)),
        "kernels": plan.kernels,
        "macs_left": 1.0 - plan.shared_fraction,
        "errors": errors,
        "tolerances": allowed,
        "seconds": times.seconds,
        "seconds_once": once,
        "machine": machine(),
    }


def _ours(
    supernet: Any, paths: torch.Tensor, images: torch.Tensor, targets: torch.Tensor, case: Case, fused: bool
) -> list[float]:
    losses: list[float] = evaluate(supernet, paths, images, targets, case.bn, case.precision, fused).losses.tolist()
    return losses


def _scaled(spread: Spread) -> Spread:
    return Spread(spread.median * 1e3, spread.lower * 1e3, spread.upper * 1e3)


HEADER = (
    f"{'case':<24}{'fastest PyTorch loop':<32}{'ms':>8}{'ours ms':>9}  {'ratio (quartiles)':<22}"
    f"{'over sharing':<22}{'MACs left':>9}{'max |error|':>13}{'of the loop':>13}"
)


def row(result: dict[str, Any]) -> str:
    """A line of the table."""
    milliseconds = {name: spread["median"] for name, spread in result["milliseconds"].items()}
    return (
        f"{result['case']['name']:<24}{result['loop']:<32}{milliseconds[result['loop']]:>8.0f}"
        f"{milliseconds[OURS]:>9.0f}  {Spread(**result['ratio_loop'])!s:<22}{Spread(**result['ratio_sharing'])!s:<22}"
        f"{result['macs_left']:>9.1%}{result['errors'][OURS]:>13.1e}{result['errors'][result['loop']]:>13.1e}"
    )


def run_in_child(case: Case, options: argparse.Namespace) -> dict[str, Any] | None:
    """Measures a case in a process of its own; None where it failed, which it has said on standard error."""
    environment = {**os.environ, **(TUNED_MALLOC if options.tuned_malloc else {}), **ISA_LIMITS.get(case.isa or "", {})}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--child", "--case", case.name, "--rounds", str(options.rounds)]
        command += ["--output", str(file)]
        command += [f"--{name}" for name in ("quick", "eager") if getattr(options, name)]
        if subprocess.run(command, env=environment, check=False).returncode:
            return None
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", choices=list(CASES), metavar="NAME", help="cases; default: all")
    parser.add_argument("--list", action="store_true", help="list the cases")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and no compiled ways: does it run?")
    parser.add_argument("--eager", action="store_true", help="leave torch.compile out, which takes minutes at first")
    parser.add_argument("--tuned-malloc", action="store_true", help="glibc keeps its memory")
    parser.add_argument("--output", type=Path, help="JSON file of everything measured")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds: expected at least 2, got {options.rounds}")
    if options.list:
        for case in CASES.values():
            print(", ".join(f"{name}={value}" for name, value in asdict(case).items() if value))
        return
    chosen = [CASES[name] for name in options.case or CASES]
    if options.child:
        case = chosen[0].quick() if options.quick else chosen[0]
        # Inductor compiles for the machine at hand, whatever the limits.
        compiled = not (options.quick or options.eager or case.isa)
        write_json(options.output, run_case(case, options.rounds, compiled))
        return
    print(HEADER)
    results = []
    for case in chosen:
        result = run_in_child(case, options)
        print(f"{case.name:<24}failed" if result is None else row(result), flush=True)
        results += [] if result is None else [result]
    if options.output is not None:
        write_json(options.output, {"command": sys.argv, "results": results})
    if len(results) < len(chosen):
        sys.exit(1)


if __name__ == "__main__":
    main()
