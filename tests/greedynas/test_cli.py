import contextlib
import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from tiny import contents, retrain_config, search_config, train_config

import greedynas.cli
from greedynas.cli import main, parse
from greedynas.config import (
    EvaluateConfig,
    RetrainConfig,
    SearchConfig,
    TrainConfig,
    load_config,
    to_mapping,
)
from greedynas.data.small_images import FASHION_MNIST_FILES, FASHION_MNIST_FOLDERS
from greedynas.demo import DemoConfig
from greedynas.metrics_log import MetricsLog
from greedynas.runs import load_run
from greedynas_ext import evaluate_paths
from greedynas_ext.strict_json import read_json

pytestmark = pytest.mark.usefixtures("tiny_space")
KINDS = {
    "train": TrainConfig,
    "search": SearchConfig,
    "retrain": RetrainConfig,
    "evaluate": EvaluateConfig,
    "demo": DemoConfig,
}


@pytest.fixture
def without_reports(monkeypatch):
    """Reports take seconds, and have tests of their own."""
    monkeypatch.setattr(greedynas.cli, "write_report", lambda root: Path(root) / "report.md")


def options_of(config):
    """A config as a command line."""
    words = []
    for name, value in to_mapping(config).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is not None:
            words += [flag, str(value)]
    return words


def fails(capsys, *words):
    """Runs a command that must end with status 2; returns the line that it wrote on stderr."""
    with pytest.raises(SystemExit) as caught:
        main(list(map(str, words)))
    captured = capsys.readouterr()
    assert caught.value.code == 2
    assert "Traceback" not in captured.err
    (line,) = captured.err.splitlines()
    return line


# Help


def test_help_lists_commands_and_presets(capsys):
    for words, code in ((["--help"], 0), (["-h"], 0), ([], 2)):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == code
        out = capsys.readouterr().out
        assert all(re.search(rf"^  {name} +\w", out, re.M) for name in (*KINDS, "report"))
        assert "train: fashion-mnist" in out
        assert "train: imagenet" in out
        assert "--resume" in out


