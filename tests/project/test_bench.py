"""The scripts of bench/ run, measure what they say, and the recorded paths are paths of their spaces.

`python -m greedynas_ext.bench` is in test_bench_command.py.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import statistics
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch

from greedynas import get_space
from greedynas_ext.bench import cases, inputs, measure, ours, subjects, ways

BENCH = Path(__file__).parents[2] / "bench"
MODULES = ("adapted_native", "adapted_supernets", "child", "growth", "job", "make_paths", "rank_fidelity", "stages")
RECORDED = sorted(inputs.PATHS.glob("*.json"))


@pytest.fixture
def bench(monkeypatch):
    """Imports a module of bench/ by its name; afterwards none of them is left, for their names are common ones."""
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def run(bench, monkeypatch, capsys):
    """Runs the command line of a script of bench/ in this process and returns what it prints."""

    def main(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        bench(script).main()
        return capsys.readouterr().out

    return main


def read_paths(file, space):
    return inputs.read_paths(file, (space.num_operations,) * space.num_layers, space.name)


def directly(function, *arguments):
    """For `in_child`, where the process is not what a test is about."""
    return function(*arguments)


def fails(*arguments):
    raise OSError("the disk is full")


def test_every_space_of_the_cases_has_recorded_paths():
    spaces = {case.space for case in cases.CASES.values()}
    assert {path.name for path in RECORDED} == {f"{s}-{kind}.json" for s in spaces for kind in ("pool", "population")}


@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)
def test_recorded_paths_are_of_their_space_and_say_where_they_are_from(file):
    content = json.loads(file.read_text())
    space = get_space(content["space"])
    paths = read_paths(file, space)
    assert file.name.startswith(f"{space.name}-")
    assert len({tuple(path) for path in paths.tolist()}) == len(paths) >= 50
    assert all(math.isfinite(entry["loss"]) for entry in content["entries"])
    origin = content["origin"]
    assert origin["command"] == f"python bench/make_paths.py {space.name}"
    # Evaluated within a budget: the recorded paths must be too, where there is one.
    training = origin["training"]
    if training["max_macs"] is not None:
        narrow = get_space(space.name, in_channels=1, num_classes=10)
        assert max(narrow.macs(paths, training["resolution"])) <= training["max_macs"] * 1e6 or "search" in origin
    assert origin["optimizer_steps"] == origin["iterations"] * training["kept_paths"]


def test_recorded_paths_of_another_space_are_refused():
    with pytest.raises(ValueError, match="expected paths of 'mini-28', got some of 'mini-16'"):
        read_paths(inputs.PATHS / "mini-16-pool.json", get_space("mini-28"))


def test_paths_from_the_pool_are_eight_of_ten_and_different():
    space = get_space("mini-16")
    pool = {tuple(path) for path in read_paths(inputs.PATHS / "mini-16-pool.json", space).tolist()}
    drawn = [tuple(path) for path in inputs.make_paths("pool", 10, space).tolist()]
    assert len(drawn) == 10
    assert len({path for path in drawn[2:] if path in pool}) == 8
    with pytest.raises(ValueError, match="count: expected at most 50"):
        inputs.make_paths("population", 51, space)


@pytest.mark.parametrize("content", [[[0, 1], [2, 0]], {"entries": [{"path": [0, 1]}, {"path": [2, 0], "loss": 1.0}]}])
def test_paths_from_a_file(tmp_path, content):
    file = tmp_path / "evolution.json"
    file.write_text(json.dumps(content))
    assert inputs.paths_from(str(file), 2, (3, 2)).tolist() == [[0, 1], [2, 0]]
    assert inputs.paths_from(str(file), 1, (3, 2)).tolist() == [[0, 1]]
    with pytest.raises(ValueError, match=r"count: expected at most 2 paths of .*evolution\.json, got 3"):
        inputs.paths_from(str(file), 3, (3, 2))
    with pytest.raises(ValueError, match=r"evolution\.json\[1\]\[0\]: expected an operation index of 0 to 1, got 2"):
        inputs.paths_from(str(file), 2, (2, 2))
    file.write_text("[]")
    with pytest.raises(ValueError, match="expected a list of paths, or entries that each have a path, got none"):
        inputs.paths_from(str(file), 1, (3, 2))


def test_sources_that_there_are_not(tmp_path):
    with pytest.raises(
        ValueError, match=r"source: expected uniform, pool, population or a \.json file of paths, got 'x'"
    ):
        inputs.paths_from("x", 1, (3, 2))
    with pytest.raises(FileNotFoundError, match=r"none\.json: no such file"):
        inputs.paths_from(str(tmp_path / "none.json"), 1, (3, 2))
    with pytest.raises(FileNotFoundError, match=r"macro-pool.json: no such file; `python bench/make_paths.py macro`"):
        inputs.paths_from("pool", 1, (3, 2), "macro")
    layers = inputs.paths_from("uniform", 400, (1, 3, 2))
    assert [sorted(set(column.tolist())) for column in layers.T] == [[0], [0, 1, 2], [0, 1]]


def test_paths_of_a_supernet_have_losses_that_differ():
    space = get_space("mini-16")
    images = inputs.make_images(32, 1, 8)
    assert images.flatten(1).std(dim=1).min() > 0.1
    assert images.flatten(1).mean(dim=1).std() > 0.1
    for bn in ("batch", "running"):
        losses = ways.reference_losses(
            subjects.make_supernet(space),
            inputs.make_paths("uniform", 6, space),
            images,
            inputs.make_targets(32, 10),
            bn,
        )
        assert statistics.pstdev(losses) > 0.02


@pytest.mark.parametrize("bn", ["batch", "running"])
def test_the_ways_agree_and_leave_the_supernet_alone(bn):
    space = get_space("mini-16")
    supernet = subjects.make_supernet(space)
    before = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    images, targets = inputs.make_images(32, 1, 8), inputs.make_targets(32, 10)
    paths = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0], [0, 1, 2, 3, 0, 0, 0, 0], [6] * 8, [0, 1, 2, 3, 4, 5, 6, 0]])
    reference = ways.reference_losses(supernet, paths, images, targets, bn)
    loop = supernet.double().train(bn == "batch")
    # The definition, once more and without the code of the ways.
    expected = [torch.nn.functional.cross_entropy(loop(images.double(), path), targets).item() for path in paths]
    supernet.float().eval().load_state_dict(before)
    assert reference == pytest.approx(expected, abs=1e-5)
    checked = 0
    for way in ways.WAYS:
        if bn in way.policies and not way.compiled and way.serves(supernet):
            losses = way.make(supernet, paths, images, targets, bn)()
            tolerance = 1e-4 if way.precision == "fp32" else 5e-2
            assert losses == pytest.approx(reference, abs=tolerance), way.name
            checked += 1
    assert checked == {"batch": 7, "running": 9}[bn]
    after = supernet.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.slow
def test_compiled_ways_agree():
    space = get_space("mini-16")
    supernet, images, targets = subjects.make_supernet(space), inputs.make_images(32, 1, 8), inputs.make_targets(32, 10)
    paths = inputs.make_paths("uniform", 2, space)
    for way in ways.WAYS:
        if way.compiled:
            bn = way.policies[0]
            reference = ways.reference_losses(supernet, paths, images, targets, bn)
            losses = way.make(supernet, paths, images, targets, bn)()
            assert losses == pytest.approx(reference, abs=1e-4 if way.precision == "fp32" else 5e-2), way.name


def test_folding_removes_the_batch_normalisations():
    from greedynas import Network

    network = Network.from_supernet(subjects.make_supernet(get_space("mini-16")), [0, 1, 2, 3, 4, 5, 6, 0]).eval()
    images = inputs.make_images(4, 1, 8)
    with torch.no_grad():
        logits = network(images)
        folded = ways.folded(network)
        assert not [part for part in folded.modules() if isinstance(part, torch.nn.BatchNorm2d)]
        torch.testing.assert_close(folded(images), logits, rtol=1e-4, atol=1e-4)


def test_a_ratio_is_the_median_of_those_within_rounds():
    # The machine is three times as slow in the second round; the ratio of medians would be 3.
    times = measure.Times({"slow": [4.0, 9.0, 3.0, 4.0, 2.0], "fast": [2.0, 3.0, 1.0, 1.0, 1.0]})
    ratio = times.ratio("slow", "fast")  # 2, 3, 3, 4, 2
    assert (ratio.median, ratio.lower, ratio.upper) == (3.0, 2.0, 3.0)
    assert times.spread("slow").median == 4.0
    assert times.fastest(["slow", "fast"]) == "fast"
    assert str(ratio) == "3.00 (2.00 to 3.00)"


def test_rounds_interleave_and_rotate():
    calls = []
    ways = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = measure.interleave(ways, 3)
    assert "".join(calls) == "abcbcacab"
    assert {name: len(seconds) for name, seconds in times.seconds.items()} == {"a": 3, "b": 3, "c": 3}
    with pytest.raises(ValueError, match="rounds: expected at least 2, got 1"):
        measure.interleave(ways, 1)


def test_what_is_measured_is_the_time_of_the_call():
    import time

    times = measure.interleave({"short": lambda: time.sleep(0.01), "long": lambda: time.sleep(0.04)}, 3)
    assert 0.01 <= times.spread("short").median < times.spread("long").median
    assert 2.0 < times.ratio("long", "short").median < 4.5


def test_the_machine_is_described(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    described = measure.machine()
    assert described["torch"] == torch.__version__
    assert described["threads"] == torch.get_num_threads()
    assert described["environment"].items() >= {"MALLOC_MMAP_MAX_": "0", "OMP_WAIT_POLICY": "passive"}.items()
    assert described["cores"] == len(os.sched_getaffinity(0))
    json.dumps(described)


def test_the_job_at_a_small_size(bench, run, monkeypatch, tmp_path):
    monkeypatch.setattr(bench("job"), "in_child", directly)
    file = tmp_path / "job.json"
    size = ("--space", "mini-16", "--images", 16, "--resolution", 8, "--paths", 2, "--batch", 8, "--rounds", 2)
    run("job", *size, "--output", file)
    result = json.loads(file.read_text())
    assert set(result["job"]) == {"evaluate_paths, fp32", "evaluate_paths, bf16", "eager, fp32", "eager, pure"}
    assert all(cost["peak_bytes"] > cost["growth_bytes"] >= 0 for cost in result["job"].values())
    assert all(ratio["median"] > 0 for ratio in result["cost_ratio"]["ratios"].values())


def test_adapted_and_native_at_a_small_size(run, tmp_path):
    file = tmp_path / "adapted.json"
    size = ("--images", 2, "--resolution", 32, "--paths", 2, "--rounds", 2)
    assert "adapted over native: " in run("adapted_native", *size, "--output", file)
    result = json.loads(file.read_text())
    assert {name: len(seconds) for name, seconds in result["seconds"].items()} == {"native": 2, "adapted": 2}


def test_memory_growth_sees_an_allocation(bench):
    child = bench("child")
    # 64 MiB, freed after each call; in a process of its own, for in this one earlier tests left memory and threads.
    cost = child.in_child(child.cost_of, partial(torch.ones, 16 << 20), 2)
    assert 60 << 20 <= cost.growth_bytes <= 80 << 20
    assert len(cost.seconds) == 2


def test_a_child_is_another_process_that_returns_its_result(bench):
    in_child = bench("child").in_child
    assert in_child(os.getppid) == os.getpid()
    with pytest.raises(ZeroDivisionError):
        in_child(divmod, 1, 0)


def test_the_growth_picture_at_a_small_size(bench, monkeypatch, tmp_path):
    growth = bench("growth")
    monkeypatch.setattr(growth, "in_child", directly)
    base = cases.Case("growth", "mini-16", paths=2, images=4, resolution=8)
    found = growth.points(base, {"images": (4,)}, 1)
    assert [entry["way"] for entry in found] == list(growth.WAYS)
    picture = tmp_path / "pictures" / "growth.png"
    growth.draw(found, base, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.write_bytes(b"an older one")
    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", fails)
        with pytest.raises(OSError, match="nothing was written"):
            growth.draw(found, base, picture)
    assert picture.read_bytes() == b"an older one"
    assert list(picture.parent.iterdir()) == [picture]


def test_agreement_on_the_best_five(bench):
    import numpy as np

    fidelity = bench("rank_fidelity")
    truth = np.arange(20.0)
    generator = np.random.default_rng(0)
    draws = fidelity.draw_tens(20, 50, generator)
    assert all(len(set(draw)) == 10 for draw in draws.tolist())
    assert fidelity.kept_of_best(truth, truth + 100, draws).tolist() == [1.0] * 50
    assert fidelity.kept_of_best(truth, -truth, draws).tolist() == [0.0] * 50
    one_wrong = truth.copy()
    one_wrong[[4, 5]] = one_wrong[[5, 4]]
    assert fidelity.kept_of_best(truth, one_wrong, np.arange(10)[None]).tolist() == [0.8]
    found = fidelity.fidelity(truth, one_wrong, draws, generator, resamples=50)
    assert found["max_error"] == 1.0
    assert found["mean_error"] == pytest.approx(0.1)
    assert found["tau"] == pytest.approx(1 - 2 / 190)  # one of 190 pairs is the other way round
    assert found["tau_interval"][0] <= found["tau"] <= found["tau_interval"][1]
    assert found["kept_interval"][0] <= found["kept"] <= found["kept_interval"][1]


def test_rank_fidelity_of_a_tiny_run(run, tmp_path):
    from greedynas.config import TrainConfig
    from greedynas.training import train

    threads = torch.get_num_threads()
    train(TrainConfig(run=tmp_path / "run", iterations=4, warmup_iterations=2, pool_size=10, stop_threshold=None))
    torch.set_num_threads(threads)
    file = tmp_path / "rank.json"
    size = ("--paths", 12, "--images", 40, "--draws", 20)
    run("rank_fidelity", "--run", tmp_path / "run", *size, "--output", file)
    results = json.loads(file.read_text())["results"]
    assert set(results) == {
        "evaluate_paths, fp32", "evaluate_paths, bf16", "eager, fp32", "eager, autocast", "eager, pure"
    }  # fmt: skip
    assert results["evaluate_paths, fp32"]["max_error"] < 1e-4
    assert results["evaluate_paths, fp32"]["max_error"] < results["eager, pure"]["max_error"] < 0.5


def test_true_losses_that_the_modules_do_not_confirm_are_refused(bench, monkeypatch):
    fidelity = bench("rank_fidelity")
    space = get_space("mini-16")
    batch = inputs.make_paths("uniform", 2, space), inputs.make_images(8, 1, 8), inputs.make_targets(8, 10)
    supernet = subjects.make_supernet(space)
    losses = fidelity.true_losses(supernet, *batch, 2)
    assert losses.dtype == "float64"
    assert all(parameter.dtype == torch.float32 for parameter in supernet.parameters())

    def wrong(*arguments, fused=True):
        found = ours.evaluate(*arguments, fused=fused)
        found.losses[1] += 1e-6 * fused
        return found

    monkeypatch.setattr(fidelity, "evaluate", wrong)
    with pytest.raises(ValueError, match="differ by 1e-06"):
        fidelity.true_losses(supernet, *batch, 2)


def test_the_last_whole_generation_is_the_population(bench):
    make_paths = bench("make_paths")
    records = [{"generation": g, "path": [g, n]} for g, size in ((0, 2), (1, 2), (2, 1)) for n in range(size)]
    assert make_paths.last_population(records, 2) == records[2:4]
    with pytest.raises(ValueError, match="expected a generation with 3 new paths"):
        make_paths.last_population(records, 3)


def test_files_of_paths_come_from_a_training_and_a_search(bench, tmp_path):
    from greedynas.config import SearchConfig, TrainConfig
    from greedynas_ext.strict_json import read_json

    threads = torch.get_num_threads()
    training = TrainConfig(run=tmp_path / "run", iterations=6, warmup_iterations=2, pool_size=8, stop_threshold=None)
    searching = SearchConfig(run=tmp_path / "run", population=4, generations=2, validation_images=20)
    bench("make_paths").make(training, searching, tmp_path)
    torch.set_num_threads(threads)
    space = get_space("mini-16")
    pool = read_json(tmp_path / "run/pool.json")["entries"]
    assert read_paths(tmp_path / "mini-16-pool.json", space).tolist() == [entry["path"] for entry in pool]
    assert len(read_paths(tmp_path / "mini-16-population.json", space)) == 4


def test_what_binds_a_stage(bench):
    binding = bench("stages").binding
    # Multiplications come one after the other, whatever multiplies them; memory is read at the same time.
    floors = [["bf16 tiles", 2.0], ["fp16 FMA", 3.0], ["memory", 4.0]]
    assert binding({"seconds": 20.0, "floors": floors}) == ("fp16 FMA", 0.25)
    assert binding({"seconds": 8.0, "floors": [["fp32 FMA", 2.0], ["fp32 FMA", 1.0], ["memory", 4.0]]}) == (
        "memory",
        0.5,
    )


def test_the_table_and_the_file_of_stages(bench, run, monkeypatch, tmp_path):
    stages = {name: {"seconds": 2e-3, "floors": [["fp32 FMA", 1e-3]]} for name in ("expand_depthwise", "project")}
    block = {"kernels": "avx2", "images": 16, "side": 56, "in": 32, "hidden": 192, "out": 40, "kernel": 3, "stride": 2}
    lines = [{"fp32 FMA": 240.0, "memory": 17.5}, {**block, "stages": stages}]
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{json.dumps(line)}'\n" for line in lines))
    program.chmod(0o755)
    monkeypatch.setattr(bench("stages"), "compile_program", lambda folder: str(program))
    ceilings, header, row, *_ = run("stages", "--threads", 3, 1, "--output", tmp_path / "stages.json").splitlines()
    assert ceilings == "threads 3: 240 GMAC/s fp32 FMA, 17.5 GB/s memory"
    assert header.split() == ["kernels", "block", "expand_depthwise", "project"]
    assert " ".join(row.split()) == "avx2 16 of 56x56 32->192->40 k3 s2" + " 2.00 ms 50% fp32 FMA" * 2
    written = json.loads((tmp_path / "stages.json").read_text())
    assert [result["threads"] for result in written["results"]] == [3, 1]
    measured = written["results"][1]["blocks"][0]["stages"]["project"]
    assert (measured["binding"], measured["share"]) == ("fp32 FMA", 0.5)


@pytest.mark.slow
def test_the_stages_of_a_block_are_measured(tmp_path):
    file = tmp_path / "stages.json"
    command = [sys.executable, BENCH / "stages.py", "--threads", "1", "2", "--output", file]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    results = json.loads(file.read_text())["results"]
    assert [result["threads"] for result in results] == [1, 2]
    for result in results:
        ceilings = result["ceilings"]
        assert (
            {"fp32 FMA", "memory"}
            <= ceilings.keys()
            <= {"fp32 FMA", "memory", "fp16 FMA", "bf16 tiles", "bf16 products"}
        )
        assert all(rate > 0 for rate in ceilings.values())
        kernels = Counter(block["kernels"] for block in result["blocks"])
        assert kernels.keys() <= {"portable", "avx2", "avx512", "avx512_bf16", "amx"}
        assert set(kernels.values()) == {7}
        for block in result["blocks"]:
            assert list(block["stages"]) == ["expand_depthwise", "project", "finish"]
            for stage in block["stages"].values():
                assert {name for name, _ in stage["floors"]} <= ceilings.keys()
                # May be above 1: maps that stay in the cache come faster than memory gives them.
                assert stage["share"] > 0
    lines = done.stdout.splitlines()
    assert len(lines) == sum(2 + len(result["blocks"]) for result in results)
    assert lines[0].startswith("threads 1: ")
