"""Errors of the training programs, and files that are either complete or not there."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import interrupts, io
from ..errors import AccelerationError
from ..io import replacing

_LIMIT = 2**30  # bytes of a file of JSON: a line an image


class TrainingError(AccelerationError, RuntimeError):
    """A training program cannot go on; the message is one line for the user."""


class UsageError(TrainingError):
    """What was asked for cannot be done: a missing folder, a stage that was not run, a state that would be lost."""

    exit_code = 2


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`; takes the place of `path` at the end, removed after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary.chmod(0o755)
    with interrupts.unfinished(temporary):
        yield temporary
        with interrupts.undivided():
            old = path.with_name(f"{temporary.name}.old")
            if path.exists():
                os.rename(path, old)
            interrupts.finish(temporary, path)
            shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    if not path.exists():
        raise UsageError(f"{path} is missing")
    return io.read_json(path, limit=_LIMIT, error=TrainingError)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        raise UsageError(f"{path} is missing")
    lines = enumerate(io.split_lines(io.read_text(path, limit=_LIMIT, error=TrainingError)), 1)
    return [io.parse_json(line, f"{path}, line {n}", error=TrainingError) for n, line in lines if line.strip()]


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def require(path: Path, stage: str) -> Path:
    """`path`, or a one-line error that names the stage which writes it."""
    if not path.exists():
        raise UsageError(f"{path} is missing; run the {stage!r} stage first")
    return path
