"""Which module may import which, and where imports stand inside of functions.

    python scripts/floors.py

Runs import-linter with the contracts of pyproject.toml. The four source folders are one package only once they are
installed, and import-linter reads folders: so it is run in a folder of links that looks like the installed package,
with scripts/ beside it.

Imports inside of functions keep start-up cheap, or hide a circle. So each says why it is there in a comment behind it,
and there are at most `LIMIT` in 1,000 lines.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("pipelines", "quant", "parallel")
LIMIT = 4.0


def contracts() -> bool:
    """Whether the contracts of pyproject.toml hold; prints import-linter's report."""
    with tempfile.TemporaryDirectory() as folder:
        joined = Path(folder)
        package = joined / "diffusion_accel"
        package.mkdir()
        for entry in (*(ROOT / "diffusion_accel").iterdir(), *(ROOT / part for part in PARTS)):
            (package / entry.name).symlink_to(entry)
        (joined / "scripts").symlink_to(ROOT / "scripts")
        linter = "from importlinter.cli import lint_imports_command as run; run()"
        command = [sys.executable, "-c", linter, "--no-logo", "--no-cache", str(ROOT / "pyproject.toml")]
        return subprocess.run(command, cwd=joined, env={**os.environ, "COLUMNS": "120"}).returncode == 0


def inside_functions(source: str) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports inside of functions."""
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    tree = ast.parse(source)
    outer = [node for node in ast.walk(tree) if isinstance(node, functions)]
    found = {id(node): node for function in outer for node in ast.walk(function)}
    yield from (node for node in found.values() if isinstance(node, (ast.Import, ast.ImportFrom)))


def inner_imports() -> bool:
    """Whether imports inside of functions are few, and each has its reason; prints those that have none."""
    total = count = 0
    bare: list[str] = []
    for path in sorted(p for part in ("diffusion_accel", *PARTS) for p in (ROOT / part).rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        lines = source.splitlines()
        total += len(lines)
        for node in inside_functions(source):
            count += 1
            if "#" not in "".join(lines[node.lineno - 1 : node.end_lineno]):
                bare.append(f"{path.relative_to(ROOT)}:{node.lineno}: {lines[node.lineno - 1].strip()}")
    density = 1000 * count / total
    print(f"\n{count} imports inside of functions, {density:.1f} in 1,000 lines (at most {LIMIT:g})")
    if bare:
        print(f"{len(bare)} of them say no reason (a comment behind the import):", *bare, sep="\n  ")
    return density <= LIMIT and not bare


def main() -> int:
    """1 if anything is broken."""
    kept = contracts()
    return int(not (inner_imports() and kept))


if __name__ == "__main__":
    sys.exit(main())
