"""`make docs` builds the documentation site without a warning, and the site has what it should."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # a warning of the theme about another release
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return folder


def pages_of(entries: list[object]) -> list[str]:
    found: list[str] = []
    for entry in entries:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            found += pages_of(value) if isinstance(value, list) else [str(value)]
    return found


def test_each_page_is_built_and_in_the_navigation(site: Path):
    configured = pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"])
    written = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")]
    assert sorted(configured) == sorted(written)
    for page in configured:
        assert (site / page).with_suffix(".html").stat().st_size > 1000, page


def test_what_is_documented_is_in_the_page(site: Path):
    for source in (ROOT / "docs/api").glob("*.md"):
        html = (site / "api" / source.name).with_suffix(".html").read_text(encoding="utf-8")
        for name in re.findall(r"^::: ([\w.]+)", source.read_text(encoding="utf-8"), flags=re.MULTILINE):
            assert f'id="{name}"' in html or f'id="{name}.' in html, name


def test_nothing_is_loaded_from_elsewhere(site: Path):
    for page in site.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:link|script|img)\b[^>]*(?:href|src)=\"?(https?://[^\"\s>]+)", html)
        assert loaded == [], page
