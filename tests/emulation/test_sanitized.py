"""All CUDA kernels, and the chain that drives them, emulated under the sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulation_build import COMPILER, FOLDER, build

OF_THE_EMULATION = ("test_emulator", "test_sanitized", "test_trace")
ALL = sorted(path.name for path in FOLDER.glob("test_*.py") if path.stem not in OF_THE_EMULATION)
# A test or two of each file: fibers are expensive for the thread sanitizer.
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
    "test_path_cross_entropy.py::test_counts[300]",
    "test_project.py::test_group_of_different_depths[bf16]",
    "test_project.py::test_group_of_different_depths[fp32]",
    "test_select_top_k.py::test_ties[600]",
    "test_squeeze_excite.py::test_group[bf16]",
    "test_squeeze_excite.py::test_group[fp32]",
    "test_statistics.py::test_norm_affine_of_a_group",
    "test_statistics.py::test_pointwise_affine_of_a_group[bf16]",
    "test_statistics.py::test_pointwise_affine_of_a_group[fp16]",
    "test_statistics.py::test_pointwise_affine_of_a_group[fp32]",
    "test_cuda_chain.py::test_targets_out_of_range",
]
ADDRESS = ["-g1", "-w", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
THREAD = ["-g1", "-w", "-fsanitize=thread"]


def library(name: str) -> str:
    return subprocess.run(
        [str(COMPILER), f"-print-file-name={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()


def run_tests(folder: Path, preloaded: list[str], options: dict[str, str], arguments: list[str]) -> str:
    """Runs tests with the module in `folder`; Python itself knows nothing of sanitizers, so they come before it."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", *arguments]
    # The thread sanitizer knows fewer address layouts than kernels do.
    fixed_layout = ["setarch", "-R"]
    if shutil.which("setarch") and subprocess.run([*fixed_layout, "true"], capture_output=True).returncode == 0:
        command = [*fixed_layout, *command]
    environment = {name: value for name, value in os.environ.items() if name != "GREEDYNAS_TEST_CUDA"}
    # Torch's own threads are of no interest, and nobody told the sanitizers how they wait for each other.
    environment |= {"CUDA_KERNELS": str(folder), "LD_PRELOAD": " ".join(preloaded), "OMP_NUM_THREADS": "1", **options}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=FOLDER)
    if "unexpected memory mapping" in result.stderr:
        pytest.skip(
            "this kernel's address layout is not one that the thread sanitizer knows (unexpected memory mapping)"
        )
    assert result.returncode == 0, result.stdout[-10000:] + result.stderr[-10000:]
    return result.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    build(tmp_path, ADDRESS)
    # Elsewhere threads run forward; the thread sanitizer does not depend on their order.
    options = {"ASAN_OPTIONS": "detect_leaks=0", "EMULATION_ORDER": "random"}
    out = run_tests(tmp_path, [library("libasan.so"), library("libstdc++.so")], options, ["-m", "not slow", *ALL])
    assert " passed" in out


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_under_thread_sanitizer(tmp_path: Path) -> None:
    build(tmp_path, THREAD)
    options = {"TSAN_OPTIONS": "halt_on_error=1 history_size=4 ignore_noninstrumented_modules=1"}
    out = run_tests(tmp_path, [library("libtsan.so"), library("libstdc++.so")], options, SMALL)
    assert f"{len(SMALL)} passed" in out
