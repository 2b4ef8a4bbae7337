"""`python -m greedynas_ext.bench`: cases as data, what a result says, files, comparison with earlier results."""

from __future__ import annotations

import csv
import json
import math
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from greedynas_ext import adapt, evaluate_paths
from greedynas_ext.bench import ceilings, command, contest, subjects, table
from greedynas_ext.bench.cases import CASES, ISA_LIMITS, Case, read_cases
from greedynas_ext.bench.compare import Change, compare
from greedynas_ext.bench.measure import Spread
from greedynas_ext.bench.ways import WAYS, reference_losses

ROOT = Path(__file__).parents[2]
OWN = """
[[case]]
name = "adapted"
supernet = "my_supernets:adapted"
resolution = 16
images = 6
paths = 4
classes = 10
fused = false
precision = ["fp32", "bf16"]

[[case]]
name = "chain"
supernet = "my_supernets:chain"
resolution = 9
channels = 1
classes = 4
images = 6
paths = 3
bn = "running"

[[case]]
name = "whole"
supernet = "my_supernets:called_whole"
resolution = 16
images = 6
paths = 3
classes = 10
fused = false
"""


@pytest.fixture
def run(capsys):
    """Runs the command line in this process and returns what it prints."""

    def main(*arguments):
        command.main(list(map(str, arguments)))
        return capsys.readouterr().out

    return main


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A file of cases with supernets of one's own, which can be imported, here and in children."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")
    file = tmp_path / "own.toml"
    file.write_text(OWN)
    return file


def result_of(name="mini-16-fp32", ratio=(3.0, 2.9, 3.1), **case):
    """Of a measurement that there was not."""
    spread = dict(zip(("median", "lower", "upper"), ratio, strict=True))
    return {
        "case": {**asdict(CASES["mini-16-fp32"]), "name": name, **case},
        "rounds": 3, "plain": "eager, fp32", "loop": "eager, fp32", "sharing": "eager, fp32, sharing",
        "milliseconds": dict.fromkeys(("eager, fp32", "eager, fp32, sharing", contest.OURS), spread),
        "ratio_plain": spread, "ratio_loop": spread, "ratio_sharing": spread,
        "kernels": "fused, avx2", "macs_left": 0.9, "macs_fused": 1.0,
        "ceilings": {"macs": 1e11, "products": "fp32", "bytes": 1e10, "memory": "sum"},
        "of_ceilings": {"products": 0.25, "memory": 0.5},
        "errors": {"eager, fp32": 1e-4, contest.OURS: 1e-6}, "machine": {"cpu": "a cpu", "threads": 2},
    }  # fmt: skip


# ---- cases


def test_the_case_list_names_every_case(run):
    assert [line.split(",")[0] for line in run("--list").splitlines()] == [f"name={name}" for name in CASES]
    assert len(CASES) == 21
    assert CASES["mbv2-7-population-bf16"] == Case(
        "mbv2-7-population-bf16", "mbv2-7", source="population", paths=50, precision="bf16"
    )
    assert {case.isa for case in CASES.values()} == {None, "avx512", "avx2", "avx512-bf16"}


def test_a_file_of_ones_own(own, run):
    cases = read_cases(own)
    assert list(cases) == ["adapted-fp32", "adapted-bf16", "chain", "whole"]
    assert cases["adapted-bf16"].precision == "bf16"
    lines = run("--cases", own, "--dry-run", "--eager").splitlines()
    assert lines[0].startswith("name=adapted-fp32, ")
    assert (
        "9 rounds against: eager, fp32; eager, fp32, sharing; eager, fp32, not channels_last; own forward, fp32"
        in lines[1]
    )
    assert lines[5].strip().startswith("9 rounds against: eager, fp32; eager, fp32, sharing; eager folded paths, fp32")
    assert lines[7].strip() == "9 rounds against: own forward, fp32"