@pytest.mark.parametrize("command", KINDS)
def test_every_option_has_help_and_a_default(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    lines = [line.strip(" │╭╮╰╯─") for line in capsys.readouterr().out.splitlines()]
    text = " ".join(lines)
    fields = dataclasses.fields(KINDS[command])
    parts = re.split(r" (?=--(?!no-)[a-z-]+[ ,])", text[text.index(" --run ") :])
    described = {re.match(r"--([a-z-]+)", part.strip())[1]: part.strip() for part in parts if part.strip()}
    assert described.keys() >= {field.name.replace("_", "-") for field in fields}
    for field in fields:
        part = described[field.name.replace("_", "-")]
        required = field.default is dataclasses.MISSING
        assert re.search(r"\(required\)" if required else r"\(default: ", part), part
        help_text = re.sub(r"^--\S+(, --no-\S+)?( \{[^}]*\}\S*| [A-Z|{}]+\S*)?", "", part)
        assert len(re.sub(r"\((required|default: .*?)\)", "", help_text).split()) >= 2, part
    if command in ("train", "search", "retrain"):
        assert "--config FILE.yaml" in text
        assert "--resume" in text


# Errors


def test_unknown_command(capsys):
    assert fails(capsys, "trian") == (
        "greedynas: expected a command among train, search, retrain, evaluate, report, demo, got 'trian'"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--space mbv9", "greedynas train: space: expected one of mbv2-7, "),
        ("--dataset cats", "greedynas train: dataset: expected one of digits, "),
        ("--dataset imagenet", "greedynas train: data_root: imagenet needs the folder of its images"),
        ("--dataset imagenet --data-root /nowhere", "greedynas train: data_root: /nowhere: no such folder"),
        ("--config nothing.yaml", "greedynas train: config: no file nothing.yaml"),
        ("--config", "greedynas train: --config: expected a value, got none"),
        ("--kept-paths 7", "greedynas train: kept_paths: expected 1 <= kept_paths <= sampled_paths=6, got 7"),
        ("--learning-rate nan", "greedynas train: learning_rate: expected a finite number"),
        ("--threads 0", "greedynas train: threads: expected at least 1"),
        ("--learning-rate 1e30 --warmup-iterations 0", "greedynas train: training: the loss became "),
    ],
)
def test_errors_of_training_are_one_line(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("greedynas.training.Reporter", lambda *a, **o: contextlib.nullcontext(Silent()))
    words = ["train", *options_of(train_config(tmp_path / "run"))]
    assert fails(capsys, *words, *shlex.split(options)).startswith(message)


class Silent:
    def advance(self, figures):
        pass


@pytest.mark.parametrize("words", [["--run", "r", "--nope", "3"], ["--run", "r", "--sampler", "best"], []])
def test_errors_that_the_parser_finds(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", *words])
    assert caught.value.code == 2
    err = capsys.readouterr().err
    assert any(hint in err for hint in ("--nope", "best", "--run"))
    assert not Path("r").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1.0", r"unknown key 'learning_rat'; expected some of run, space"),
        ("iterations: many", r"iterations: expected int, got str 'many'"),
        ("- 1", r"expected a mapping of options, got list"),
        ("a: [", r"expected YAML, while parsing"),
        ("run: 3", r"run: expected Path, got int 3"),
    ],
)
def test_wrong_config_files(text, message, capsys, tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text(text)
    line = fails(capsys, "train", "--run", tmp_path / "run", "--config", file)
    assert re.match(rf"greedynas train: {re.escape(str(file))}: {message}", line)


def test_a_config_file_without_a_run(capsys, tmp_path):
    (tmp_path / "options.yaml").write_text("seed: 1")
    line = fails(capsys, "train", f"--config={tmp_path / 'options.yaml'}")
    assert line == "greedynas train: run: expected --run FOLDER, got none"


@pytest.mark.parametrize("command", ["search", "retrain", "evaluate"])
def test_no_run(command, capsys, tmp_path):
    assert fails(capsys, command, "--run", tmp_path / "none").startswith(f"greedynas {command}: run: no run in ")


def test_interrupted(capsys, monkeypatch, tmp_path):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(greedynas.cli, "train", interrupted)
    with pytest.raises(SystemExit) as caught:
        main(["train", "--run", str(tmp_path / "run")])
    assert caught.value.code == 130
    assert capsys.readouterr().err == "greedynas train: interrupted; --resume continues it\n"


# Configs


def test_presets_load():
    config, resume = parse(TrainConfig, "train", ["--config", "fashion-mnist", "--run", "r"], lambda r, o: r)
    assert (config.run, config.space, config.dataset, resume) == (Path("r"), "mini-28", "fashion-mnist", False)
    config, _ = parse(TrainConfig, "train", ["--run=r", "--config=imagenet", "--seed", "3"], lambda r, o: r)
    assert (config.space, config.pool_size, config.filter_images, config.seed) == ("mbv2-7", 1000, 1000, 3)
    assert config.learning_rate == 0.12
    config, _ = parse(RetrainConfig, "retrain", ["--config", "imagenet", "--run", "r"], lambda r, o: r)
    assert (config.optimizer, config.epochs, config.ema_decay) == ("rmsprop", 450, 0.9999)
    config, _ = parse(RetrainConfig, "retrain", ["--config", "fashion-mnist", "--run", "r"], lambda r, o: r)
    assert config.batch_size == 128


def test_the_command_line_takes_precedence_over_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(f"run: {tmp_path / 'file'}\nseed: 5\nlearning_rate: 1e-3\nvalidation: 0.3\naugment: false\n")
    config, _ = parse(TrainConfig, "train", ["--config", str(file), "--seed", "6"], lambda r, o: r)
    assert config == TrainConfig(run=tmp_path / "file", seed=6, learning_rate=1e-3, validation=0.3, augment=False)
    words = ["--config", str(file), "--run", "x", "--validation", "100", "--augment", "--max-macs", "2"]
    config, _ = parse(TrainConfig, "train", words, lambda r, o: r)
    assert config == TrainConfig(run=Path("x"), seed=5, learning_rate=1e-3, validation=100, augment=True, max_macs=2.0)


@pytest.mark.parametrize(
    ("kind", "make"), [(TrainConfig, train_config), (SearchConfig, search_config), (RetrainConfig, retrain_config)]
)
def test_options_of_every_command_come_through(kind, make, tmp_path):
    config = make(tmp_path)
    command = {TrainConfig: "train", SearchConfig: "search", RetrainConfig: "retrain"}[kind]
    assert parse(kind, command, options_of(config), lambda r, o: r) == (config, False)


@pytest.mark.usefixtures("without_reports")
def test_a_run_repeats_from_its_saved_config(tmp_path, capsys):
    main(["train", *options_of(train_config(tmp_path / "a", seed=9, validation=200))])
    assert capsys.readouterr().out == f"trained: {tmp_path / 'a' / 'report.md'}\n"
    main(["train", "--config", str(tmp_path / "a" / "config.yaml"), "--run", str(tmp_path / "b")])
    for name in ("supernet.safetensors", "pool.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    configs = [load_config(TrainConfig, tmp_path / name / "config.yaml") for name in "ab"]
    assert configs[0] == dataclasses.replace(configs[1], run=tmp_path / "a")


# Resuming


def test_a_run_is_not_begun_twice(capsys, run_copy):
    before = contents(run_copy)
    line = fails(capsys, "train", *options_of(train_config(run_copy)))
    assert line == f"greedynas train: run: {run_copy} holds a run already; --resume continues it"
    assert contents(run_copy) == before


@pytest.mark.usefixtures("without_reports")
def test_resuming_needs_no_options_but_the_run(run_copy, capsys):
    for name in ("summary.json", "supernet.safetensors", "checkpoint.safetensors"):
        (run_copy / name).unlink()
    main(["train", "--run", str(run_copy), "--resume"])
    assert (run_copy / "summary.json").exists()
    assert load_config(TrainConfig, run_copy / "config.yaml").space == "tiny"


def test_resuming_with_another_option_names_it(capsys, run_copy, tmp_path):
    before = contents(run_copy)
    line = fails(capsys, "train", "--run", run_copy, "--resume", "--kept-paths", "3")
    assert line.startswith("greedynas train: kept_paths: expected 2, with which ")
    file = tmp_path / "other.yaml"
    file.write_text("momentum: 0.5")
    line = fails(capsys, "train", "--run", run_copy, "--resume", "--config", file)
    assert line.startswith("greedynas train: momentum: expected 0.9, with which ")
    line = fails(capsys, "search", "--run", run_copy, "--resume", "--population", "9")
    assert line.startswith("greedynas search: population: expected 6, with which ")
    line = fails(capsys, "retrain", "--run", run_copy, "--resume", "--epochs", "9")
    assert line.startswith("greedynas retrain: epochs: expected 3, with which ")
    assert contents(run_copy) == before


@pytest.mark.usefixtures("without_reports")
def test_named_searches_and_retrainings_resume(run_copy, tmp_path, capsys):
    words = options_of(search_config(run_copy, generations=2, name="mine"))
    main(["search", *words])
    file = tmp_path / "search.yaml"
    file.write_text("name: mine\n")
    summary = read_json(run_copy / "search" / "mine" / "summary.json")
    for given in (["--name", "mine"], ["--name=mine"], ["--config", str(file)]):
        (run_copy / "search" / "mine" / "summary.json").unlink()
        main(["search", "--run", str(run_copy), "--resume", *given])  # generations and all come from what is there
        assert read_json(run_copy / "search" / "mine" / "summary.json") == summary
    main(["search", *options_of(search_config(run_copy, method="random"))])
    (run_copy / "search" / "random" / "summary.json").unlink()
    main(["search", "--run", str(run_copy), "--resume", "--method", "random"])
    assert (run_copy / "search" / "random" / "summary.json").exists()
    main(["retrain", *options_of(retrain_config(run_copy, search="mine", epochs=1))])
    (run_copy / "retrain" / "mine" / "summary.json").unlink()
    capsys.readouterr()
    main(["retrain", "--run", str(run_copy), "--resume", "--search", "mine"])
    accuracy = read_json(run_copy / "retrain" / "mine" / "summary.json")["test_accuracy"]
    assert capsys.readouterr().out.splitlines() == [
        f"test accuracy: {accuracy:.2%} of 355 images",
        f"report: {run_copy / 'report.md'}",
    ]


@pytest.mark.usefixtures("without_reports")
def test_search_says_what_it_chose(run_copy, capsys):
    main(["search", *options_of(search_config(run_copy, name="new"))])
    chosen = read_json(run_copy / "search" / "new" / "summary.json")["chosen"]
    assert capsys.readouterr().out.splitlines()[0] == (
        f"chosen: {' '.join(chosen['names'])}  loss {chosen['loss']:.4f}  {chosen['macs']:.2f}M MACs"
    )


# Evaluate, report


def rows(out):
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]


def test_evaluate_prints_the_best_of_the_pool(run_copy, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    main(["evaluate", "--run", str(run_copy), "--top", "3", "--calibration-images", "50", "--threads", "1"])
    out = capsys.readouterr().out
    run = load_run(run_copy)
    paths = run.pool.paths[:3]
    expected = evaluate_paths(
        run.supernet,
        paths,
        run.task.data.validation.batches(1000),
        bn="recalibrated",
        calibration=run.task.data.train.calibration(50, seed=0),
    )
    assert rows(out) == [
        [" ".join(run.task.space.decode(path)), f"{loss:.4f}", f"{accuracy:.2%}", f"{macs:.2f}"]
        for path, loss, accuracy, macs in zip(
            paths, expected.losses.tolist(), expected.accuracy.tolist(), run.task.macs_of(paths), strict=True
        )
    ]
    assert out.splitlines()[-1].startswith("288 validation images, ")
    assert f"{expected.plan.shared_fraction:.1%} of the MACs saved" in out


@pytest.mark.parametrize("bn", ["batch", "running"])
def test_evaluate_takes_a_file_of_paths(bn, run_copy, capsys, tmp_path):
    (tmp_path / "paths.txt").write_text("e3k3 id e3k5 id\n\n  id   id e3k3 e3k3 \n")
    main(["evaluate", "--run", str(run_copy), "--paths", str(tmp_path / "paths.txt"), "--bn", bn])
    assert [row[0] for row in rows(capsys.readouterr().out)] == ["e3k3 id e3k5 id", "id id e3k3 e3k3"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"paths: expected a path in each line of .*paths\.txt, got an empty file"),
        (b"\n id id id id\nid id id\n", r"paths: .*paths\.txt: line 3: expected 4 \(one operation per layer\), got 3"),
        (b"id id id e9k9\n", r"paths: .*paths\.txt: line 1: layer 3: expected one of e3k3, e3k5, id .*got 'e9k9'"),
        (b"\xff\xfe", r"paths: .*paths\.txt: expected a text file"),
        (None, r".*No such file.*paths\.txt"),
    ],
)
def test_wrong_files_of_paths(data, message, run_copy, capsys, tmp_path):
    file = tmp_path / "paths.txt"
    if data is not None:
        file.write_bytes(data)
    assert re.match(f"greedynas evaluate: {message}", fails(capsys, "evaluate", "--run", run_copy, "--paths", file))


