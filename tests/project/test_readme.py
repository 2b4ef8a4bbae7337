"""What the README shows runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_readme_has_examples():
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_an_example_runs(block, capsys):
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_figures_beside_the_examples(capsys):
    exec(compile(BLOCKS[-1], "README.md", "exec"), {})
    params, macs = map(int, capsys.readouterr().out.split()[:2])
    assert round(params / 1e6, 2) == 6.50
    assert round(macs / 1e6, 1) == 370.0


def test_pictures_are_there():
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (Path(__file__).parents[2] / picture).is_file(), picture


def test_named_files_are_there():
    root = Path(__file__).parents[2]
    for name in re.findall(r"`((?:greedynas_ext|python|csrc|tests|bench)/[\w./]*)`", README):
        assert (root / name).exists(), name
