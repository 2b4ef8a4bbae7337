"""The command `greedynas`: train, search, retrain, evaluate, report and demo."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from greedynas.config import (
    Config,
    EvaluateConfig,
    RetrainConfig,
    SearchConfig,
    TrainConfig,
    from_mapping,
    load_config,
    read_yaml,
    to_mapping,
)
from greedynas.demo import DemoConfig, demo
from greedynas.option_checks import check_evaluation, named_as_options, use_threads
from greedynas.report import write_report
from greedynas.retraining import retrain
from greedynas.runs import RunFolder, load_run
from greedynas.search import search
from greedynas.spaces import Space
from greedynas.training import train
from greedynas_ext import evaluate_paths
from greedynas_ext.strict_json import read_json

_PRESETS = Path(__file__).resolve().parent / "configs"
_USAGE = """usage: greedynas COMMAND [--config FILE.yaml] [--resume] [OPTIONS]

commands:
  train     train a supernet in a run folder
  search    search the best path of a trained supernet
  retrain   train the chosen path from scratch and test it
  evaluate  losses of paths of a trained supernet
  report    write the run folder's report.md anew
  demo      all of it on handwritten digits, greedy beside uniform

`greedynas COMMAND --help` lists a command's options. --config takes a YAML file of options, or the name of a preset
({presets}); options on the command line take precedence over it. --resume continues what was interrupted, with the
options that it was started with."""
_COMMON_OPTIONS = """

