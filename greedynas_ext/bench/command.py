"""How long `evaluate_paths` takes against every PyTorch way to the same losses that we know of.

    python -m greedynas_ext.bench --list
    python -m greedynas_ext.bench --case mbv2-7-bf16 --output results.json --csv results.csv --plot results.png
    python -m greedynas_ext.bench --cases my_cases.toml --dry-run
    python -m greedynas_ext.bench --compare old.json            fails where a ratio is worse beyond the spread
    python -m greedynas_ext.bench --read new.json --compare old.json

Each case runs in a process of its own, in which everything is interleaved (`contest` says how); --cases reads a TOML
file of the form of greedynas_ext/bench/cases.toml, where `supernet = "module:function"` names a supernet of one's own.
"of ceilings" is the share of what torch.mm multiplies, or of what a large sum or copy reads and writes, of which the
larger one is printed; what is written is counted by `greedynas_ext.explain`.

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
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from greedynas_ext.bench import plot
from greedynas_ext.bench.cases import CASES, ISA_LIMITS, Case, read_cases
from greedynas_ext.bench.compare import compare, other_machine
from greedynas_ext.bench.contest import run_case, ways_of
from greedynas_ext.bench.subjects import subject_of
from greedynas_ext.bench.table import HEADER, read_results, row, write_csv
from greedynas_ext.strict_json import read_json, write_json

TUNED_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_TOP_PAD_": "268435456"}


def in_words(case: Case) -> str:
    """The fields that say something: a space knows its channels and classes."""
    known = ("channels", "classes", "fused") if case.space else ()
    return ", ".join(f"{name}={value}" for name, value in asdict(case).items() if value and name not in known)


def compiled(case: Case, options: argparse.Namespace) -> bool:
    """Whether torch.compile takes part: inductor compiles for the machine at hand, whatever the limits."""
    return not (options.quick or options.eager or case.isa)


def run_in_child(case: Case, options: argparse.Namespace) -> dict[str, Any] | None:
    """Measures a case in a process of its own; None where it failed, which it has said on standard error."""
    environment = {**os.environ, **(TUNED_MALLOC if options.tuned_malloc else {}), **ISA_LIMITS.get(case.isa or "", {})}
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        order, file = Path(folder) / "order.json", Path(folder) / "result.json"
        write_json(
            order,
            {
                "case": asdict(case.quick() if options.quick else case),
                "rounds": options.rounds,
                "compiled": compiled(case, options),
                "quick": options.quick,
            },
        )
        command = [sys.executable, "-m", "greedynas_ext.bench", "--child", str(order), "--output", str(file)]
        if subprocess.run(command, env=environment, check=False).returncode:
            return None
        result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return result


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m greedynas_ext.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--case", nargs="+", metavar="NAME", help="cases; default: all")
    parser.add_argument("--cases", type=Path, metavar="FILE.toml", help="cases of one's own, instead of ours")
    parser.add_argument("--list", action="store_true", help="list the cases")
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured, and against what")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and no compiled ways: does it run?")
    parser.add_argument("--eager", action="store_true", help="leave torch.compile out, which takes minutes at first")
    parser.add_argument("--tuned-malloc", action="store_true", help="glibc keeps its memory")
    parser.add_argument("--read", type=Path, metavar="FILE.json", help="take results from a file, measure nothing")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="exit with 1 where a ratio became worse")
    parser.add_argument("--output", type=Path, help="JSON file of everything measured")
    parser.add_argument("--csv", type=Path, help="CSV file, a line a case")
    parser.add_argument("--plot", type=Path, help="picture of the ratios, .png, .svg or .pdf")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.command = ["python", "-m", "greedynas_ext.bench", *(sys.argv[1:] if arguments is None else arguments)]
    if options.rounds < 2:
        parser.error(f"--rounds: expected at least 2, got {options.rounds}")
    try:
        cases = CASES if options.cases is None else read_cases(options.cases)
    except (OSError, ValueError) as error:
        parser.error(f"--cases: {error}")
    unknown = [name for name in options.case or [] if name not in cases]
    if unknown:
        parser.error(f"--case: expected some of {', '.join(cases)}, got {', '.join(unknown)}")
    options.chosen = [cases[name] for name in options.case or cases]
    try:
        options.before = None if options.compare is None else read_results(options.compare)
    except (OSError, ValueError) as error:
        parser.error(f"--compare: {error}")
    return options


def plan(options: argparse.Namespace) -> None:
    """Prints what would be measured, and against which ways."""
    made: dict[tuple[str, str], Any] = {}
    for case in options.chosen:
        chosen = case.quick() if options.quick else case
        which = (case.space, case.supernet)
        if which not in made:
            made[which] = subject_of(chosen).supernet
        ways = ways_of(chosen, made[which], compiled(case, options))
        print(in_words(chosen))
        print(f"    {options.rounds} rounds against: {'; '.join(way.name for way in ways)}")


def measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measures the chosen cases one after the other and prints a table of them."""
    print(HEADER)
    results = []
    for case in options.chosen:
        result = run_in_child(case, options)
        print(f"{case.name:<24}failed" if result is None else row(result), flush=True)
        results += [] if result is None else [result]
    return results


def report(options: argparse.Namespace, results: list[dict[str, Any]]) -> bool:
    """Writes the files and compares; whether nothing has become worse."""
    if options.output is not None:
        write_json(options.output, {"command": options.command, "results": results})
    if options.csv is not None:
        write_csv(options.csv, results)
    if options.plot is not None and results:
        plot.draw(results, options.plot)
    if options.before is None or not results:
        return True
    changes = compare(options.before, results)
    difference = other_machine(options.before, results)
    if difference is not None:
        print(f"\nanother machine: {difference}")
    print(f"\n{'ratio over the loop':<24}{'before':<24}{'now':<24}")
    print("\n".join(map(str, changes)))
    return all(change.verdict != "regression" for change in changes)


def main(arguments: Sequence[str] | None = None) -> None:
    """Exits with 1 where a case failed or a ratio has become worse beyond the spread."""
    options = parse(arguments)
    if options.child is not None:
        order = read_json(options.child)
        write_json(options.output, run_case(Case(**order.pop("case")), **order))
        return
    if options.list:
        print("\n".join(map(in_words, options.chosen)))
        return
    if options.dry_run:
        plan(options)
        return
    if options.read is not None:
        results = read_results(options.read)
        print("\n".join([HEADER, *map(row, results)]))
        complete = True
    else:
        results = measured(options)
        complete = len(results) == len(options.chosen)
    if not (report(options, results) and complete):
        sys.exit(1)


if __name__ == "__main__":
    main()
