import contextlib
import functools
import re
import shutil
from concurrent.futures import Future

import pytest
import torch
from tiny import contents

import greedynas.demo
from greedynas.config import SearchConfig
from greedynas.demo import DemoConfig, demo
from greedynas.runs import RunFolder
from greedynas_ext.strict_json import read_json, write_json

TINY = {
    "iterations": 5,
    "warmup_iterations": 2,
    "pool_size": 6,
    "max_macs": 1.0,
    "population": 4,
    "generations": 2,
    "epochs": 1,
    "retrainings": 1,
    "threads": 1,
}
STAGES = [
    "greedy",
    "uniform",
    *(f"greedy/search/{name}" for name in ("nsga2", "random")),
    "uniform/search/nsga2",
    *(f"greedy/retrain/{name}-0" for name in ("nsga2", "random")),
    "uniform/retrain/nsga2-0",
]


class Inline(contextlib.AbstractContextManager):
    """An executor that runs what it is given at once, here."""

    def __init__(self, processes, context, initializer):
        assert processes >= 1
        assert context.get_start_method() == "spawn"

    def submit(self, stage, config, **options):
        future = Future()
        future.set_result(stage(config, **options))
        return future

    def __exit__(self, *error):
        return None


@pytest.fixture(scope="module", autouse=True)
def small():
    """Stages that take fewer images than their defaults say."""
    with pytest.MonkeyPatch.context() as patch:
        for name, options in (
            ("TrainConfig", {"filter_images": 20, "batch_size": 16}),
            ("SearchConfig", {"calibration_images": 50, "validation_images": 60}),
            ("RetrainConfig", {"batch_size": 256}),
        ):
            patch.setattr(greedynas.demo, name, functools.partial(getattr(greedynas.demo, name), **options))
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    threads = torch.get_num_threads()
    config = DemoConfig(run=tmp_path_factory.mktemp("demo") / "run", **TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedynas.demo, "ProcessPoolExecutor", Inline)
        report = demo(config)
    yield config, report
    torch.set_num_threads(threads)


def test_every_stage_is_finished(done):
    config, report = done
    assert report == config.run / "report.md"
    assert all((config.run / stage / "summary.json").exists() for stage in STAGES)
    assert all((config.run / run / "report.md").exists() for run in ("greedy", "uniform"))


def test_the_report_holds_the_figures(done):
    config, report = done
    text = report.read_text()
    greedy, uniform = (read_json(config.run / run / "summary.json") for run in ("greedy", "uniform"))
    for run, search, name in (("greedy", "nsga2", 0), ("greedy", "random", 1), ("uniform", "nsga2", 2)):
        chosen = read_json(config.run / run / "search" / search / "summary.json")["chosen"]
        accuracy = read_json(config.run / run / "retrain" / f"{search}-0" / "summary.json")["test_accuracy"]
        row = [line for line in text.splitlines() if line.startswith(("| greedy supernet", "| uniform supernet"))][name]
        assert f"| {chosen['loss']:.4f} | {chosen['macs']:.2f} | {accuracy:.2%} (" in row
    assert f"{greedy['images_trained']:,} | {greedy['images_evaluated']:,}" in text
    assert f"{uniform['images_trained']:,} | 0 |" in text
    assert f"{greedy['cost_ratio']['measured']:.2f}, the cost ratio measured" in text
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (config.run / link).exists(), link


def test_uniform_costs_what_greedy_did(done):
    config, _ = done
    greedy, uniform = (read_json(config.run / run / "summary.json") for run in ("greedy", "uniform"))
    corrected = greedy["images_trained"] + greedy["images_evaluated"] / greedy["cost_ratio"]["measured"]
    per_round = 5 * 16
    assert uniform["images_evaluated"] == 0
    assert abs(uniform["images_trained"] - corrected) <= per_round / 2
    assert uniform["images_trained"] > greedy["images_trained"]