def test_evaluate_without_a_pool(run_copy, capsys):
    pool = read_json(run_copy / "pool.json")
    (run_copy / "pool.json").write_text(json.dumps({**pool, "entries": []}))
    line = fails(capsys, "evaluate", "--run", run_copy)
    assert line == "greedynas evaluate: paths: expected a file of paths, since the run's candidate pool is empty"
    assert fails(capsys, "evaluate", "--run", run_copy, "--top", "0").startswith("greedynas evaluate: top: expected at")


def test_report(run_copy, capsys):
    assert not (run_copy / "report.md").exists()
    main(["report", str(run_copy)])
    assert capsys.readouterr().out == f"{run_copy / 'report.md'}\n"
    assert (run_copy / "report.md").read_text().startswith("# ")
    assert fails(capsys, "report") == "usage: greedynas report RUN_FOLDER"
    assert fails(capsys, "report", "--run").startswith("usage")
    assert fails(capsys, "report", run_copy / "none").startswith("greedynas report: run: no run in ")


def test_demo_passes_its_options_on(monkeypatch, capsys, tmp_path):
    seen = []
    monkeypatch.setattr(greedynas.cli, "demo", lambda config: seen.append(config) or tmp_path / "report.md")
    main(["demo", "--run", str(tmp_path), "--iterations", "7"])
    assert seen == [DemoConfig(run=tmp_path, iterations=7)]
    assert capsys.readouterr().out == f"report: {tmp_path / 'report.md'}\n"


