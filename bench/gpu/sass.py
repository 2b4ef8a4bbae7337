"""Reads the machine code of kernels as nvdisasm prints it: instructions, basic blocks, loops.

Needs nvdisasm: `pip install nvidia-cuda-nvdisasm`, or that of a CUDA toolkit, or where the variable NVDISASM says.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

# What executes an instruction, by the beginning of its name; the first that fits counts.
CLASSES = (
    ("control", ("LDGDEPBAR",)),
    ("integer", ("LDC",)),
    ("convert", ("F2FP",)),
    ("tensor", ("HMMA", "IMMA", "BMMA", "QMMA", "HGMMA")),
    ("half", ("HFMA2", "HADD2", "HMUL2", "HMNMX2", "HSET2", "HSETP2")),
    ("float", ("FFMA", "FADD", "FMUL", "IMAD", "FSWZADD")),
    ("double", ("DFMA", "DADD", "DMUL", "DSETP", "DMNMX")),
    ("special", ("MUFU", "F2F", "F2I", "I2F")),
    ("shared load", ("LDS", "LDSM")),
    ("shared store", ("STS",)),
    ("global", ("LDGSTS", "LDG", "STG", "LD", "ST", "RED", "ATOM", "LDL", "STL")),
    ("control", ("BRA", "BRX", "JMP", "BSSY", "BSYNC", "BREAK", "EXIT", "RET", "CALL", "BAR", "WARPSYNC", "DEPBAR")),
    ("control", ("NOP", "YIELD", "MEMBAR", "ERRBAR", "CCTL")),
)
_ENDS = ("EXIT", "RET", "KILL")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
_LABEL = re.compile(r"^(\.L_[\w.]+):")
_FUNCTION = re.compile(r"^\.text\.([\w$.]+):")
_TARGET = re.compile(r"`?\((\.L_[\w.]+)\)|(\.L_[\w.]+)")


@dataclass(frozen=True)
class Instruction:
    """`opcode` with its modifiers; `targets` are labels."""

    address: int
    conditional: bool
    opcode: str
    operands: str
    targets: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def kind(self) -> str:
        """Of CLASSES; "integer" for what is none of them."""
        return next((kind for kind, names in CLASSES if self.name.startswith(names)), "integer")

    @property
    def wavefronts(self) -> int:
        """Of shared memory, 128 bytes each, where no two lanes need different rows of a bank."""
        if not self.name.startswith(("LDS", "STS", "LDGSTS")):
            return 0
        wide = next((bits for bits in (128, 64) if f".{bits}" in self.opcode), 32)
        matrices = re.search(r"\.MT?88\.(\d)", self.opcode)
        return int(matrices[1]) if matrices else wide // 32


@dataclass
class Block:
    """Instructions that are executed together."""

    instructions: list[Instruction] = field(default_factory=list)
    after: list[int] = field(default_factory=list)  # blocks that may come next

    def count(self, *names: str) -> int:
        """Of instructions with one of these names, all that stands behind a dot included where it is given."""
        return sum(
            any(i.opcode == name or i.opcode.startswith(name + ".") for name in names) for i in self.instructions
        )


@dataclass
class Loop:
    """A natural loop: its header, and all its blocks, those of loops inside it too."""

    header: int
    blocks: set[int]
    parent: Loop | None = None
    children: list[Loop] = field(default_factory=list)

    @property
    def own(self) -> set[int]:
        """Without those of loops inside it."""
        return self.blocks.difference(*(child.blocks for child in self.children))


class Kernel:
    """The machine code of one kernel."""

    def __init__(self, symbol: str, lines: Iterable[str]) -> None:
        self.symbol = symbol
        self.blocks, labels = _cut(lines)
        for at, block in enumerate(self.blocks):
            last = block.instructions[-1] if block.instructions else None
            # Lanes that have gone different ways make shuffles one after another, elsewhere: none of ours has.
            apart = last is not None and last.opcode.startswith("BRA.DIV")
            jumps = last is not None and not apart and last.name in ("BRA", "BRX", "JMP", "JMX")
            if last is not None and jumps:
                if not last.targets:
                    raise ValueError(f"{symbol}: no target of {last.opcode} {last.operands}")
                block.after += [labels[target] for target in last.targets if labels[target] < len(self.blocks)]
            ends = last is not None and (jumps or last.name in _ENDS) and not last.conditional
            if not ends and at + 1 < len(self.blocks):
                block.after.append(at + 1)

    @cached_property
    def loops(self) -> list[Loop]:
        """All, inner ones behind those that they are in."""
        dominators = self._dominators
        found: dict[int, Loop] = {}
        before: dict[int, list[int]] = {at: [] for at in range(len(self.blocks))}
        for at, block in enumerate(self.blocks):
            for after in block.after:
                before[after].append(at)
        for at, block in enumerate(self.blocks):
            for header in block.after:
                if header not in dominators.get(at, set()):
                    continue
                loop = found.setdefault(header, Loop(header, {header}))
                waiting = [at]
                while waiting:
                    one = waiting.pop()
                    if one not in loop.blocks and one in dominators:
                        loop.blocks.add(one)
                        waiting += before[one]
        loops = sorted(found.values(), key=lambda loop: -len(loop.blocks))
        for number, loop in enumerate(loops):
            around = [outer for outer in loops[:number] if loop.header in outer.blocks and outer is not loop]
            if around:
                loop.parent = min(around, key=lambda outer: len(outer.blocks))
                loop.parent.children.append(loop)
        return loops

    @cached_property
    def _dominators(self) -> dict[int, set[int]]:
        """Of the blocks that can be reached."""
        order: list[int] = []
        seen = {0}
        waiting: list[tuple[int, Iterator[int]]] = [(0, iter(self.blocks[0].after))]
        while waiting:
            at, following = waiting[-1]
            step = next((after for after in following if after not in seen), None)
            if step is None:
                order.append(at)
                waiting.pop()
            else:
                seen.add(step)
                waiting.append((step, iter(self.blocks[step].after)))
        order.reverse()
        before: dict[int, list[int]] = {at: [] for at in order}
        for at in order:
            for after in self.blocks[at].after:
                before[after].append(at)
        dominators = {at: set(order) for at in order}
        dominators[0] = {0}
        changed = True
        while changed:
            changed = False
            for at in order[1:]:
                new = set.intersection(*(dominators[one] for one in before[at])) | {at}
                if new != dominators[at]:
                    dominators[at] = new
                    changed = True
        return dominators

    @property
    def outside(self) -> set[int]:
        """Blocks that are in no loop and can be reached."""
        return set(self._dominators).difference(*(loop.blocks for loop in self.loops))

    def count(self, blocks: Collection[int], *names: str) -> int:
        return sum(self.blocks[at].count(*names) for at in blocks)

    def kinds(self, blocks: Collection[int]) -> Counter[str]:
        """Instructions by class; in "issue" all of them, in "wavefronts" those of shared memory."""
        instructions = [i for at in blocks for i in self.blocks[at].instructions]
        found = Counter(i.kind for i in instructions)
        found["issue"] = len(instructions)
        found["wavefronts"] = sum(i.wavefronts for i in instructions)
        return found

    def path(self, within: Loop | None, through: Collection[int]) -> set[int]:
        """The blocks of a loop (None: of the kernel) on ways once round it that go through all of `through`.

        Loops inside it are left out, but for what `through` names. What a way may skip is counted as taken.
        """
        inside = set(self._dominators) if within is None else within.blocks
        header = 0 if within is None else within.header
        own = self.outside if within is None else within.own
        chosen = set(inside)
        for anchor in through:
            ahead = self._reached(anchor, inside, header, forward=True)
            behind = self._reached(anchor, inside, header, forward=False)
            chosen &= ahead | behind
        if not chosen.issuperset(through):
            raise ValueError(f"{self.symbol}: no way goes through the blocks {sorted(through)}")
        return chosen & own

    def certain(self, within: Loop | None, through: Sequence[int]) -> set[int]:
        """The blocks that no way once round a loop (None: through the kernel) misses, of ways through all of `through`.

        `through` is in the order of execution. Loops inside it are left out, but for what `through` names.
        """
        inside = set(self._dominators) if within is None else within.blocks
        header = 0 if within is None else within.header
        ends = {at for at in inside if header in self.blocks[at].after or not inside.issuperset(self.blocks[at].after)}
        ends |= {at for at in inside if not self.blocks[at].after}
        legs = list(zip([header, *through], [*({one} for one in through), ends], strict=True))
        chosen = set(through) | {header}
        for at in self.path(within, through) - chosen:
            for start, targets in legs:
                if start != at and not self._reached(start, inside - {at}, header, forward=True) & targets:
                    chosen.add(at)
                    break
        own = self.outside if within is None else within.own
        return chosen & own

    def _reached(self, start: int, inside: set[int], header: int, *, forward: bool) -> set[int]:
        following: dict[int, list[int]] = {at: [] for at in inside}
        for at in inside:
            for after in self.blocks[at].after:
                if after in inside and after != header:  # not round the loop
                    source, target = (at, after) if forward else (after, at)
                    following[source].append(target)
        found, waiting = {start}, [start]
        while waiting:
            for after in following[waiting.pop()]:
                if after not in found:
                    found.add(after)
                    waiting.append(after)
        return found


def _cut(lines: Iterable[str]) -> tuple[list[Block], dict[str, int]]:
    """Blocks in their order, and where labels are."""
    blocks = [Block()]
    labels: dict[str, int] = {}
    for line in lines:
        label = _LABEL.match(line)
        if label:
            if blocks[-1].instructions:
                blocks.append(Block())
            labels[label[1]] = len(blocks) - 1
            continue
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        address, predicate, opcode, operands = match.groups()
        name = opcode.split(".")[0]
        targets: tuple[str, ...] = ()
        if name in ("BRA", "BRX", "JMP", "JMX"):
            targets = tuple(first or second for first, second in _TARGET.findall(operands))
        # A branch may carry its condition among its operands.
        conditional = predicate is not None or (
            name == "BRA" and re.match(r"\s*!?U?P\d|\s*UR\d|\s*~", operands) is not None
        )
        blocks[-1].instructions.append(Instruction(int(address, 16), conditional, opcode, operands.strip(), targets))
        if name in ("BRA", "BRX", "JMP", "JMX", *_ENDS):
            blocks.append(Block())
    if not blocks[-1].instructions:
        blocks.pop()
    return blocks, labels


def read(text: str) -> dict[str, Kernel]:
    """Kernels by symbol, of what `nvdisasm -c` printed."""
    lines: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in text.splitlines():
        function = _FUNCTION.match(line)
        if function:
            current = lines.setdefault(function[1], [])
        elif line.startswith(("\t.section", ".section")):
            current = None
        elif current is not None:
            current.append(line)
    return {symbol: Kernel(symbol, of) for symbol, of in lines.items()}


def find_nvdisasm() -> str | None:
    given = os.environ.get("NVDISASM")
    if given:
        return given
    installed = importlib.util.find_spec("nvidia")  # the package from PyPI keeps it in a folder of its own
    folders = [Path(place) / "cu13/bin" for place in (installed.submodule_search_locations or [])] if installed else []
    folders.append(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin")
    kept = next((str(folder / "nvdisasm") for folder in folders if (folder / "nvdisasm").exists()), None)
    return shutil.which("nvdisasm") or kept


def disassemble(cubin: Path) -> dict[str, Kernel]:
    """Kernels of a cubin, by symbol."""
    nvdisasm = find_nvdisasm()
    if nvdisasm is None:
        raise RuntimeError(
            "nvdisasm: expected on PATH, under CUDA_HOME/bin or where NVDISASM says, found none "
            "(pip install nvidia-cuda-nvdisasm, in an environment of its own)"
        )
    done = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{cubin.name}: nvdisasm failed: {done.stderr.strip()}")
    return read(done.stdout)
