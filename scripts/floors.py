"""Which module may import which: runs import-linter with the contracts of pyproject.toml.

    python scripts/floors.py

The four source folders are one package only once they are installed, and import-linter reads folders. So it is run in
a folder of links that looks like the installed package, with scripts/ beside it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("pipelines", "quant", "parallel")


def main() -> int:
    """The exit code of lint-imports."""
    with tempfile.TemporaryDirectory() as folder:
        joined = Path(folder)
        package = joined / "diffusion_accel"
        package.mkdir()
        for entry in (*(ROOT / "diffusion_accel").iterdir(), *(ROOT / part for part in PARTS)):
            (package / entry.name).symlink_to(entry)
        (joined / "scripts").symlink_to(ROOT / "scripts")
        linter = "from importlinter.cli import lint_imports_command as run; run()"
        command = [sys.executable, "-c", linter, "--no-logo", "--no-cache", str(ROOT / "pyproject.toml")]
        return subprocess.run(command, cwd=joined, env={**os.environ, "COLUMNS": "120"}).returncode


if __name__ == "__main__":
    sys.exit(main())