def test_arms_compare_like_with_like(done):
    config, _ = done
    summaries = [read_json(config.run / stage / "summary.json") for stage in STAGES if "/search/" in stage]
    assert {summary["max_macs"] for summary in summaries} == {1.0}
    assert {summary["paths_evaluated"] for summary in summaries} == {8}
    for run, search in (("greedy", "nsga2"), ("greedy", "random"), ("uniform", "nsga2")):
        chosen = read_json(config.run / run / "search" / search / "summary.json")["chosen"]["path"]
        assert read_json(config.run / run / "retrain" / f"{search}-0" / "summary.json")["path"] == chosen
    nsga2 = read_json(config.run / "greedy" / "search" / "nsga2" / "summary.json")
    assert nsga2["first_population_from_pool"] > 0


def test_a_second_demo_only_writes_the_report(done, monkeypatch):
    config, report = done

    def forbidden(*arguments, **options):
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(greedynas.demo, "ProcessPoolExecutor", forbidden)
    monkeypatch.setattr("greedynas.training.SupernetTrainer.run_iteration", forbidden)
    reported = []
    monkeypatch.setattr(greedynas.demo, "write_report", reported.append)
    before = contents(config.run)
    report.unlink()
    assert demo(config) == report
    after = contents(config.run)
    assert {name: data for name, (_, data) in after.items()} == {name: data for name, (_, data) in before.items()}
    changed = {name for name in before if before[name][0] != after[name][0]}
    assert changed == {"report.md", "comparison.png"}
    assert reported == [config.run / "greedy", config.run / "uniform"]


def test_an_interrupted_demo_goes_on_where_it_was(done, monkeypatch, tmp_path):
    config, _ = done
    shutil.copytree(config.run, tmp_path / "run")
    monkeypatch.setattr(greedynas.demo, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(greedynas.demo, "write_report", lambda root: None)
    lost = tmp_path / "run" / "uniform" / "retrain" / "nsga2-0"
    expected = (lost / "network.safetensors").read_bytes()
    shutil.rmtree(lost)
    demo(DemoConfig(run=tmp_path / "run", **TINY))
    assert (lost / "network.safetensors").read_bytes() == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 9}, r"^iterations: expected 5, with which .*greedy was started, got 9"),
        ({"population": 5}, r"^population: expected 4, with which .*nsga2 was started, got 5"),
        ({"epochs": 2}, r"^epochs: expected 1, with which .*nsga2-0 was started, got 2"),
        ({"iterations": 2}, r"^warmup_iterations: expected less than iterations=2, .* got 2"),
        ({"retrainings": 0}, r"^retrainings: expected at least 1"),
        ({"threads": 0}, r"^threads: expected at least 1"),
    ],
)
def test_other_options_are_not_mixed_in(options, message, done):
    config, _ = done
    before = contents(config.run)
    with pytest.raises(ValueError, match=message):
        demo(DemoConfig(run=config.run, **(TINY | options)))
    assert contents(config.run) == before


# Side by side


def note(config, resume):
    """A stage for the tests of processes, which needs no network."""
    if config.seed == 0:
        raise ValueError("seed: expected another")
    write_json(config.run / f"{config.seed}.json", {"resume": resume, "threads": torch.get_num_threads()})


def test_jobs_run_in_other_processes_until_one_fails(tmp_path, capsys):
    jobs = [(RunFolder(tmp_path / "none"), SearchConfig(tmp_path, seed=seed)) for seed in (1, 2, 0, *range(10, 30))]
    with pytest.raises(ValueError, match=r"^seed: expected another"):
        greedynas.demo._in_parallel("search", note, jobs, threads=10_000)
    assert read_json(tmp_path / "1.json")["resume"] is True
    assert (tmp_path / "2.json").exists()
    assert not (tmp_path / "29.json").exists()  # what was still waiting is not run
    assert "search 1/23" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_in_processes_ends_alike(done, tmp_path):
    config, _ = done
    report = demo(DemoConfig(run=tmp_path / "run", **TINY))
    assert report.exists()
    assert (tmp_path / "run" / "greedy" / "supernet.safetensors").read_bytes() == (
        config.run / "greedy" / "supernet.safetensors"
    ).read_bytes()
    for stage in STAGES:
        if stage.startswith("greedy/"):
            first, second = (read_json(root / stage / "summary.json") for root in (config.run, tmp_path / "run"))
            assert {k: v for k, v in first.items() if k != "seconds"} == {
                k: v for k, v in second.items() if k != "seconds"
            }
