"""The kept report of what the CUDA kernels move (bench/gpu/emulate_report.py); tests/emulation makes a small one."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "bench/results/emulated"
MODULES = ("emulate_report", "emulated_cases", "emulated_traffic", "kernel_nodes", "gpu_kernels")


@pytest.fixture
def bench(monkeypatch):
    """Imports a module of bench/gpu by its name; afterwards none of them is left."""
    monkeypatch.syspath_prepend(str(ROOT / "tests/emulation"))
    monkeypatch.syspath_prepend(str(ROOT / "bench/gpu"))
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def content():
    return json.loads((KEPT / "traffic.json").read_text())


def test_every_shape_is_reported_once(bench, content):
    cases = {(case.kernel, case.name) for case in bench("emulated_cases").cases(False, None)}
    calls = [(call["kernel"], call["name"]) for call in content["calls"]]
    assert len(calls) == len(set(calls))
    assert set(calls) == cases
    assert {(launch["kernel"], launch["name"]) for launch in content["launches"]} == cases
    layers = bench("emulated_cases").cases(False, ["expand_depthwise"])
    assert len(layers) == 9 * 2 * 3  # shapes of inputs, expansions, kernel sizes
    quick = bench("emulated_cases").cases(True, None)
    assert {case.kernel for case in quick} == {kernel for kernel, _ in cases}


def test_verdicts_follow_from_the_counts(bench, content):
    traffic, report = bench("emulated_traffic"), bench("emulate_report")
    for call in content["calls"]:
        case = call["kernel"], call["name"]
        launches = [launch for launch in content["launches"] if (launch["kernel"], launch["name"]) == case]
        assert traffic.judge(case, launches, call["units"]) == call
    assert (KEPT / "traffic.md").read_text() == report.table(content)


def test_what_is_not_met_has_a_reason(content):
    for call in content["calls"]:
        for limit, verdict in call["verdicts"].items():
            assert verdict["met"] or "Not known" not in verdict["why"], (call["kernel"], call["name"], limit)


def test_counts_are_possible(content):
    for launch in content["launches"]:
        for buffer in launch["buffers"].values():
            for way in ("read", "written"):
                counts = buffer[way]
                assert counts["launch_bytes"] <= buffer["bytes"]
                assert counts["launch_bytes"] <= counts["block_bytes"] <= counts["lane_bytes"]
                assert counts["requests"] <= counts["sectors"] or counts["requests"] == 0
                assert counts["ideal_sectors"] <= counts["sectors"]
                assert counts["block_sectors"] <= counts["sectors"]
                assert buffer[f"floor_{way}"] <= counts["launch_bytes"]
        for kind in launch["shared"].values():
            assert kind["requests"] <= kind["ideal_wavefronts"] <= kind["wavefronts"]
    # The kernels cut their work on the part of a device as on the whole: within a unit of rounding, or, of small maps,
    # within one more tile of 128 pixels in a unit.
    tiles = {
        (launch["kernel"], launch["name"]): launch["images"] * launch["shape"]["height"] ** 2 / 128
        for launch in content["launches"]
        if launch["kernel"] == "pool"
    }
    for call in content["calls"]:
        if call["units"] is None:
            continue
        here, there = call["units"]["here"], call["units"]["there"] / content["device"]["stands_for"]["multiprocessors"]
        if of_map := tiles.get((call["kernel"], call["name"])):
            assert of_map / here == pytest.approx(of_map / there, abs=1.01)
        else:
            assert here == pytest.approx(there, abs=1.01)


def test_a_limit_that_is_exceeded_is_named(bench):
    """The verdicts of a launch that is far off in everything."""
    traffic = bench("emulated_traffic")
    read = {"requests": 10, "lane_bytes": 4000, "sectors": 200, "ideal_sectors": 100, "launch_bytes": 2000}
    read |= {"launch_sectors": 100, "block_bytes": 5000, "block_sectors": 160}
    written = dict.fromkeys(read, 0)
    x = {"role": "stream", "bytes": 4000, "floor_read": 2000, "floor_written": 0, "read": read, "written": written}
    site = {"line": "some.cu:7", "kind": "load", "bytes": 4, "requests": 100, "wavefronts": 130}
    rare = {**site, "requests": 1, "by_ways": {"32": 1}}
    shared = {"load": {"requests": 101, "wavefronts": 162}}
    launch = {"buffers": {"x": x}, "shared": shared, "blocks": 2, "threads": 100}
    launch["sites"] = [rare, {**site, "by_ways": {"1": 90, "4": 10}}]
    call = traffic.judge(("some", "shape"), [launch], None)
    values = {limit: (verdict["value"], verdict["met"]) for limit, verdict in call["verdicts"].items()}
    assert values == {"launch": (1.6, False), "blocks": (2.5, False), "sectors": (2.0, False), "ways": (4, False)}
    assert call["verdicts"]["ways"]["of"] == "some.cu:7 load"
    assert call["verdicts"]["ways"]["share"] == 0.1
    assert call["floor_bytes"] == 2000
    outside = {**launch, "blocks": 4}  # 16 warps that pass the line 6 times
    assert traffic.judge(("some", "shape"), [outside], None)["verdicts"]["ways"]["value"] == 1
