"""The log of a training run: log.jsonl, and TensorBoard where it is installed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.tracking import TensorBoardTracker
from accelerate.utils import is_tensorboard_available

from diffusion_accel.io import split_lines

from .files import write_json_lines


class Log:
    """The numbers of a run, a line an entry; a run that goes on drops the lines behind the step that it goes on from.

    Args:
        folder: of the run, where `log.jsonl` and `tensorboard/` go.
        step: from which the run goes on; 0: it begins.
        batch: samples a step.
    """

    def __init__(self, folder: Path, step: int, batch: int) -> None:
        self.path, self.batch = folder / "log.jsonl", batch
        folder.mkdir(parents=True, exist_ok=True)
        known = log_lines(self.path) if step and self.path.exists() else []
        write_json_lines(self.path, [line for line in known if line["step"] <= step])
        self._board = TensorBoardTracker("tensorboard", logging_dir=folder) if is_tensorboard_available() else None
        if self._board is not None:
            self._board.start()

    def write(self, step: int, seconds: float, values: dict[str, Any]) -> None:
        """Add the values of a step, `seconds` after the run began."""
        head = {"step": step, "samples": step * self.batch, "seconds": round(seconds, 2)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(head | values) + "\n")
        if self._board is not None:
            self._board.log(dict(_scalars(values)), step=step)

    def close(self) -> None:
        """Write what TensorBoard still holds."""
        if self._board is not None:
            self._board.finish()


def log_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log: a run that was killed may have left half of one."""
    found = []
    for line in split_lines(path.read_text(encoding="utf-8", errors="replace")):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(values, dict) and type(values.get("step")) is int:
            found.append(values)
    return found


def _scalars(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            yield from ((f"{prefix}{name}/{i}", float(item)) for i, item in enumerate(value))
        else:
            yield prefix + name, float(value)
