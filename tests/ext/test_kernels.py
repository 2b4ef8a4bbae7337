"""The fused CPU kernels against plain loops in C++, and what they are compiled to."""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
from native_build import CAPABILITIES, COMPILER, build, cpu_flags, machine_capabilities, run

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


MAINS = ["kernels_main.cpp", "allocations_main.cpp"]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return build(tmp_path_factory.mktemp("kernels"), ["-O2", "-fno-math-errno"], MAINS)


@pytest.fixture(scope="module")
def plain_build(programs: list[Path]) -> Path:
    return programs[0]


def test_kernels_equal_plain_loops(plain_build: Path):
    *tables, chains, last = run(plain_build)
    assert last == "all as expected"
    assert re.fullmatch(r"chains: \w+, \w+, \w+", chains)
    names = [re.fullmatch(r"(\w+), (\w+): (\d+) cases", line) for line in tables]
    assert all(name is not None and int(name[3]) > 300 for name in names), tables
    covered = {(name[1], name[2]): int(name[3]) for name in names if name is not None}
    machine = machine_capabilities()
    for name in ("portable", "avx2", "avx512"):
        assert ({(name, "float"), (name, "double")} <= covered.keys()) == (name in machine)
    has_bf16 = "avx512" in machine and "avx512_bf16" in cpu_flags()
    assert (("avx512_bf16", "BFloat16") in covered) == has_bf16
    assert (("amx", "TiledBFloat16") in covered) == ("amx" in machine)
    if "amx" in machine:
        assert covered["amx", "TiledBFloat16"] > 2 * covered["avx512_bf16", "BFloat16"]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_chains_of_each_instruction_set(capability: str, plain_build: Path):
    """Neither threads nor traversals change a bit, whichever kernels GREEDYNAS_CPU_CAPABILITY chooses."""
    if capability not in machine_capabilities():
        pytest.skip(f"this machine lacks {capability}")
    expected = [f"chains: {kernels_of(capability)}", "all as expected"]
    assert run(plain_build, "--chains", capability=capability) == expected


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_later_evaluations_allocate_nothing(capability: str, programs: list[Path]):
    if capability not in machine_capabilities():
        pytest.skip(f"this machine lacks {capability}")
    assert run(programs[1], capability=capability) == [f"no allocations: {kernels_of(capability)}"]


def kernels_of(capability: str) -> str:
    """The kernels of double, float and bfloat16."""
    single, bf16 = capability, capability
    if capability == "avx512" and "avx512_bf16" in cpu_flags():
        bf16 = "avx512_bf16"
    if capability == "amx":
        single = "avx512"
    return f"{single}, {single}, {bf16}"


# The instruction with which each set multiplies, its registers, and what only a wider set has.
HALVES = r"\tv\w+(?:[ps]h|phx)\b"
TILES = r"\t(?:(?:ld|st)tilecfg|tile\w+|tdp\w+)\b|%tmm"
OBJECTS = {
    "portable": {"uses": ["mulp"], "lacks": ["%[yz]mm", "vfmadd", "vdpbf16ps", HALVES, TILES]},
    "avx2": {"uses": ["%ymm", r"vfmadd\w+p[sd]\b"], "lacks": ["%zmm", "vdpbf16ps", HALVES, TILES]},
    "avx512": {"uses": ["%zmm", r"vfmadd\w+p[sd]\b"], "lacks": ["vdpbf16ps", HALVES, TILES]},
    "avx512_bf16": {"uses": ["%zmm", r"vfmadd\w+ps\b", "vdpbf16ps"], "lacks": [HALVES, TILES]},
    "amx": {"uses": ["%zmm", r"vfmadd\w+ps\b", r"vfmadd\w+ph\b", "vdpbf16ps"], "lacks": []},
}
# What functions multiply with, wherever they are not inlined, by what their names match.
PRODUCTS = {
    name: {"expand_tile<": product, "pool_group<": product, "MultiplyPanel<": product}
    for name, product in (("portable", "mulp"), ("avx2", "vfmadd"), ("avx512", "vfmadd"), ("avx512_bf16", "vdpbf16ps"))
}
PRODUCTS["amx"] = {
    "expand_tile<": "vdpbf16ps",  # where there is no half precision
    "HalfExpandDepthwise|RingOfProducts<": "tdpbf16ps",
    "half_depthwise_rows<": r"vfmadd\w+ph\b",
    "normalise": r"vfmadd\w+ph\b",
    "ProjectTiles|project_tiles": "tdpbf16ps",
    "MultiplyTiles|multiply_panel<": "tdpbf16ps",
    "pool_tiles<": "tdpbf16ps",
    "finish_tiles": "tdpbf16ps",
}
# Wide registers, tiles, and any instruction in VEX or EVEX encoding.
NEEDS_AVX = re.compile(rf"%[yz]mm|\tv[a-z]|{TILES}")
NAMESPACE = re.compile(r"\bcpu::(avx2|avx512|avx512_bf16|amx)::")


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
    lines = [line for lines in inner.values() for line in lines]
    for word in OBJECTS[name]["uses"]:
        assert count(word, lines) > 100, word
    for word in OBJECTS[name]["lacks"]:
        assert count(word, lines) == 0, word
    for kernel, product in PRODUCTS[name].items():
        found = [lines for key, lines in inner.items() if re.search(kernel, key)]
        assert any(count(product, lines) for lines in found), kernel
    registers = {"portable": "%xmm", "avx2": "%ymm"}.get(name, "%zmm")
    rows = {"half_depthwise_rows<": r"ph\b", "depthwise_row<": r"p[sd]\b"}
    for key, lines in inner.items():
        kind = next((kind for kind in rows if kind in key), None)
        if kind is not None and name != "portable":
            assert count(rf"vfmadd\w+{rows[kind]}.*{registers}", lines), key


@disassembles
def test_tiles_and_half_precision_stay_inside_their_namespace(plain_build: Path):
    functions = instructions(plain_build.with_name("kernels_amx.o"))
    inner = [line for key, lines in functions.items() if "cpu::amx::" in key for line in lines]
    for word in ("ldtilecfg", "tilerelease", "tilezero", "tileloadd", "tilestored", "tdpbf16ps"):
        assert count(rf"\t{word}\b", inner) > 0, word
    outer = [line for key, lines in functions.items() if "cpu::amx::" not in key for line in lines]
    assert count(rf"{TILES}|{HALVES}", outer) == 0


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
    of_tiles = {key for key, lines in functions.items() if count(rf"{TILES}|{HALVES}", lines)}
    assert {key for key in of_tiles if "cpu::amx::" not in key} == set()
    assert any(count("tdpbf16ps", functions[key]) for key in of_tiles)
    assert any(count(r"vfmadd\w+ph\b", functions[key]) for key in of_tiles)


def count(pattern: str, lines: list[str]) -> int:
    """Of the lines that hold the pattern."""
    return sum(re.search(pattern, line) is not None for line in lines)


def needs_avx(lines: list[str]) -> bool:
    return any(NEEDS_AVX.search(line) for line in lines)
