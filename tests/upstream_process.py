"""pytest with a plugin of scripts/ in a process of its own, which has what it imports already (`forks`)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import forks


def start(command: list[str], folder: Path, environment: dict[str, str], log: Path) -> int:
    """In the place of `upstream_tests.start`."""
    process = forks.start(_pytest, command[command.index("pytest") + 1 :], str(folder), environment, str(log))
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _pytest(arguments: list[str], folder: str, environment: dict[str, str], log: str) -> None:
    import pytest  # not in the process that waits for forks

    os.chdir(folder)
    os.environ.update(environment)
    sys.path.insert(0, environment["PYTHONPATH"])
    with Path(log).open("a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(int(pytest.main(arguments)))
