"""The fused CPU kernels against plain loops in C++, and what they are compiled to."""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from native_build import COMPILER, build, run

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def plain_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("kernels"), ["-O2", "-fno-math-errno"], ["kernels_main.cpp"])[0]


def test_kernels_equal_plain_loops(plain_build: Path):
    *tables, last = run(plain_build)
    assert last == "all as expected"
    names = [re.fullmatch(r"(\w+), (\w+): (\d+) cases", line) for line in tables]
    assert all(name is not None and int(name[3]) > 300 for name in names), tables
    covered = {(name[1], name[2]) for name in names if name is not None}
    assert {("portable", "float"), ("portable", "double")} <= covered
    flags = cpu_flags()
    if {"avx2", "fma"} <= flags:
        assert {("avx2", "float"), ("avx2", "double")} <= covered
    if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags:
        assert {("avx512", "float"), ("avx512", "double")} <= covered
        assert (("avx512_bf16", "BFloat16") in covered) == ("avx512_bf16" in flags)


def cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    found = re.search(r"^flags\s*:(.*)$", text, re.MULTILINE)
    return set(found[1].split()) if found else set()


# What a function of each instruction set's namespace may use and what the set as a whole has to.
OBJECTS = {
    "portable": ((), ("ymm", "zmm")),
    "avx2": (("ymm", "vfmadd"), ("zmm",)),
    "avx512": (("zmm", "vfmadd"), ()),
    "avx512_bf16": (("zmm", "vfmadd", "vdpbf16ps"), ()),
}
NEEDS_AVX = re.compile(r"%[yz]mm|\tv[a-z]")  # wide registers, and any instruction in VEX or EVEX encoding
NAMESPACE = re.compile(r"\bcpu::(avx2|avx512|avx512_bf16)::")


def instructions(file: Path) -> dict[str, list[str]]:
    """The instructions of each function, as `\\tname operands`."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(file)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    result: dict[str, list[str]] = defaultdict(list)
    function = ""
    for line in text.splitlines():
        if start := re.match(r"^[0-9a-f]+ <(.*)>:$", line):
            function = start[1]
        elif line.startswith(" "):
            result[function].append("\t" + line.partition(":")[2].strip())
    return dict(result)


disassembles = pytest.mark.skipif(
    shutil.which("objdump") is None or platform.machine() != "x86_64", reason="no objdump, or not x86-64"
)


@disassembles
@pytest.mark.parametrize("name", OBJECTS)
def test_kernels_use_their_instruction_set(name: str, plain_build: Path):
    functions = instructions(plain_build.with_name(f"kernels_{name}.o"))
    inner = {key: value for key, value in functions.items() if f"cpu::{name}::" in key}
    assert any("expand_tile" in key for key in inner)
    needed, forbidden = OBJECTS[name]
    used = Counter(word for lines in inner.values() for line in lines for word in (*needed, *forbidden) if word in line)
    for word in forbidden:
        assert used[word] == 0, word
    for word in needed:
        assert used[word] > 100, word
    # The products themselves, wherever they are not inlined.
    product = "vdpbf16ps" if name == "avx512_bf16" else ("vfmadd" if needed else "mulp")
    for kernel in ("expand_tile<", "pool_group<", "MultiplyPanel<"):
        found = [lines for key, lines in inner.items() if kernel in key]
        assert found, kernel
        assert any(product in line for lines in found for line in lines), kernel
    registers = {"portable": "%xmm", "avx2": "%ymm"}.get(name, "%zmm")
    for key, lines in inner.items():
        if "depthwise_row<" in key and name != "portable":
            assert any("vfmadd" in line and registers in line for line in lines), key


@disassembles
@pytest.mark.parametrize("name", OBJECTS)
def test_nothing_outside_the_kernels_needs_avx(name: str, plain_build: Path):
    """A static initialiser, or a std function that the linker shares among objects, would crash older machines."""
    wide = {key for key, lines in instructions(plain_build.with_name(f"kernels_{name}.o")).items() if needs_avx(lines)}
    assert {key for key in wide if f"cpu::{name}::" not in key} == set()


@disassembles
def test_nothing_outside_the_kernels_needs_avx_in_the_built_module():
    module = importlib.util.find_spec("greedynas_ext._ops")
    assert module is not None
    assert module.origin is not None
    functions = instructions(Path(module.origin))
    inner = {key for key in functions if NAMESPACE.search(key)}
    if not inner:
        pytest.skip("the built module is stripped: its functions have no names")
    assert {key for key, lines in functions.items() if key not in inner and needs_avx(lines)} == set()
    assert any(needs_avx(functions[key]) for key in inner)


def needs_avx(lines: list[str]) -> bool:
    return any(NEEDS_AVX.search(line) for line in lines)
