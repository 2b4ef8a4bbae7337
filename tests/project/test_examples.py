"""The examples run and learn, and docs/drop-in.md shows the difference that there is between them."""

from __future__ import annotations

import difflib
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from greedynas_ext import PathFilter

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PAGE = (ROOT / "docs/drop-in.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def difference() -> list[str]:
    before, after = ((EXAMPLES / f"spos_{name}.py").read_text().splitlines() for name in ("plain", "greedy"))
    return list(
        difflib.unified_diff(before, after, "examples/spos_plain.py", "examples/spos_greedy.py", n=1, lineterm="")
    )


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def example(capsys) -> Callable[..., tuple[dict[str, Any], float]]:
    """Runs an example; returns its names, and the accuracy that it prints."""

    def run(name: str, **constants: Any) -> tuple[dict[str, Any], float]:
        names = runpy.run_path(str(EXAMPLES / f"{name}.py"))
        main = names["main"]
        assert main.__globals__.keys() >= constants.keys()
        main.__globals__.update(constants)
        main()
        (accuracy,) = re.findall(r"accuracy on the test images: ([\d.]+)%", capsys.readouterr().out)
        return main.__globals__, float(accuracy)

    return run


@pytest.mark.parametrize("name", ["spos_plain", "spos_greedy"])
def test_an_example_runs_and_learns(example, name):
    _, accuracy = example(name, STEPS=150, LAYERS=2)
    assert accuracy > 40  # guessing gives 10


def test_the_greedy_loop_filters_after_its_warm_up(example):
    drawn = []

    class Watched(PathFilter):
        def draw(self, *arguments):
            kept = super().draw(*arguments)
            drawn.append((kept, self.last))
            return kept

    example("spos_greedy", STEPS=100, LAYERS=2, PathFilter=Watched)
    assert [last is None for _, last in drawn] == [True] * 5 + [False] * 15
    assert all(kept.shape == (5, 2) for kept, _ in drawn)
    assert all(len(last.evaluation.losses) == 10 for _, last in drawn[5:])


def test_the_difference_is_small():
    changed = [line for line in difference()[2:] if line[0] in "+-" and line[1:].strip()]
    assert 0 < len(changed) <= 12


def test_the_page_shows_the_difference():
    assert [block.splitlines() for block in blocks("diff")] == [[line.rstrip() for line in difference()]]


@pytest.mark.parametrize("block", blocks("python"))
def test_the_code_of_the_page_runs(block, capsys):
    exec(compile(block, "docs/drop-in.md", "exec"), {})
    assert capsys.readouterr().out.startswith(("CandidatePool(", "tensor("))


def test_named_files_are_there():
    for name in re.findall(r"`((?:examples|docs)/[\w./-]*)`", PAGE):
        assert (ROOT / name).exists(), name
