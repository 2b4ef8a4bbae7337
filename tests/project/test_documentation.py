"""What the README and the pages of docs/ show runs as it stands, and what they name is there."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import greedynas
import greedynas_ext

ROOT = Path(__file__).parents[2]
README = "README.md"
PAGES = [README, *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^( *)```(\w+)(.*)\n((?:.*\n)*?)\1```$", flags=re.MULTILINE)
NEEDS_GPU = 'title="needs a GPU"'


class Block(NamedTuple):
    """A fenced block of a page; `line` is that of its first line."""

    language: str
    options: str
    line: int
    text: str


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks_of(page: str, language: str) -> list[Block]:
    text = text_of(page)
    found = [
        Block(fence[2], fence[3].strip(), text[: fence.start()].count("\n") + 2, textwrap.dedent(fence[4]))
        for fence in FENCE.finditer(text)
    ]
    return [block for block in found if block.language == language]


def code_of(page: str, block: Block) -> Any:
    """Errors name the page and the line of it."""
    return compile("\n" * (block.line - 1) + block.text, page, "exec")


def runnable(page: str) -> list[Block]:
    return [block for block in blocks_of(page, "python") if NEEDS_GPU not in block.options]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def test_the_pages_have_examples():
    blocks = {page: blocks_of(page, "python") for page in PAGES}
    assert len(blocks[README]) >= 2
    assert sum(map(len, blocks.values())) >= 15
    for page, found in blocks.items():  # none escapes the pattern
        assert len(found) == len(re.findall(r"^ *```py", text_of(page), flags=re.MULTILINE)), page


@pytest.mark.parametrize("page", [page for page in PAGES if page != README and runnable(page)])
def test_the_blocks_of_a_page_run_one_after_the_other(page: str, capsys: pytest.CaptureFixture[str]):
    """Later ones may use the names of earlier ones."""
    names: dict[str, Any] = {"__name__": f"block of {page}"}
    for block in runnable(page):
        exec(code_of(page, block), names)
    assert capsys.readouterr().out.strip()


def test_the_blocks_of_the_readme_stand_alone(capsys: pytest.CaptureFixture[str]):
    for block in blocks_of(README, "python"):
        exec(code_of(README, block), {})
        assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("page", "block"),
    [
        pytest.param(page, block, id=f"{page}, line {block.line}")
        for page in PAGES
        for block in blocks_of(page, "python")
        if NEEDS_GPU in block.options
    ],
)
def test_a_block_that_needs_a_gpu(page: str, block: Block):
    code = code_of(page, block)
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU, and there is none; that it is Python was checked")
    names: dict[str, Any] = {"__name__": f"block of {page}"}
    for earlier in blocks_of(page, "python"):
        if earlier.line < block.line:
            exec(code_of(page, earlier), names)
    exec(code, names)


def test_the_figures_beside_the_examples(capsys: pytest.CaptureFixture[str]):
    exec(code_of(README, blocks_of(README, "python")[-1]), {})
    params, macs = map(int, capsys.readouterr().out.split()[:2])
    assert round(params / 1e6, 2) == 6.50
    assert round(macs / 1e6, 1) == 370.0


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page: str):
    text, folder = text_of(page), (ROOT / page).parent
    for name in re.findall(r"`((?:greedynas_ext|python|csrc|tests|bench|examples|docs)/[\w./-]*)`", text):
        assert (ROOT / name).exists(), name
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose):
        assert link.startswith("https://") or (folder / link).exists(), link
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("package", [greedynas_ext, greedynas])
def test_every_public_name_is_in_the_reference(package: Any):
    text = "".join(text_of(page) for page in PAGES if page.startswith("docs/api/"))
    documented = {name.rsplit(".", 1)[1] for name in re.findall(r"^::: ([\w.]+)", text, flags=re.MULTILINE)}
    elsewhere = set(greedynas_ext.__all__) if package is greedynas else set()
    missing = set(package.__all__) - documented - elsewhere
    assert not missing, f"docs/api/ should have ::: lines for {sorted(missing)}"
