"""The command `greedynas`: train, search, retrain, evaluate, report and demo."""

from __future__ import annotations

import sys
from collections.abc import Sequence
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
)
from greedynas.demo import DemoConfig, demo
from greedynas.report import write_report
from greedynas.retraining import retrain
from greedynas.runs import RunFolder, load_run
from greedynas.search import search
from greedynas.storage import read_json
from greedynas.training import train
from greedynas_ext import evaluate_paths

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
({presets}); options on the command line come before it. --resume continues what was interrupted."""


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
        raise SystemExit(f"greedynas: expected a command among {', '.join(commands)}, got {words[0]!r}")
    try:
        commands[words[0]](words[1:])
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        print(f"greedynas {words[0]}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        print(f"greedynas {words[0]}: interrupted; --resume continues it", file=sys.stderr)
        raise SystemExit(130) from None


def parse(kind: type[Config], command: str, words: list[str], saved: Path | None = None) -> Config:
    """A config from a YAML file, if --config names one, and the options behind it.

    Args:
        kind: the class of the config.
        command: its name, for help texts.
        words: the command line behind it.
        saved: the config of the stage that is resumed, which gives the defaults then.

    Raises:
        FileNotFoundError, ValueError: a config file is missing or wrong.
        SystemExit: an option is wrong, or --help.
    """
    rest, source = _take_value(words, "--config")
    default: Any = None
    if saved is not None and saved.exists():
        default = load_config(kind, saved)
    elif source is not None:
        preset = _PRESETS / command / f"{source}.yaml"
        file = preset if preset.exists() else Path(source)
        values = read_yaml(file)
        # `run` is where this run lies, and a file of options need not know that: the command line must then.
        values.setdefault("run", _take_value(words, "--run")[1] or "")
        default = from_mapping(kind, values, str(file))
        if default.run == Path(""):
            raise ValueError("run: expected --run FOLDER, got none")
    config: Config = tyro.cli(kind, args=rest, prog=f"greedynas {command}", default=default)
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


def _first_value(words: Sequence[str], *options: str) -> str | None:
    """The value of the first of `options` that has one."""
    return next((value for option in options if (value := _take_value(words, option)[1]) is not None), None)


def _folder(words: Sequence[str]) -> RunFolder:
    return RunFolder(Path(_take_value(words, "--run")[1] or "."))


def _take_flag(words: Sequence[str], flag: str) -> tuple[list[str], bool]:
    return [word for word in words if word != flag], flag in words


def _train(words: list[str]) -> None:
    words, resume = _take_flag(words, "--resume")
    config = parse(TrainConfig, "train", words, _folder(words).config if resume else None)
    folder = train(config, resume=resume)
    print(f"trained: {write_report(folder.root)}")


def _search(words: list[str]) -> None:
    words, resume = _take_flag(words, "--resume")
    name = _first_value(words, "--name", "--method") or "nsga2"
    config = parse(SearchConfig, "search", words, _folder(words).search(name).config if resume else None)
    chosen = read_json(search(config, resume=resume).summary)["chosen"]
    print(f"chosen: {' '.join(chosen['names'])}  loss {chosen['loss']:.4f}  {chosen['macs']:.2f}M MACs")
    print(f"report: {write_report(config.run)}")


def _retrain(words: list[str]) -> None:
    words, resume = _take_flag(words, "--resume")
    name = _first_value(words, "--name", "--search") or "nsga2"
    config = parse(RetrainConfig, "retrain", words, _folder(words).retraining(name).config if resume else None)
    summary = read_json(retrain(config, resume=resume).summary)
    print(f"test accuracy: {summary['test_accuracy']:.2%} of {summary['test_images']} images")
    print(f"report: {write_report(config.run)}")


def _evaluate(words: list[str]) -> None:
    config = parse(EvaluateConfig, "evaluate", words)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    run = load_run(config.run)
    data, space = run.task.data, run.task.space
    if config.paths is not None:
        lines = [line.split() for line in config.paths.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"paths: expected a path in each line of {config.paths}, got an empty file")
        paths = torch.stack([space.encode(names) for names in lines])
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


def _report(words: list[str]) -> None:
    if len(words) != 1 or words[0].startswith("-"):
        raise SystemExit("usage: greedynas report RUN_FOLDER")
    print(write_report(Path(words[0])))


def _demo(words: list[str]) -> None:
    config = tyro.cli(DemoConfig, args=words, prog="greedynas demo")
    print(f"report: {demo(config)}")
