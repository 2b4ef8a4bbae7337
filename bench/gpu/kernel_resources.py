"""What every CUDA kernel takes of a multiprocessor on every architecture: registers, shared memory, occupancy.

Run: python bench/gpu/kernel_resources.py [--architectures 9.0 12.0+PTX ...] [--output FILE.json] [--markdown FILE.md]

No GPU: nvcc compiles all kernels, warnings and spills being errors, and ptxas says what they take. That is held against
csrc/cuda/budgets.toml. Occupancy is computed: the blocks that registers, threads and static shared memory leave place
for. Dynamic shared memory depends on the shapes of a launch; bench/gpu/gpu_model.py has it.
"""

from __future__ import annotations

import argparse
import re
import resource
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nvcc import BUILT_FOR, KERNELS, SETUP, Compiled, Resources, compile_kernels
from occupancy import resident_blocks

from greedynas.markdown import table
from greedynas_ext.files import write_bytes
from greedynas_ext.strict_json import write_json

BUDGETS = KERNELS / "budgets.toml"


@dataclass(frozen=True)
class Budget:
    """What instantiations may take.

    Attributes:
        source: stem of their file.
        pattern: their names, * for anything.
        registers: of a thread at most, by compute capability or its first number; "any" for the others.
        static_shared: bytes of a block at most.
    """

    source: str
    pattern: str
    registers: dict[str, int]
    static_shared: int

    def fits(self, entry: Resources) -> bool:
        parts = map(re.escape, self.pattern.split("*"))
        return self.source == entry.source and re.fullmatch(".*".join(parts), entry.kernel) is not None

    def registers_on(self, architecture: str) -> int:
        for key in (architecture, architecture.split(".")[0]):
            if key in self.registers:
                return self.registers[key]
        return self.registers["any"]


def read_budgets(file: Path = BUDGETS) -> list[Budget]:
    """In the order of the file; the first that fits counts."""
    found = []
    for source, entries in tomllib.loads(file.read_text()).items():
        for pattern, entry in entries.items():
            registers = {key: value for key, value in entry.items() if key not in ("static", "registers")}
            found.append(Budget(source, pattern, registers | {"any": entry["registers"]}, entry.get("static", 0)))
    return found


def over_budget(resources: Iterable[Resources], budgets: Sequence[Budget]) -> list[str]:
    """What is wrong, a sentence each: too much of something, a stack, no budget, a budget that nothing needs."""
    wrong, used = [], set()
    for entry in resources:
        what = f"{entry.source}: {entry.kernel} for {entry.architecture}"
        blocks = resident_blocks(entry.architecture, entry.threads, entry.registers, entry.static_shared)
        if entry.stack > 0:
            wrong.append(f"{what}: {entry.stack} bytes of stack, expected none")
        if blocks < entry.least_blocks:
            promised = f"launch bounds promise {entry.least_blocks}"
            wrong.append(f"{what}: {blocks} blocks fit by registers and threads, {promised}")
        budget = next((budget for budget in budgets if budget.fits(entry)), None)
        if budget is None:
            wrong.append(f"{what}: no budget in {BUDGETS.name}")
            continue
        used.add((budget.source, budget.pattern))
        allowed = budget.registers_on(entry.architecture)
        if entry.registers > allowed:
            wrong.append(f"{what}: {entry.registers} registers, expected at most {allowed}")
        if entry.static_shared > budget.static_shared:
            taken = f"{entry.static_shared} bytes of static shared memory"
            wrong.append(f"{what}: {taken}, expected at most {budget.static_shared}")
    return wrong + [
        f"{budget.source}: {budget.pattern}: no such kernel"
        for budget in budgets
        if (budget.source, budget.pattern) not in used
    ]


def as_table(resources: Sequence[Resources]) -> str:
    """Markdown: an instantiation a row, an architecture a column; registers / resident blocks."""
    architectures = list(dict.fromkeys(entry.architecture for entry in resources))
    rows: dict[str, dict[str, str]] = {}
    for entry in sorted(resources, key=lambda entry: (entry.source, entry.kernel)):
        name = f"`{entry.source}`: `{entry.kernel}`"
        row = rows.setdefault(name, {"": name, "threads": str(entry.threads), "static": str(entry.static_shared)})
        blocks = resident_blocks(entry.architecture, entry.threads, entry.registers, entry.static_shared)
        row[entry.architecture] = f"{entry.registers} / {blocks}"
    header = ["", "threads", "static", *architectures]
    return table(header, [[row.get(name, "") for name in header] for row in rows.values()])


def seconds_by(compiled: Compiled, place: int) -> dict[str, float]:
    """Of compilers, by source (place 0) or architecture (1)."""
    found: dict[str, float] = {}
    for key, seconds in compiled.seconds.items():
        found[key[place]] = found.get(key[place], 0.0) + seconds
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _children_seconds() -> float:
    """Processor time of the processes that ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=list(BUILT_FOR), help="those alone, as setup.py has them")
    parser.add_argument("--output", type=Path, help="JSON file of all that was found")
    parser.add_argument("--markdown", type=Path, help="the same as a table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        begin, used = time.perf_counter(), _children_seconds()
        compiled = compile_kernels(options.architectures, Path(folder))
        elapsed, used = time.perf_counter() - begin, _children_seconds() - used
    kernels = {(entry.source, entry.kernel) for entry in compiled.resources}
    print(
        f"{len(kernels)} kernels for {', '.join(options.architectures)}: {elapsed:.0f} s, two compilers at a time, "
        f"{used:.0f} s of processor time"
    )
    for place in (0, 1):
        print("seconds of one:", ", ".join(f"{key} {value:.0f}" for key, value in seconds_by(compiled, place).items()))
    if options.output is not None:
        found: dict[str, Any] = {
            "command": sys.argv,
            "flags": SETUP.NVCC_FLAGS,
            "elapsed_seconds": elapsed,
            "processor_seconds": used,
            "seconds_by_source": seconds_by(compiled, 0),
            "seconds_by_architecture": seconds_by(compiled, 1),
            "kernels": [asdict(entry) for entry in compiled.resources],
        }
        write_json(options.output, found)
    if options.markdown is not None:
        write_bytes(options.markdown, (as_table(compiled.resources) + "\n").encode())
    wrong = over_budget(compiled.resources, read_budgets())
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