# Processes


def start(*words):
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "greedynas", *map(str, words)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.usefixtures("without_reports")
def test_a_killed_command_resumes_to_the_same_end(tmp_path):
    options = {"iterations": 12, "sampled_paths": 3, "kept_paths": 1, "pool_size": 5, "checkpoint_interval": 2}
    config = train_config(tmp_path / "killed", space="mini-16", **options)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    words = options_of(config)
    for rounds in (1, 5, 9):
        process = start("train", *words)
        while process.poll() is None and len(MetricsLog(metrics).read()) < rounds:
            time.sleep(0.005)
        process.kill()
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors
        words = ["--run", tmp_path / "killed", "--resume"]
    assert not (tmp_path / "killed" / "summary.json").exists()
    torch.set_num_threads(1)
    main(["train", "--run", str(tmp_path / "killed"), "--resume"])
    main(["train", *options_of(dataclasses.replace(config, run=tmp_path / "whole"))])
    for name in ("supernet.safetensors", "pool.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for first, second in zip(
        MetricsLog(metrics).read(), MetricsLog(tmp_path / "whole" / "metrics.jsonl").read(), strict=True
    ):
        assert {k: v for k, v in first.items() if "seconds" not in k} == {
            k: v for k, v in second.items() if "seconds" not in k
        }


