"""The tracer itself: kernels whose traffic is known (traced.cu)."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from emulation_build import COMMAND, COMPILER, FOLDER, TRACE, build_traced, compile_tracer
from emulation_trace import Lines, named
from test_sanitized import run_tests

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

# A test or two of each file.
SMALL = [
    "test_conv_bn.py::test_strided_group[bf16]",
    "test_conv_bn.py::test_strided_group[fp32]",
    "test_conv_bn.py::test_stem_not_finite[fp16 on sm_75]",
    "test_conv_bn.py::test_stem_not_finite[fp32]",
    "test_expand_depthwise.py::test_without_statistics[bf16]",
    "test_expand_depthwise.py::test_without_statistics[fp32]",
    "test_expand_depthwise.py::test_variants[3-2-0-fp16 on sm_75]",
    "test_expand_depthwise.py::test_variants[5-1-1-fp32]",
    "test_finish_map.py::test_pixels[17-bf16]",
    "test_finish_map.py::test_pixels[17-fp32]",
    "test_head.py::test_image_alone_gives_the_same[bf16]",
    "test_head.py::test_image_alone_gives_the_same[fp32]",
    "test_linear.py::test_group",
    "test_mixed_op.py::test_few_pixels[fp32]",
    "test_pack.py::test_norms",
    "test_pack.py::test_pointwise_rounding",
    "test_pack.py::test_depthwise_extremes[bf16]",
    "test_pack.py::test_depthwise_extremes[fp32]",
    "test_pack.py::test_project_extremes[bf16]",
    "test_pack.py::test_project_extremes[fp32]",
    "test_path_cross_entropy.py::test_counts[300-fp32]",
    "test_project.py::test_group_of_different_depths[bf16]",
    "test_project.py::test_group_of_different_depths[fp32]",
    "test_select_top_k.py::test_ties[600-fp32]",
    "test_squeeze_excite.py::test_group[bf16]",
    "test_squeeze_excite.py::test_group[fp32]",
    "test_statistics.py::test_norm_affine_of_a_group",
    "test_statistics.py::test_pointwise_affine_of_a_group[bf16]",
    "test_statistics.py::test_pointwise_affine_of_a_group[fp16]",
    "test_statistics.py::test_pointwise_affine_of_a_group[fp32]",
    "test_cuda_chain.py::test_targets_out_of_range",
]


class Traced:
    """traced.cu, built."""

    def __init__(self, folder: Path) -> None:
        self.program = folder / "traced"
        tracer, kernels = compile_tracer(folder), folder / "traced.o"
        source = FOLDER / "traced.cu"
        subprocess.run([*COMMAND, *TRACE, "-O2", "-x", "c++", "-c", str(source), "-o", str(kernels)], check=True)
        subprocess.run([str(COMPILER), str(kernels), str(tracer), "-o", str(self.program)], check=True)
        self._lines = Lines(self.program)

    @cache  # noqa: B019
    def __call__(self, name: str) -> dict[str, Any]:
        """What is counted of a kernel."""
        output = subprocess.run([str(self.program), name], check=True, capture_output=True, timeout=60).stdout
        (launch,) = named(json.loads(output), self._lines)
        return launch


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    return Traced(tmp_path_factory.mktemp("traced"))


READ, WRITTEN = "read", "written"
COPIED = {"requests": 32, "lane_bytes": 4096, "launch_bytes": 4096, "block_bytes": 4096}
# Kernel, buffer, direction, and some of the counts.
GLOBAL = [
    *(
        # 1024 vectors of 16 bytes: a warp's 512 bytes are 16 sectors.
        ("copy_vectors", buffer, way, {"requests": 32, "lane_bytes": 16384, "sectors": 512, "ideal_sectors": 512})
        for buffer, way in (("x", READ), ("y", WRITTEN))
    ),
    ("copy_vectors", "x", READ, {"launch_bytes": 16384, "launch_sectors": 512, "block_bytes": 16384}),
    *(
        # 4 sectors a warp; 8 of which every second number is used; one each.
        (f"copy_strided_{stride}", buffer, way, {**COPIED, "sectors": sectors, "ideal_sectors": 128})
        for stride, sectors in ((1, 128), (2, 256), (8, 1024))
        for buffer, way in (("x", READ), ("y", WRITTEN))
    ),
    ("copy_strided_2", "x", READ, {"launch_sectors": 256, "block_sectors": 256}),
    # A warp's bytes end in a fifth sector, which is the next one's first; a block's and the launch's in one more.
    ("copy_shifted", "x", READ, {**COPIED, "sectors": 160, "launch_sectors": 129, "block_sectors": 132}),
    ("copy_shifted", "y", WRITTEN, {**COPIED, "sectors": 128, "launch_sectors": 128}),
    # 8 blocks of 64 floats, with 16 more on both sides where there are some: 14 of the 16 sides.
    ("copy_with_halo", "x", READ, {"launch_bytes": 2048, "block_bytes": 2048 + 14 * 64, "lane_bytes": 2048 + 14 * 64}),
    ("copy_with_halo", "x", READ, {"launch_sectors": 64, "block_sectors": 64 + 14 * 2}),
    ("copy_with_halo", "y", WRITTEN, {"launch_bytes": 2048, "block_bytes": 2048}),
    # Three times the same bytes, which are different ones once.
    *(
        ("read_and_write_again", "y", way, {"requests": 6, "lane_bytes": 768, "launch_bytes": 256, "block_bytes": 256})
        for way in (READ, WRITTEN)
    ),
    ("same_word", "x", READ, {"requests": 1, "lane_bytes": 128, "sectors": 1, "ideal_sectors": 1, "launch_bytes": 4}),
    ("few_halves", "x", READ, {"requests": 1, "lane_bytes": 10, "sectors": 1, "launch_bytes": 10}),
    ("few_halves", "y", WRITTEN, {"requests": 1, "lane_bytes": 10, "sectors": 1, "launch_bytes": 10}),
    # Atomic operations are both.
    *(
        ("add", "y", way, {"requests": 4, "sectors": 4, "lane_bytes": 512, "launch_bytes": 32, "block_bytes": 64})
        for way in (READ, WRITTEN)
    ),
    # Half a warp each; it writes together. Of 16 floats every second one is read: 4 sectors that hold 64 bytes.
    ("branches", "x", READ, {"requests": 2, "lane_bytes": 128, "sectors": 8, "ideal_sectors": 4}),
    ("branches", "y", WRITTEN, {"requests": 1, "lane_bytes": 128, "sectors": 4, "ideal_sectors": 4}),
    # In turn t, lanes t to 31: 8 times 1, 2, 3 and 4 sectors.
    *(
        ("different_turns", buffer, way, {"requests": 32, "lane_bytes": 4 * 32 * 33 // 2, "ideal_sectors": 80})
        for buffer, way in (("x", READ), ("y", WRITTEN))
    ),
    ("calls", "x", READ, {"requests": 2, "lane_bytes": 256, "sectors": 4 + 8, "launch_bytes": 4 * (32 + 16)}),
    # The first matrix's row of a lane is 16 bytes.
    ("matrices_16", "x", READ, {"requests": 1, "lane_bytes": 512, "sectors": 16, "launch_bytes": 512}),
]


@pytest.mark.parametrize(
    ("kernel", "buffer", "way", "expected"), GLOBAL, ids=[f"{k}, {b} {w}, {i}" for i, (k, b, w, _) in enumerate(GLOBAL)]
)
def test_global_memory(traced: Traced, kernel: str, buffer: str, way: str, expected: dict[str, int]) -> None:
    counts = traced(kernel)["buffers"][buffer][way]
    assert {name: counts[name] for name in expected} == expected


# Kernel, kind of request, bytes a lane: requests, their ways, wavefronts, and how many they would be at best.
SHARED = [
    *(
        (f"shared_strided_{stride}", kind, 4, {ways: 1}, ways, 1)
        for stride, ways in ((1, 1), (2, 2), (32, 32), (33, 1))
        for kind in ("store", "load")
    ),
    ("transpose_0", "store", 4, {1: 32}, 32, 32),
    ("transpose_0", "load", 4, {32: 32}, 1024, 32),
    ("transpose_1", "store", 4, {1: 32}, 32, 32),
    ("transpose_1", "load", 4, {1: 32}, 32, 32),
    # Quarters of warps: 128 bytes, all banks once; of every second vector, half of the banks twice; one for all.
    ("shared_vectors", "store", 16, {1: 2}, 8, 8),
    ("shared_vectors", "load", 16, {1: 2, 2: 1}, 4 + 8 + 4, 12),
    ("shared_pairs", "store", 8, {1: 2}, 4, 4),
    ("shared_pairs", "load", 8, {1: 1, 2: 1}, 2 + 4, 4),
    # Eight rows of a matrix: next to each other, in every second place, all in the same banks, in a row each further.
    *(
        (f"matrices_{distance}", kind, 16, {ways: requests}, 4 * ways * requests, 4 * requests)
        for distance, ways in ((16, 1), (32, 2), (128, 8), (144, 1))
        for kind, requests in (("async", 1), ("matrix", 2))
    ),
]


@pytest.mark.parametrize(
    ("kernel", "kind", "size", "ways", "wavefronts", "ideal"), SHARED, ids=[f"{k}, {kind}" for k, kind, *_ in SHARED]
)
def test_shared_memory(
    traced: Traced, kernel: str, kind: str, size: int, ways: dict[int, int], wavefronts: int, ideal: int
) -> None:
    sites = [site for site in traced(kernel)["shared"] if site["kind"] == kind]
    assert {site["bytes"] for site in sites} == {size}
    found: dict[int, int] = {}
    for site in sites:
        for way, requests in site["by_ways"].items():
            found[way] = found.get(way, 0) + requests
    assert found == ways
    assert sum(site["requests"] for site in sites) == sum(ways.values())
    assert sum(site["wavefronts"] for site in sites) == wavefronts
    assert sum(site["ideal_wavefronts"] for site in sites) == ideal


def test_requests_have_the_lines_of_their_kernels(traced: Traced) -> None:
    source = (FOLDER / "traced.cu").read_text().splitlines()
    sites = {site["kind"]: site["line"] for site in traced("transpose_0")["shared"]}
    for kind, text in (("store", "tile[row][i] ="), ("load", "= tile[i][row]")):
        file, line = sites[kind].split(":")
        assert file == "traced.cu"
        assert text in source[int(line) - 1]
    # Of what the emulator does for a kernel, that of the kernel.
    lines = [site["line"].split(":") for site in traced("matrices_128")["shared"]]
    texts = {source[int(line) - 1].strip().split("(")[0] for _, line in lines}
    assert texts == {"copy_async16", "load_matrices", "load_matrices_transposed"}


def test_operations_are_counted(traced: Traced) -> None:
    launch = traced("operations")  # 3 blocks of 2 warps
    assert (launch["grid"], launch["block"]) == ([3, 1, 1], [64, 1, 1])
    assert launch["barriers"] == 6
    assert launch["warp"] == {"barriers": 6, "shuffles": 12, "matrix_products": 6, "matrix_loads": 0}
    assert traced("matrices_16")["warp"]["matrix_loads"] == 2
    assert traced("matrices_16")["dynamic_shared_bytes"] == 512
    assert traced("transpose_1")["static_shared_bytes"] == 4 * 32 * 33


def test_memory_without_a_name_is_an_error(traced: Traced) -> None:
    with pytest.raises(RuntimeError, match=r"expected accesses to named memory alone, got 32 .* traced.cu:\d+"):
        traced("unnamed")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_tracing_build(tmp_path: Path) -> None:
    """Its kernels still compute what they should, and the report of their traffic can be made."""
    build_traced(tmp_path, 3)
    out = run_tests(tmp_path, [], {}, SMALL)
    assert f"{len(SMALL)} passed" in out
    script = FOLDER.parents[1] / "bench" / "gpu" / "emulate_report.py"
    command = [sys.executable, str(script), "--quick", "--images", "1", "--build", str(tmp_path), "--output", "report"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=600)
    content = json.loads((tmp_path / "report/traffic.json").read_text())
    assert len(content["launches"]) == len(content["calls"]) + 2  # finish_map's and path_cross_entropy's second ones
    assert (tmp_path / "report/traffic.md").read_text().count("\n| ") == len(content["calls"]) + 1
    buffers = {launch["kernel"]: launch["buffers"] for launch in content["launches"]}
    # 1 image of 7x7, 576 channels to 192, one block.
    d, y, weight = (buffers["project"][name] for name in ("d", "y", "weight"))
    assert d["read"]["launch_bytes"] == d["read"]["block_bytes"] == d["read"]["lane_bytes"] == 2 * 49 * 576
    assert y["written"]["launch_bytes"] == y["written"]["block_bytes"] == 2 * 49 * 192
    assert weight["read"]["launch_bytes"] == weight["read"]["block_bytes"] == 2 * 576 * 192
    # Every second pixel in both directions of 14x14.
    assert buffers["strided_conv"]["x"]["read"]["launch_bytes"] == 2 * 49 * 96
