"""What the library says names arguments; flags are the command line's."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("diffusion_accel", "pipelines", "quant", "parallel")
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")
OTHERS = {"--nproc-per-node"}  # flags of other programs
LOGGING = {"debug", "info", "warning", "error", "exception", "critical", "log", "warn", "warn_once"}


def said(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The texts that are raised or logged, with their lines."""
    for node in ast.walk(tree):
        logged = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LOGGING
        if not (isinstance(node, ast.Raise) or logged):
            continue
        for part in ast.walk(node):
            if isinstance(part, ast.Constant) and isinstance(part.value, str):
                yield part.lineno, part.value


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_error_of_the_library_names_a_flag(folder: str) -> None:
    found = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        if "cli" in file.relative_to(ROOT).parts:
            continue
        for line, text in said(ast.parse(file.read_text(encoding="utf-8"))):
            found += [f"{file.relative_to(ROOT)}:{line}: {flag}" for flag in set(FLAG.findall(text)) - OTHERS]
    assert not found, "a message of the library names the argument (count must be …), the command line adds dashes"
