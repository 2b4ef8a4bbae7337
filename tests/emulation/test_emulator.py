"""The emulator itself: each kind of mistake is found, by the build that is named here, and nothing else is reported."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulation_build import COMPILER, CSRC, FOLDER, load

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

FLAGS = {
    "plain": ["-O2"],
    "address": ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g1", "-fsanitize=thread"],
}

# Which build finds what, and what it says. Plain: by what the emulator checks, or by the result in one of several
# orders of the threads. What is found by two is named twice.
CAUGHT = [
    ("global_bounds", "address", "heap-buffer-overflow"),
    ("shared_bounds", "address", "use-after-poison"),
    ("dynamic_shared_bounds", "address", "use-after-poison"),
    ("unwritten", "plain", "wrong result: -?nan"),
    ("missing_barrier", "plain", "wrong result: -?nan"),
    ("missing_barrier", "thread", "data race"),
    ("missing_second_barrier", "thread", "data race"),
    ("missing_warp_barrier", "plain", "wrong result: -?nan"),
    ("missing_warp_barrier", "thread", "data race"),
    ("accumulate", "thread", "data race"),
    ("last_block", "thread", "data race"),
    ("divergent_barrier", "plain", "barrier divergence"),
    ("barrier_in_branch", "plain", "deadlock"),
    ("divergent_shuffle", "plain", "warp divergence"),
    ("shuffle_of_those_who_left", "plain", "deadlock"),
    ("shuffle_beyond_mask", "plain", "reads a lane that is not in its mask"),
    ("misaligned_load", "address", "misaligned address"),
    ("misaligned_copy", "plain", "no multiple of 16 bytes"),
    ("read_before_copy_lands", "plain", "wrong result: -?nan"),
    ("read_of_others_copy", "plain", "wrong result: -?nan"),
    ("read_of_others_copy", "thread", "data race"),
    ("copy_never_waited_for", "plain", "asynchronous copies it had not waited for"),
    ("copy_on_sm_75", "plain", "an asynchronous copy needs compute capability 8.0"),
    ("fragment_layout", "plain", "wrong result"),
    ("misaligned_matrix", "plain", "no multiple of 16 bytes"),
    ("large_dynamic", "plain", "asks for 101377 bytes of shared memory"),
    ("large_static", "plain", "variables in shared memory take 49156 bytes"),
]


class Programs:
    """planted.cu, built on demand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cache  # noqa: B019
    def build(self, kind: str) -> list[str]:
        """The command that starts it."""
        program = self.folder / kind
        command = [str(COMPILER), "-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", *FLAGS[kind]]
        if kind == "thread":
            command.append("-Wno-tsan")
        command += [f"-I{path}" for path in (CSRC, CSRC / "cuda", FOLDER)]
        subprocess.run([*command, "-x", "c++", str(FOLDER / "planted.cu"), "-o", str(program)], check=True)
        if kind != "thread":
            return [str(program)]
        # Where the kernel randomises addresses more than the thread sanitizer knows, it may do without.
        setarch = shutil.which("setarch")
        for prefix in [[], [setarch, "-R"]] if setarch else [[]]:
            result = subprocess.run([*prefix, str(program), "order"], capture_output=True, text=True)
            if "unexpected memory mapping" not in result.stderr and result.returncode == 0:
                return [*prefix, str(program)]
        pytest.skip(
            "this kernel's address layout is not one that the thread sanitizer knows (unexpected memory mapping)"
        )

    def run(
        self, kind: str, *arguments: str, stdin: bytes = b"", **environment: str
    ) -> subprocess.CompletedProcess[bytes]:
        options = {
            "ASAN_OPTIONS": "detect_leaks=0",
            "TSAN_OPTIONS": "halt_on_error=1 history_size=4",
            "UBSAN_OPTIONS": "print_stacktrace=0",
        }
        kept = {name: value for name, value in os.environ.items() if not name.startswith("EMULATION_")}
        return subprocess.run(
            [*self.build(kind), *arguments],
            input=stdin,
            capture_output=True,
            timeout=120,
            env={**kept, **options, **environment},
        )


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    return Programs(tmp_path_factory.mktemp("planted"))


@pytest.mark.parametrize("kind", list(FLAGS))
def test_right_kernels_pass(programs: Programs, kind: str) -> None:
    result = programs.run(kind, "all", "right")
    assert result.returncode == 0, (result.stdout + result.stderr).decode()
    lines = result.stdout.decode().splitlines()
    assert {line.split(":")[0] for line in lines} == {name for name, *_ in CAUGHT}
    assert all(line.endswith(": as expected") for line in lines)
    assert result.stderr == b""


@pytest.mark.parametrize(("name", "kind", "message"), CAUGHT, ids=[f"{name}, {kind}" for name, kind, _ in CAUGHT])
def test_planted_mistake_is_caught(programs: Programs, name: str, kind: str, message: str) -> None:
    result = programs.run(kind, name, "wrong")
    text = (result.stdout + result.stderr).decode()
    assert result.returncode != 0, text
    assert re.search(message, text), text
    if "wrong result" not in message and kind == "plain":
        assert text.startswith("emulation: "), text


