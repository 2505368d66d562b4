"""Errors of the training programs, and files that are either complete or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusion_accel import io
from diffusion_accel.errors import AccelerationError
from diffusion_accel.io import replacing

_LIMIT = 2**30  # bytes of a file of JSON: a line an image


class TrainingError(AccelerationError, RuntimeError):
    """A training program cannot go on; the message is one line for the user."""


class UsageError(TrainingError):
    """What was asked for cannot be done: a missing folder, a stage that was not run, a state that would be lost."""


class RunExistsError(UsageError):
    """The folder holds a run already, and nobody asked to go on with it."""


def write_json(path: Path, content: Any) -> None:
    """Write plain values as JSON, complete or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """The values in a file of JSON. Raises `UsageError` if it is missing, `TrainingError` if it is broken."""
    if not path.exists():
        raise UsageError(f"{path} is missing")
    return io.read_json(path, limit=_LIMIT, error=TrainingError)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The tables in a file of JSON lines. Raises `UsageError` if it is missing, `TrainingError` if a line is broken."""
    if not path.exists():
        raise UsageError(f"{path} is missing")
    lines = enumerate(io.split_lines(io.read_text(path, limit=_LIMIT, error=TrainingError)), 1)
    rows = [(n, io.parse_json(line, f"{path}, line {n}", error=TrainingError)) for n, line in lines if line.strip()]
    for n, row in rows:
        if not isinstance(row, dict):
            raise TrainingError(f"{path}, line {n}: is no table")
    return [row for _, row in rows]


def rows_of(path: Path, **kinds: type | tuple[type, ...]) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, at least one.

    Raises:
        TrainingError: there is none, or one lacks a key of `kinds`, or has something else there.
    """
    rows = read_json_lines(path)
    for n, row in enumerate(rows, 1):
        for key, kind in kinds.items():
            if not isinstance(row.get(key), kind):
                raise TrainingError(f"{path}, row {n}: {key} is missing or not of its kind")
    if not rows:
        raise TrainingError(f"{path} has no rows")
    return rows


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write a table a line, complete or not at all."""
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def require(path: Path, stage: str) -> Path:
    """`path`, or a one-line error that names the stage which writes it."""
    if not path.exists():
        raise UsageError(f"{path} is missing; run the {stage!r} stage first")
    return path