@pytest.mark.slow
def test_the_commands_as_processes(tmp_path):
    root = tmp_path / "run"
    config = train_config(root, space="mini-16", iterations=5)
    for command, words, said in (
        ("train", options_of(config), rf"^trained: {root}/report\.md$"),
        ("search", options_of(search_config(root)), r"^chosen: "),
        ("retrain", options_of(retrain_config(root, epochs=1)), r"^test accuracy: "),
        ("evaluate", ["--run", root], r"of the MACs saved"),
        ("report", [root], r"report\.md$"),
    ):
        process = start(command, *words)
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert re.search(said, out, re.M)
    process = start("train", "--run", root)
    out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    assert err == f"greedynas train: run: {root} holds a run already; --resume continues it\n"


def fashion_mnist_folder():
    for folder in FASHION_MNIST_FOLDERS:
        if all((folder / name).exists() or (folder / f"{name}.gz").exists() for name in FASHION_MNIST_FILES):
            return folder
    return None


@pytest.mark.skipif(fashion_mnist_folder() is None, reason="Fashion-MNIST's files are not on this machine")
@pytest.mark.usefixtures("without_reports")
def test_a_few_steps_on_fashion_mnist(tmp_path):
    small = "--iterations 3 --warmup-iterations 1 --filter-images 40 --batch-size 16 --sampled-paths 4 --kept-paths 2"
    words = ["--run", str(tmp_path / "run"), "--pool-size", "6", "--stop-interval", "2", "--threads", "1"]
    main(["train", "--config", "fashion-mnist", *words, *small.split()])
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["space"] == "mini-28"
    assert "fashion-mnist: 50,000 training, 10,000 validation and 10,000 test images" in summary["data"]
    assert (summary["images_trained"], summary["images_evaluated"]) == (3 * 2 * 16, 2 * 4 * 40)
    records = MetricsLog(tmp_path / "run" / "metrics.jsonl").read()
    assert all(0 < record["training_loss"] < 10 for record in records)
    assert len(records[2]["filter_losses"]) == 4
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (saved["space"], saved["batch_size"], saved["exploit_end"]) == ("mini-28", 16, 0.8)