@pytest.mark.parametrize("kind", list(FLAGS))
@pytest.mark.parametrize(
    "name", ["barrier_in_branch", "divergent_barrier", "divergent_shuffle", "copy_never_waited_for", "large_static"]
)
def test_next_launch_is_as_if_nothing_had_been(programs: Programs, name: str, kind: str) -> None:
    """Threads that an error leaves waiting are unwound, and the sanitizers know it."""
    result = programs.run(kind, name, "recovers")
    assert result.returncode == 0, (result.stdout + result.stderr).decode()
    assert result.stdout == b"as expected\n"
    assert result.stderr == b""


def test_builds_in_one_process_are_apart(cuda: Any, tmp_path: Path) -> None:
    if cuda.device.type == "cuda":
        pytest.skip("not of an emulated build")
    first = Path(cuda.module.__file__)
    shutil.copy(first, tmp_path)
    module = load(tmp_path)
    assert module is not cuda.module
    assert Path(module.__file__) == tmp_path / first.name
    assert module.kernels.SelectTopK is not cuda.module.kernels.SelectTopK


def test_python_sees_errors(cuda: Any) -> None:
    if cuda.device.type != "cpu":
        pytest.skip("of the emulation")
    script = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_cuda", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
try:
    module.kernels.select_top_k(module.kernels.SelectTopK(count=1, k=1), 0)
except RuntimeError as error:
    print(error)
"""
    environment = os.environ | {"EMULATION_ORDER": "sideways"}
    command = [sys.executable, "-c", script, cuda.module.__file__]
    output = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    assert output.startswith("emulation: ")


def test_order_of_threads_is_the_environments(programs: Programs) -> None:
    def order(**environment: str) -> list[int]:
        return [int(thread) for thread in programs.run("plain", "order", **environment).stdout.split()]

    assert order() == order(EMULATION_ORDER="forward") == list(range(8))
    assert order(EMULATION_ORDER="reverse") == list(range(8))[::-1]
    drawn = [order(EMULATION_ORDER="random", EMULATION_SEED=str(seed)) for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2] != drawn[3]
    assert all(sorted(threads) == list(range(8)) for threads in drawn)
    for environment in ({"EMULATION_ORDER": "sideways"}, {"EMULATION_SEED": "many"}):
        result = programs.run("plain", "order", **environment)
        assert result.returncode == 1
        assert result.stdout.startswith(b"emulation: note_order: EMULATION_ORDER has to be")


# ---- layouts, as the PTX ISA gives them for mma.m16n8k16 with .f16 and .bf16, and for ldmatrix

LANES, GROUP, THREAD_IN_GROUP = np.arange(32), np.arange(32) >> 2, np.arange(32) % 4


def a_element(i: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column in A of element i of each lane."""
    row = GROUP if 0 <= i < 2 or 4 <= i < 6 else GROUP + 8
    return row, THREAD_IN_GROUP * 2 + (i & 1) + (0 if i < 4 else 8)


def b_element(i: int) -> tuple[np.ndarray, np.ndarray]:
    return THREAD_IN_GROUP * 2 + (i & 1) + (0 if i < 2 else 8), GROUP


def c_element(i: int) -> tuple[np.ndarray, np.ndarray]:
    return GROUP if i < 2 else GROUP + 8, THREAD_IN_GROUP * 2 + (i & 1)


def bits(values: np.ndarray, kind: str) -> np.ndarray:
    """Of numbers that either type holds exactly."""
    if kind.startswith("f16"):
        return values.astype(np.float16).view(np.uint16)
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("kind", ["bf16", "f16", "f16_on_sm_75"])
def test_products_are_those_of_matrices(programs: Programs, kind: str) -> None:
    generator = np.random.default_rng(0)
    a, b, c = (generator.integers(-100, 101, size).astype(np.float64) for size in ((16, 16), (16, 8), (16, 8)))
    lanes = np.zeros(32, [("a", np.uint16, 8), ("b", np.uint16, 4), ("c", np.float32, 4)])
    for i in range(8):
        lanes["a"][:, i] = bits(a, kind)[a_element(i)]
    for i in range(4):
        lanes["b"][:, i] = bits(b, kind)[b_element(i)]
        lanes["c"][:, i] = c[c_element(i)]
    result = programs.run("plain", f"multiply_{kind}", stdin=lanes.tobytes())
    assert result.returncode == 0
    found = np.frombuffer(result.stdout, np.float32).reshape(32, 8)
    added, first = np.full((2, 16, 8), np.nan)
    for i in range(4):
        added[c_element(i)] = found[:, i]
        first[c_element(i)] = found[:, 4 + i]
    np.testing.assert_array_equal(added, a @ b + c)
    np.testing.assert_array_equal(first, a @ b)


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_are_loaded_as_they_lie(programs: Programs, transposed: bool) -> None:
    matrices = np.random.default_rng(1).permutation(2**16)[:256].astype(np.uint16).reshape(4, 8, 8)
    result = programs.run("plain", "load_matrices" + "_transposed" * transposed, stdin=matrices.tobytes())
    assert result.returncode == 0
    found = np.frombuffer(result.stdout, np.uint16).reshape(32, 4, 2)
    for i, matrix in enumerate(matrices.transpose(0, 2, 1) if transposed else matrices):
        for element in range(2):
            np.testing.assert_array_equal(found[:, i, element], matrix[GROUP, THREAD_IN_GROUP * 2 + element])