--config FILE.yaml: options from a file, or the name of a preset; those on the command line take precedence.
--resume: continue what was interrupted, with the options that it was started with."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; errors of the user's making end with a line on stderr and status 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands = {
        "train": _train,
        "search": _search,
        "retrain": _retrain,
        "evaluate": _evaluate,
        "report": _report,
        "demo": _demo,
    }
    if not words or words[0] in ("-h", "--help"):
        presets = ", ".join(sorted(f"{path.parent.name}: {path.stem}" for path in _PRESETS.glob("*/*.yaml")))
        print(_USAGE.format(presets=presets))
        raise SystemExit(0 if words else 2)
    if words[0] not in commands:
        print(f"greedynas: expected a command among {', '.join(commands)}, got {words[0]!r}", file=sys.stderr)
        raise SystemExit(2)
    try:
        commands[words[0]](words[1:])
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        print(f"greedynas {words[0]}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        hint = "; --resume continues it" if words[0] in ("train", "search", "retrain") else ""
        print(f"greedynas {words[0]}: interrupted{hint}", file=sys.stderr)
        raise SystemExit(130) from None


def parse(
    kind: type[Config],
    command: str,
    words: Sequence[str],
    folder_of: Callable[[RunFolder, Mapping[str, Any]], RunFolder] | None = None,
) -> tuple[Config, bool]:
    """A config from a YAML file, if --config names one, and the options behind it; and whether to resume.

    Args:
        kind: the class of the config.
        command: its name, for help texts.
        words: the command line behind it.
        folder_of: the stage's folder within a run's, given what is known of the options; None where --config and
            --resume mean nothing. What is resumed gives the defaults for options that are not set.

    Raises:
        FileNotFoundError, ValueError: a config file is missing or wrong.
        SystemExit: an option is wrong, or --help.
    """
    if folder_of is None:
        return _parse_options(kind, command, words, None, ""), False
    words, resume = _take_flag(words, "--resume")
    words, source = _take_value(words, "--config")
    values: dict[str, Any] = {}
    if source is not None:
        preset = _PRESETS / command / f"{source}.yaml"
        file = preset if preset.exists() else Path(source)
        values = read_yaml(file)
        from_mapping(kind, {"run": "", **values}, str(file))  # a file need not know where the run lies
    for option in ("run", "name", "method", "search"):
        value = _take_value(words, f"--{option}")[1]
        if value is not None and option in kind.__dataclass_fields__:
            values[option] = value
    if resume and "run" in values:
        saved = folder_of(RunFolder(Path(values["run"])), values).config
        if saved.exists():
            values = {**to_mapping(load_config(kind, saved)), **values}
    default: Config | None = None
    if values:
        if "run" not in values:
            raise ValueError("run: expected --run FOLDER, got none")
        default = from_mapping(kind, values, source or "options")
    return _parse_options(kind, command, words, default, _COMMON_OPTIONS), resume


def _parse_options(kind: type[Config], command: str, words: Sequence[str], default: Any, more: str) -> Config:
    config: Config = tyro.cli(
        kind, args=words, prog=f"greedynas {command}", default=default, description=f"{kind.__doc__}{more}"
    )
    return config


def _take_value(words: Sequence[str], option: str) -> tuple[list[str], str | None]:
    """`words` without `option` and its value, and the value."""
    for position, word in enumerate(words):
        if word == option:
            if position + 1 == len(words):
                raise ValueError(f"{option}: expected a value, got none")
            return [*words[:position], *words[position + 2 :]], words[position + 1]
        if word.startswith(option + "="):
            return [*words[:position], *words[position + 1 :]], word[len(option) + 1 :]
    return list(words), None


def _take_flag(words: Sequence[str], flag: str) -> tuple[list[str], bool]:
    return [word for word in words if word != flag], flag in words


def _train(words: list[str]) -> None:
    config, resume = parse(TrainConfig, "train", words, lambda run, options: run)
    folder = train(config, resume=resume)
    print(f"trained: {write_report(folder.root)}")


def _search(words: list[str]) -> None:
    config, resume = parse(
        SearchConfig,
        "search",
        words,
        lambda run, options: run.search(options.get("name") or options.get("method") or "nsga2"),
    )
    chosen = read_json(search(config, resume=resume).summary)["chosen"]
    print(f"chosen: {' '.join(chosen['names'])}  loss {chosen['loss']:.4f}  {chosen['macs']:.2f}M MACs")
    print(f"report: {write_report(config.run)}")


def _retrain(words: list[str]) -> None:
    config, resume = parse(
        RetrainConfig,
        "retrain",
        words,
        lambda run, options: run.retraining(options.get("name") or options.get("search") or "nsga2"),
    )
    summary = read_json(retrain(config, resume=resume).summary)
    print(f"test accuracy: {summary['test_accuracy']:.2%} of {summary['test_images']} images")
    print(f"report: {write_report(config.run)}")


def _evaluate(words: list[str]) -> None:
    config, _ = parse(EvaluateConfig, "evaluate", words)
    check_evaluation(config)
    use_threads(config.threads)
    run = load_run(config.run)
    data, space = run.task.data, run.task.space
    if config.paths is not None:
        paths = _read_paths(config.paths, space)
    elif len(run.pool):
        paths = run.pool.paths[: config.top]
    else:
        raise ValueError("paths: expected a file of paths, since the run's candidate pool is empty")
    calibration = None
    if config.bn == "recalibrated":
        calibration = data.train.calibration(min(config.calibration_images, len(data.train)), seed=run.config.seed)
    evaluation = evaluate_paths(
        run.supernet,
        paths,
        data.validation.batches(config.batch_size),
        bn=config.bn,
        calibration=calibration,
    )
    table = Table("path", "loss", "accuracy", "M MACs")
    macs = run.task.macs_of(paths)
    for path, loss, accuracy, cost in zip(
        paths, evaluation.losses.tolist(), evaluation.accuracy.tolist(), macs, strict=True
    ):
        table.add_row(" ".join(space.decode(path)), f"{loss:.4f}", f"{accuracy:.2%}", f"{cost:.2f}")
    Console().print(table)
    print(
        f"{len(data.validation)} validation images, {evaluation.statistics}; "
        f"{evaluation.plan.shared_fraction:.1%} of the MACs saved by sharing prefixes"
    )


def _read_paths(file: Path, space: Space) -> torch.Tensor:
    """Paths [m, L] from a file that names the operations of one in each line."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"paths: {file}: expected a text file, {error}") from error
    paths = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            with named_as_options(names=f"paths: {file}: line {number}"):
                paths.append(space.encode(line.split()))
    if not paths:
        raise ValueError(f"paths: expected a path in each line of {file}, got an empty file")
    return torch.stack(paths)


def _report(words: list[str]) -> None:
    if len(words) != 1 or words[0].startswith("-"):
        print("usage: greedynas report RUN_FOLDER", file=sys.stderr)
        raise SystemExit(2)
    print(write_report(Path(words[0])))


def _demo(words: list[str]) -> None:
    config = tyro.cli(DemoConfig, args=words, prog="greedynas demo")
    print(f"report: {demo(config)}")
