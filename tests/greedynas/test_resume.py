import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import contents, retrain_config, search_config, train_config

from greedynas.metrics_log import MetricsLog
from greedynas.runs import RunFolder
from greedynas.search import search
from greedynas.storage import load_tensors, save_tensors
from greedynas.training import train
from greedynas_ext.strict_json import read_json

pytestmark = pytest.mark.usefixtures("tiny_space")

# Measured times, which no two runs share, and what is worked out from them.
TIMES = {"seconds", "seconds_training", "seconds_filtering", "cost_ratio", "measured"}
TRAIN = {"iterations": 7, "checkpoint_interval": 2, "max_macs": 0.025, "stop_threshold": None}
OPTIONS = {"train": TRAIN, "search": {}, "retrain": {"checkpoint_interval": 1, "ema_decay": 0.5, "batch_size": 360}}
FOLDERS = {"train": ".", "search": "search/nsga2", "retrain": "retrain/nsga2"}


class CrashServer:
    """`crash_server.py` in a process."""

    def __init__(self):
        here = Path(__file__).parent
        path = os.pathsep.join([str(here), *filter(None, sys.path)])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        self.process = subprocess.Popen(
            [sys.executable, here / "crash_server.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        assert json.loads(self.process.stdout.readline()) == {"ready": True}

    def run(self, stage, root, *, resume, options=None, **crash):
        job = {"stage": stage, "run": str(root), "options": options or OPTIONS[stage], "resume": resume, **crash}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the server ended with status {self.process.wait(60)} at {job}"
        return json.loads(answer)

    def close(self):
        self.process.stdin.close()
        self.process.wait(60)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def server():
    server = CrashServer()
    yield server
    server.close()


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def outcome(folder):
    """All files of a stage, but for measured times; a checkpoint is compared by tensors and state."""
    result = {}
    for path in sorted(folder.glob("*")):
        if path.name == "checkpoint.safetensors":
            tensors, state = load_tensors(path)
            result[path.name] = ({name: tensor.tolist() for name, tensor in tensors.items()}, without_times(state))
        elif path.suffix == ".safetensors" or path.name == "pool.json":
            result[path.name] = path.read_bytes()
        elif path.suffix == ".json":
            result[path.name] = without_times(read_json(path))
        elif path.suffix == ".jsonl":
            result[path.name] = without_times(MetricsLog(path).read())
        elif path.name != "config.yaml":  # which has the folder in it
            assert path.is_dir(), path
    return result


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory):
    """For each stage the folder in which it starts, what it ends with, and how many file operations it makes."""
    root = tmp_path_factory.mktemp("undisturbed") / "run"
    result = {}
    for stage in OPTIONS:
        start = tmp_path_factory.mktemp("start") / "run"
        if root.exists():
            shutil.copytree(root, start)
        answer = server.run(stage, root, resume=False)
        assert answer["outcome"] == "done", answer["outcome"]
        result[stage] = (start, outcome(root / FOLDERS[stage]), answer["operations"], answer["seconds"])
    return result


def begin(undisturbed, stage, tmp_path):
    start, expected, operations, seconds = undisturbed[stage]
    root = tmp_path / "run"
    if start.exists():
        shutil.copytree(start, root)
    return root, expected, operations, seconds


def finish(server, stage, root, expected):
    """Resumes until done, and compares."""
    answer = server.run(stage, root, resume=True)
    assert answer["outcome"] == "done", answer["outcome"]
    assert outcome(root / FOLDERS[stage]) == expected
    assert not list(root.rglob(".greedynas-*"))


def points(operations):
    """Every file operation to be killed at, each in one of the ways, in a fixed random order."""
    every = list(zip(range(1, operations + 1), itertools.cycle(("before", "torn", "after", "torn")), strict=False))
    random.Random(0).shuffle(every)
    return every


def kill_at(server, undisturbed, stage, tmp_path, chosen):
    for number, (operation, how) in enumerate(chosen):
        root, expected, *_ = begin(undisturbed, stage, tmp_path / str(number))
        answer = server.run(stage, root, resume=False, operation=operation, how=how)
        assert answer["outcome"] == "killed", answer["outcome"]
        finish(server, stage, root, expected)
        shutil.rmtree(tmp_path / str(number))


@pytest.mark.parametrize(("stage", "count"), [("train", 6), ("search", 3), ("retrain", 3)])
def test_killed_at_a_file_operation(stage, count, server, undisturbed, tmp_path):
    chosen = points(undisturbed[stage][2])[:count]
    kill_at(server, undisturbed, stage, tmp_path, chosen)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train", "search", "retrain"])
def test_killed_at_every_file_operation(stage, server, undisturbed, tmp_path):
    kill_at(server, undisturbed, stage, tmp_path, points(undisturbed[stage][2]))


def kill_again_and_again(server, undisturbed, stage, tmp_path, seed):
    """Kills one run over and over, at a random moment or file operation, until it gets through."""
    root, expected, operations, seconds = begin(undisturbed, stage, tmp_path)
    generator = random.Random(seed)
    kills = 0
    for life in range(60):
        crash = (
            {"seconds": generator.uniform(0.0, 1.2 * seconds)}
            if generator.random() < 0.5
            else {"operation": generator.randint(1, operations), "how": generator.choice(("before", "torn", "after"))}
        )
        resume = life > 0 and RunFolder(root / FOLDERS[stage]).config.exists()
        answer = server.run(stage, root, resume=resume, **crash)
        assert answer["outcome"] in ("done", "killed"), answer["outcome"]
        kills += answer["outcome"] == "killed"
        if answer["outcome"] == "done" and kills >= 3:
            break
        if answer["outcome"] == "done":  # too soon: once more from the start
            shutil.rmtree(root)
            begin(undisturbed, stage, tmp_path)
    finish(server, stage, root, expected)
    assert kills >= 3


@pytest.mark.parametrize("stage", ["train", "search", "retrain"])
def test_killed_again_and_again(stage, server, undisturbed, tmp_path):
    kill_again_and_again(server, undisturbed, stage, tmp_path, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train", "search", "retrain"])
@pytest.mark.parametrize("seed", range(2, 8))
def test_killed_again_and_again_with_other_luck(stage, seed, server, undisturbed, tmp_path):
    kill_again_and_again(server, undisturbed, stage, tmp_path, seed)


@pytest.mark.parametrize("sampler", ["uniform", "fair"])
def test_other_samplers_resume_too(sampler, server, tmp_path):
    options = TRAIN | {"sampler": sampler, "iterations": 5}
    assert server.run("train", tmp_path / "whole", resume=False, options=options)["outcome"] == "done"
    answer = server.run("train", tmp_path / "run", resume=False, options=options, operation=24, how="before")
    assert answer["outcome"] == "killed"
    assert server.run("train", tmp_path / "run", resume=True, options=options)["outcome"] == "done"
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_stopping_early_resumes_too(server, tmp_path):
    options = TRAIN | {"iterations": 30, "stop_threshold": 0.6, "exploit_start": 0.8, "max_macs": None}
    assert server.run("train", tmp_path / "whole", resume=False, options=options)["outcome"] == "done"
    summary = read_json(tmp_path / "whole" / "summary.json")
    assert summary["stopped_early"]
    assert 9 <= summary["iterations"] < 30
    last = server.run("train", tmp_path / "count", resume=False, options=options)["operations"]
    for number, at in enumerate((40, last - 12, last - 2)):  # midway, after the last checkpoint, before the summary
        root = tmp_path / str(number)
        answer = server.run("train", root, resume=False, options=options, operation=at, how="before")
        assert answer["outcome"] == "killed"
        assert server.run("train", root, resume=True, options=options)["outcome"] == "done"
        assert outcome(root) == outcome(tmp_path / "whole")


# A full disk


def test_a_file_size_limit_half_way_leaves_the_checkpoint_before(server, undisturbed, tmp_path):
    """The kernel refuses the write, in a real process; freed, the run goes on to the same end."""
    root, expected, *_ = begin(undisturbed, "train", tmp_path)
    answer = server.run("train", root, resume=False, operation=40, how="before")
    assert answer["outcome"] == "killed"
    before = (root / "checkpoint.safetensors").read_bytes()
    answer = server.run("train", root, resume=True, file_size=len(before) // 2)
    assert re.search(r"File too large \(nothing was written\): .*checkpoint\.safetensors", answer["outcome"])
    assert (root / "checkpoint.safetensors").read_bytes() == before
    assert not list(root.glob(".greedynas-*"))
    finish(server, "train", root, expected)


# Damaged and missing files


@pytest.fixture
def half_done(tmp_path, monkeypatch):
    """A training that was interrupted after its second checkpoint."""
    config = train_config(tmp_path / "run", **TRAIN)
    with monkeypatch.context() as patch:
        from greedynas.training import SupernetTrainer

        original = SupernetTrainer.run_iteration

        def run_iteration(self):
            if self.iteration == 5:
                raise KeyboardInterrupt
            return original(self)

        patch.setattr(SupernetTrainer, "run_iteration", run_iteration)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    return config


def test_damaged_checkpoints_are_named_and_left(half_done):
    path = half_done.run / "checkpoint.safetensors"
    data = path.read_bytes()
    for damaged in (b"", data[: len(data) // 2], data[:-1], data[:500] + b"x" + data[501:], b"PK\3\4" + data):
        path.write_bytes(damaged)
        before = contents(half_done.run)
        with pytest.raises(ValueError, match=re.escape(str(path))):
            train(half_done, resume=True)
        assert contents(half_done.run) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("pool"), r"expected the state of a training, got KeyError\('pool'\)"),
        (lambda s: s.update(counts={"images": 1}), r"expected the state of a training, got TypeError"),
        (lambda s: s["pool"].update(capacity=-1), r"expected the state of a training, .*'state: .*no valid cand"),
        (lambda s: s.update(records=3), None),
        (lambda s: s.update(records=99), r"metrics\.jsonl: expected at least 99 records to keep, found 5"),
    ],
)
def test_states_that_do_not_fit(change, message, half_done):
    path = half_done.run / "checkpoint.safetensors"
    tensors, state = load_tensors(path)
    change(state)
    save_tensors(path, tensors, state)
    if message is None:
        train(half_done, resume=True)
        return
    with pytest.raises(ValueError, match=message):
        train(half_done, resume=True)


def test_a_damaged_log_is_named(half_done):
    path = half_done.run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"{broken\n" + b"".join(lines[2:]))
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2"):
        train(half_done, resume=True)


def test_a_missing_log_is_named(half_done):
    (half_done.run / "metrics.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        train(half_done, resume=True)


def test_without_resume_a_half_done_run_is_left_alone(half_done):
    before = contents(half_done.run)
    with pytest.raises(FileExistsError, match="holds a run already; --resume continues it"):
        train(half_done)
    assert contents(half_done.run) == before


def test_nothing_follows_from_an_unfinished_training(half_done):
    with pytest.raises(FileNotFoundError, match="is not finished; `greedynas train --resume` continues it"):
        search(search_config(half_done.run))
    from greedynas.retraining import retrain

    with pytest.raises(FileNotFoundError, match="is not finished"):
        retrain(retrain_config(half_done.run))


def test_resuming_a_finished_training_changes_nothing(run_copy):
    before = contents(run_copy)
    train(train_config(run_copy), resume=True)
    assert contents(run_copy) == before


def test_resuming_what_never_began_begins_it(tmp_path):
    folder = train(train_config(tmp_path / "run", iterations=3), resume=True)
    assert folder.finished