BAD = {
    "field": ('space = "mini-16"\nimagse = 3', "imagse: expected one of bn, channels"),
    "count": ('space = "mini-16"\nimages = 0', "images: expected"),
    "both": ('space = "mini-16"\nsupernet = "a:b"', r"space: expected either .*, got both"),
    "none": ("images = 3", "got none"),
    "policy": ('space = "mini-16"\nbn = "recalibrated"', "bn: expected one of 'batch', 'running', got 'recalibrated'"),
    "precision": ('space = "mini-16"\nprecision = ["fp32", "fp16"]', "case one-fp16: precision: expected one of"),
    "isa": ('space = "mini-16"\nisa = "sse"', "isa: expected one of None, 'avx512'"),
    "resolution": ('supernet = "a:b"', "resolution: expected"),
    "fused": ('space = "mini-16"\nfused = "yes"', "fused: expected true or false, got 'yes'"),
    "twice": ('space = "mini-16"\n[[case]]\nname = "one"\nspace = "mini-28"', "name: expected each once"),
    "toml": ("space = ", "expected a TOML file of cases"),
    "table": ('space = "mini-16"\n[other]', r"expected \[\[case\]\] tables alone, got \['other'\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_cases_are_named(tmp_path, name):
    file = tmp_path / "cases.toml"
    file.write_text(f'[[case]]\nname = "one"\n{BAD[name][0]}\n')
    with pytest.raises(ValueError, match=BAD[name][1]) as raised:
        read_cases(file)
    assert str(file) in str(raised.value)


def test_the_command_line_names_what_is_wrong(tmp_path, capsys):
    for arguments, message in (
        (["--rounds", "1"], "--rounds: expected at least 2, got 1"),
        (["--case", "mini-17"], "--case: expected some of mbv2-7-fp32, "),
        (["--cases", str(tmp_path / "none.toml")], "--cases: "),
        (["--compare", str(tmp_path / "none.json")], "--compare: "),
    ):
        with pytest.raises(SystemExit, match="2"):
            command.main(arguments)
        assert message in capsys.readouterr().err


def test_a_space_without_greedynas(monkeypatch):
    monkeypatch.setitem(sys.modules, "greedynas", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"the space 'mini-16' is made by the package greedynas, which is not"
    ):
        contest.run_case(CASES["mini-16-fp32"], 2, False)


def test_the_package_needs_no_greedynas():
    code = (
        "import sys; sys.modules['greedynas'] = None; import greedynas_ext.bench.command; print('greedynas' in dir())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_functions_that_are_none(own):
    case = read_cases(own)["chain"]
    for name, message in (
        ("my_supernets", "expected module:function, got 'my_supernets'"),
        ("my_supernets:nothing", "expected a function 'nothing' in my_supernets, found none"),
    ):
        with pytest.raises(ValueError, match=f"^supernet: {message}"):
            subjects.subject_of(replace(case, supernet=name))
    with pytest.raises(ModuleNotFoundError, match="no_such"):
        subjects.subject_of(replace(case, supernet="no_such:function"))


# ---- measuring


def test_disagreeing_losses_are_not_timed():
    errors = contest.errors_of({"right": [1.0, 2.0], "wrong": [1.0, 2.5], "nan": [1.0, math.nan]}, [1.0, 2.0])
    assert errors["right"] == 0.0
    assert errors["wrong"] == 0.5
    allowed = dict.fromkeys(errors, 0.01)
    contest.check_agreement({"right": errors["right"]}, allowed)
    for name in ("wrong", "nan"):
        with pytest.raises(ValueError, match=f"{name} by .* nothing is timed"):
            contest.check_agreement({name: errors[name]}, allowed)
    assert contest.tolerance("fp32", 1e-6) == 1e-3
    assert contest.tolerance("bf16", 0.05) == pytest.approx(0.15)


def check(result):
    """Ratios are those of the seconds; ours is what it says."""
    seconds = result["seconds"]
    assert {len(values) for values in seconds.values()} == {result["rounds"]}
    for kind in ("plain", "loop", "sharing"):
        if kind in result:
            pairs = zip(seconds[result[kind]], seconds[contest.OURS], strict=True)
            assert result[f"ratio_{kind}"]["median"] == pytest.approx(statistics.median(a / b for a, b in pairs))
    assert statistics.median(seconds[result["loop"]]) <= statistics.median(seconds[result["plain"]])
    assert set(result["of_ceilings"]) == {"products", "memory"}
    assert all(share > 0 for share in result["of_ceilings"].values())
    json.dumps(result)


@pytest.mark.parametrize(
    "case", ["mini-16-fp32", "mini-16-bf16", pytest.param("mini-16-population-bf16", marks=pytest.mark.slow)]
)
def test_a_case_in_this_process(case):
    result = contest.run_case(CASES[case].quick(), 3, False, quick=True)
    check(result)
    assert result["kernels"].startswith("fused")
    assert result["macs_fused"] == 1.0
    assert result["plain"] == ("eager, fp32" if case.endswith("fp32") else "eager, autocast")
    assert "sharing" in result["sharing"]
    assert "sharing" not in result["loop"]
    assert len(table.row(result)) == len(table.HEADER)


@pytest.mark.parametrize("name", ["adapted-fp32", "adapted-bf16", "chain", "whole"])
def test_supernets_of_ones_own(own, name):
    case = read_cases(own)[name]
    subject = subjects.subject_of(case)
    before = {key: value.clone() for key, value in _module(subject.supernet).state_dict().items()}
    flags = [module.training for module in _module(subject.supernet).modules()]
    result = contest.run_case(case, 2, False, quick=True)
    check(result)
    whole = name == "whole"
    assert result["kernels"].startswith({"chain": "fused", "whole": "modules: called path by path"}.get(name, ""))
    assert ("sharing" in result) == (not whole)
    assert (result["plain"] == "own forward, fp32") == whole
    ways = contest.ways_of(case, subject.supernet, False)
    images, targets = torch.randn(4, case.channels, case.resolution, case.resolution), torch.tensor([0, 1, 2, 3])
    for way in ways:
        way.make(subject.supernet, torch.zeros(1, len(subject.sizes), dtype=torch.int64), images, targets, case.bn)()
    assert [module.training for module in _module(subject.supernet).modules()] == flags
    after = _module(subject.supernet).state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_an_elastic_supernet_runs_by_its_own_forward(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests/ext"))
    from foreign_elastic import ONCE, make_once, set_once

    view = adapt(make_once().eval(), choices=ONCE, select=set_once)
    before = {key: value.clone() for key, value in view.module.state_dict().items()}
    own = [way for way in WAYS if way.serves(view)]
    assert [way.name for way in own] == ["own forward, fp32", "own forward, autocast"]
    paths = torch.zeros(1, len(view.options), dtype=torch.int64)
    images, targets = torch.randn(4, 3, 18, 18), torch.tensor([0, 1, 2, 3])
    for bn in ("batch", "running"):
        losses = own[0].make(view, paths, images, targets, bn)()
        expected = evaluate_paths(view, paths, images, targets, bn=bn, fused=False).losses
        assert losses == pytest.approx(expected.tolist(), rel=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in view.module.state_dict().items())


def test_the_reference_of_an_adapted_supernet_is_not_in_channels_last(monkeypatch):
    """There PyTorch's batch normalisation sums in float32: losses of SPOS at 112x112 are 8e-5 away."""
    monkeypatch.syspath_prepend(str(ROOT / "tests/ext"))
    from foreign_by_path import ShuffleOneShot

    view = adapt(ShuffleOneShot())
    view.module.to(memory_format=torch.channels_last)
    places = [(value.data_ptr(), value.stride()) for value in view.module.parameters()]
    inputs = []
    for part in view.module.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.register_forward_pre_hook(lambda norm, given: inputs.append(given[0]))
    paths = torch.zeros(1, len(view.choices), dtype=torch.int64)
    images = torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last)
    reference_losses(view, paths, images, torch.tensor([0, 1, 2, 3]), "batch")
    assert inputs
    assert all(maps.is_contiguous() for maps in inputs)
    assert [(value.data_ptr(), value.stride()) for value in view.module.parameters()] == places


def _module(supernet):
    return supernet if isinstance(supernet, torch.nn.Module) else supernet.module


def test_what_must_be_fused_and_is_not(own):
    with pytest.raises(ValueError, match=r"^fused: expected a supernet that the fused kernels can evaluate"):
        contest.run_case(replace(read_cases(own)["whole"], fused=True), 2, False, quick=True)


def test_only_what_is_near_the_fastest_of_its_kind_is_timed_in_rounds():
    ways = [way for way in contest.WAYS if way.name in ("eager, fp32", "eager, fp32, not channels_last")]
    ways += [way for way in contest.WAYS if way.name == "eager, fp32, sharing"]
    seconds = {"eager, fp32": 3.0, "eager, fp32, not channels_last": 1.0, "eager, fp32, sharing": 9.0}
    assert contest.contenders(seconds, ways, "eager, fp32") == list(seconds)
    seconds["eager, fp32"], seconds["eager, fp32, not channels_last"] = 1.0, 1.6
    assert contest.contenders(seconds, ways, "eager, fp32") == ["eager, fp32", "eager, fp32, sharing"]


def test_ceilings():
    found = ceilings.measure(torch.device("cpu"), "bf16", 128, 1 << 18)
    assert found.macs > 0
    assert found.bytes > 0
    assert found.products in ("fp32", "bf16")
    assert ceilings.measure(torch.device("cpu"), "fp32", 128, 1 << 18).products == "fp32"


def test_a_quick_case_with_tuned_malloc_in_a_child(run, tmp_path):
    files = {name: tmp_path / f"result.{name}" for name in ("json", "csv", "png")}
    lines = run(
        *("--quick", "--rounds", 3, "--case", "mini-16-fp32", "--tuned-malloc"),
        *("--output", files["json"], "--csv", files["csv"], "--plot", files["png"]),
    ).splitlines()
    assert len(lines) == 2
    assert lines[1].startswith("mini-16-fp32")
    (result,) = table.read_results(files["json"])
    check(result)
    assert result["machine"]["environment"]["MALLOC_MMAP_MAX_"] == "0"
    assert result["case"]["images"] == 32
    (record,) = csv.DictReader(files["csv"].open())
    assert record["name"] == "mini-16-fp32"
    assert float(record["ratio_loop"]) == result["ratio_loop"]["median"]
    assert float(record["ours_ms_upper"]) == result["milliseconds"][contest.OURS]["upper"]
    assert files["png"].read_bytes().startswith(b"\x89PNG")


def test_the_script_of_before_does_the_same(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "bench/evaluate_paths.py", "--list"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("name=mbv2-7-fp32, space=mbv2-7")


def test_a_limited_instruction_set_reaches_the_child(monkeypatch):
    asked = []

    def record(arguments, env, check):
        asked.append({name: value for name, value in env.items() if name in ISA_LIMITS["avx2"]})
        return subprocess.CompletedProcess(arguments, 1)

    monkeypatch.setattr(command.subprocess, "run", record)
    with pytest.raises(SystemExit, match="1"):
        command.main(["--case", "mbv2-7-avx2"])
    assert asked == [ISA_LIMITS["avx2"]]


# ---- results


@pytest.mark.parametrize("name", ["tuned-malloc.json", "compiled.json", "zen5/tuned-malloc.json"])
def test_kept_results_are_read(run, name, tmp_path):
    lines = run(
        "--read", ROOT / "bench/results" / name, "--csv", tmp_path / "a.csv", "--plot", tmp_path / "a.svg"
    ).splitlines()
    results = table.read_results(ROOT / "bench/results" / name)
    assert lines[0] == table.HEADER
    assert [line.split()[0] for line in lines[1:]] == [result["case"]["name"] for result in results]
    assert len(list(csv.DictReader((tmp_path / "a.csv").open()))) == len(results)
    assert "<svg" in (tmp_path / "a.svg").read_text()


def test_files_that_are_no_results(tmp_path):
    file = tmp_path / "other.json"
    file.write_text('{"machine": {}}')
    with pytest.raises(ValueError, match=r"other.json: expected results of python -m greedynas_ext.bench, got another"):
        table.read_results(file)


@pytest.mark.parametrize(
    ("now", "verdict"),
    [
        ((2.5, 2.4, 2.89), "regression"),
        ((2.5, 2.4, 2.9), "within the spread"),
        ((3.0, 2.0, 4.0), "within the spread"),
        ((3.3, 3.11, 3.4), "improvement"),
    ],
)
def test_a_regression_is_one_beyond_the_spread(now, verdict):
    (change,) = compare([result_of(), result_of("another")], [result_of(ratio=now)])
    assert change == Change("mini-16-fp32", Spread(3.0, 2.9, 3.1), Spread(*now))
    assert change.verdict == verdict


def test_what_cannot_be_compared():
    with pytest.raises(ValueError, match="case mini-16-fp32: expected images 1000 as before, got 10"):
        compare([result_of()], [result_of(images=10)])
    with pytest.raises(ValueError, match="results: expected a case of another, got none of them"):
        compare([result_of("another")], [result_of()])


def test_the_exit_status_of_a_comparison(tmp_path, capsys):
    files = {}
    for name, ratio in (("old", (3.0, 2.9, 3.1)), ("same", (3.0, 2.8, 3.2)), ("worse", (2.0, 1.9, 2.1))):
        files[name] = tmp_path / f"{name}.json"
        files[name].write_text(json.dumps({"results": [result_of(ratio=ratio)]}))
    command.main(["--read", str(files["same"]), "--compare", str(files["old"])])
    assert "within the spread" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="1"):
        command.main(["--read", str(files["worse"]), "--compare", str(files["old"])])
    assert "regression" in capsys.readouterr().out


def test_another_machine_is_said(tmp_path, capsys):
    old, new = result_of(), result_of()
    new["machine"] = {"cpu": "another", "threads": 2}
    for name, result in (("old", old), ("new", new)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"results": [result]}))
    command.main(["--read", str(tmp_path / "new.json"), "--compare", str(tmp_path / "old.json")])
    assert "another machine: cpu a cpu before, another now" in capsys.readouterr().out
