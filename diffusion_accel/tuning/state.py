"""The file of a search: what it is about, then a line for every plan that was evaluated, so that it can go on."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusion_accel.errors import ConfigurationError, DamagedStateError
from diffusion_accel.io import parse_json, read_text, replacing, split_lines


def read_search(path: Path) -> tuple[Any, dict[str, list[float]]]:
    """What a search is about, and the PSNR of every image by plan. A last line that was cut off does not count.

    Raises:
        DamagedStateError: it is no file of a search, or damaged in another place.
    """
    text = read_text(path, "the search")
    lines = split_lines(text)
    if lines and not text.endswith(("\n", "\r")):
        lines.pop()
    known: dict[str, list[float]] = {}
    head: Any = None
    for number, line in enumerate(lines, 1):
        where = f"line {number} of the search {path}"
        try:
            value = parse_json(line, where)
        except ConfigurationError as error:
            raise DamagedStateError(f"{error}; remove the file to begin again") from error
        if number == 1:
            head = value
        elif _is_score(value):
            known[value["plan"]] = [float(score) for score in value["psnr"]]
        else:
            raise DamagedStateError(f"{where} is not the scores of a plan; remove the file to begin again")
    return head, known


def _is_score(value: object) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("plan"), str) or not isinstance(value.get("psnr"), list):
        return False
    return bool(value["psnr"]) and all(type(score) in (int, float) and abs(score) < 1e6 for score in value["psnr"])


def write_search(path: Path, head: object, known: dict[str, list[float]]) -> None:
    """Write the whole file anew, complete or not at all."""
    lines = [json.dumps(head), *(_line(plan, scores) for plan, scores in known.items())]
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def add_score(path: Path, plan: str, scores: list[float]) -> None:
    """Add a line: the PSNR of every image with a plan."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(plan, scores) + "\n")


class Scores:
    """The PSNR of every image by plan, each computed once, and kept in a file if there is one.

    Args:
        state: the file; None: they are kept in memory only.
        about: what the search is about; scores of another search are forgotten.
    """

    def __init__(self, state: Path | None, about: Callable[[], object]) -> None:
        self._state, self._about = state, about
        self._known: dict[str, list[float]] | None = None

    def of(self, plan: str, compute: Callable[[], list[float]]) -> list[float]:
        """Those of a plan. Nothing is read or written before the first one is asked for."""
        if self._known is None:
            self._known = self._resumed()
        if plan not in self._known:
            self._known[plan] = compute()
            if self._state is not None:
                add_score(self._state, plan, self._known[plan])
        return self._known[plan]

    def _resumed(self) -> dict[str, list[float]]:
        if self._state is None:
            return {}
        head, known = self._about(), {}
        if self._state.exists():
            before, scores = read_search(self._state)
            known = scores if before == json.loads(json.dumps(head)) else {}
        write_search(self._state, head, known)
        return known


def _line(plan: str, scores: list[float]) -> str:
    return json.dumps({"plan": plan, "psnr": [round(score, 3) if math.isfinite(score) else 0.0 for score in scores]})


def search_files(state: Path) -> list[Path]:
    """The files of a search: one for each scheduler and number of steps that it tries."""
    own = re.compile(rf"{re.escape(state.name)}(\.[0-9]+)?")
    folder = state.parent
    return sorted(f for f in folder.iterdir() if own.fullmatch(f.name)) if folder.is_dir() else []


def forget_search(state: Path) -> None:
    """Remove the files of a search."""
    for file in search_files(state):
        file.unlink()
