"""The CPU operations, kernels and chains under the address, undefined-behaviour and thread sanitizers."""

from __future__ import annotations

from pathlib import Path

import pytest
from native_build import COMPILER, build, machine_capabilities, run


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    "flags",
    [
        ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
        ["-fsanitize=thread"],
    ],
    ids=["address and undefined", "thread"],
)
def test_under_sanitizers(flags: list[str], tmp_path: Path):
    # -w: beside the thread sanitizer gcc 12 takes vectors for uninitialised that are set lane by lane.
    common = ["-O1", "-w", "-DGREEDYNAS_POISON"]
    programs = build(tmp_path, [*common, *flags], ["sanitize_main.cpp", "kernels_main.cpp"])
    operations, kernels = programs
    for capability in (None, "portable"):
        assert run(operations, capability=capability) == ["all as expected"]
    *tables, _, last = run(kernels, "--quick")
    assert last == "all as expected"
    assert ("amx" in machine_capabilities()) == any(line.startswith("amx, TiledBFloat16: ") for line in tables)
    for capability in machine_capabilities()[:-1]:  # the best one's chains have been run
        assert run(kernels, "--chains", capability=capability)[-1] == "all as expected"
