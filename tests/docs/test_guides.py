"""Every block of code in the guides is run or says why not: Python as it stands, commands until a model is loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from snippets import ROOT, blocks, commands, prepare, understood, without_models

PAGES = [ROOT / "docs" / "index.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]
ELSEWHERE = {"pip": "other packages", "curl": "tests/serving/http/test_docs.py"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python(page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The blocks of a page follow one another."""
    module = ModuleType("guide")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclasses look their types up
    for block in blocks(page):
        if block.kind == "python" and not block.why_not:
            exec(compile(block.text, page.name, "exec"), vars(module))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands(page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    prepare()
    without_models(monkeypatch)
    for line in commands(blocks(page)):
        understood(line, capsys)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_block_is_forgotten(page: Path) -> None:
    for block in blocks(page):
        assert block.kind in ("python", "console"), f"{block.kind!r} is not run, and does not say so"
        lines = [line for line in block.lines if block.kind == "console" and not block.why_not]
        assert len(commands([block])) == len([line for line in lines if line.split()[1] not in ELSEWHERE])
