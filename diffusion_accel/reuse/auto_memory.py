"""What `auto` has learned: in this process, and in one small JSON file of the user for the next ones."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from diffusion_accel.errors import AccelerationError, ConfigurationError
from diffusion_accel.io import cache_place, first_line, is_there, read_json, replacing, writing

from .auto import Candidate
from .plan import Plan

logger = logging.getLogger(__name__)

VARIABLE = "DIFFUSION_ACCEL_AUTO"  # a file to use instead; "off": nothing is read or written
FORMAT = "diffusion-accel auto"
VERSION = 1
MOST = 64  # entries of the file, the newest ones
MOST_PLANS = 64  # of an entry
LIMIT = 4 * 2**20  # bytes

_here: dict[str, tuple[Candidate, ...]] = {}  # what this process knows
_told: set[Path] = set()


def place() -> Path | None:
    """The file; None where nothing is to be kept."""
    return cache_place(VARIABLE, "auto.json")


def recall(about: str) -> dict[str, tuple[Candidate, ...]]:
    """What is known about calls whose key begins with `about`, by the rest of the key."""
    known = _read(about) | {key: found for key, found in list(_here.items()) if key.startswith(about)}
    return {key.removeprefix(about): found for key, found in known.items()}


def remember(key: str, candidates: tuple[Candidate, ...], keep: bool = True) -> None:
    """Know these plans from now on; `keep`: also in the file, if it can be written and is ours."""
    _here[key] = candidates[:MOST_PLANS]
    file = place()
    if file is None or not keep:
        return
    try:
        entries = _entries(file)
        entries.pop(key, None)
        entries[key] = [[round(one.nearness, 2), str(one.plan)] for one in candidates[:MOST_PLANS]]
        newest = dict(list(entries.items())[-MOST:])
        text = json.dumps({"format": FORMAT, "version": VERSION, "learned": newest}, indent=0)
        with writing(file), replacing(file) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    except AccelerationError as error:
        _tell(file, error)


def forget() -> None:
    """Forget what this process knows; the file stays."""
    _here.clear()
    _told.clear()


def _read(about: str) -> dict[str, tuple[Candidate, ...]]:
    file = place()
    if file is None:
        return {}
    try:
        return {key: _candidates(values) for key, values in _entries(file).items() if key.startswith(about)}
    except AccelerationError as error:
        _tell(file, error)
        return {}


def _entries(file: Path) -> dict[str, Any]:
    """The entries of the file, none if there is no file. Raises `ConfigurationError` if it is not ours or damaged."""
    if not is_there(file):
        return {}
    values = read_json(file, "what auto has learned", limit=LIMIT)
    if not isinstance(values, dict) or values.get("format") != FORMAT or values.get("version") != VERSION:
        raise ConfigurationError(f"{file} is not what auto of this version writes")
    learned = values.get("learned")
    if not isinstance(learned, dict):
        raise ConfigurationError(f"{file}: learned must be an object")
    return learned


def _candidates(values: Any) -> tuple[Candidate, ...]:
    if not isinstance(values, list) or len(values) > MOST_PLANS:
        raise ConfigurationError(f"plans must be a list of at most {MOST_PLANS}")
    found = []
    for value in values:
        nearness, text = value if isinstance(value, list) and len(value) == 2 else (None, None)
        if not isinstance(nearness, (int, float)) or not math.isfinite(nearness) or not isinstance(text, str):
            raise ConfigurationError("a plan must be a number and a text")
        found.append(Candidate(float(nearness), Plan.parse(text)))
    return tuple(found)


def _tell(file: Path, error: AccelerationError) -> None:
    if file not in _told:
        _told.add(file)
        logger.warning("%s is not used: %s; remove it, or name another one in %s", file, first_line(error), VARIABLE)
