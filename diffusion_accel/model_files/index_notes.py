"""What this package keeps of a model in its model_index.json, below a key of its own that diffusers passes over: the
recommended settings, and whether the folder was saved with its recipe."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_accel.errors import AccelerationError, ConfigurationError, ModelLoadError
from diffusion_accel.io import read_json, shown

INDEX = "model_index.json"
LEARNED = "LearnedMultistepScheduler"  # the class of this package's own scheduler
KEY = "_diffusion_accel"
RECIPE = "recipe"  # true: the folder was saved with its acceleration.json, which is then the model's own
NUMBERS = {"steps": int, "guidance_scale": float, "width": int, "height": int}
_LIMITS = {"steps": (1, 10_000), "guidance_scale": (0, 1000), "width": (8, 32_768), "height": (8, 32_768)}
_SCHEDULER = re.compile(r"[\w+,.-]{1,100}")  # a name of the command line's, never a file


def check_numbers(
    values: Mapping[str, Any], where: str, error: type[AccelerationError] = ConfigurationError
) -> dict[str, Any]:
    """Recommended numbers of a call, by their names in `NUMBERS`, each of its type. Raises `error` for one that is not
    allowed; `where` stands before it."""
    for key, value in values.items():
        low, high = _LIMITS[key]
        kinds = (int, float) if NUMBERS[key] is float else (int,)
        if type(value) not in kinds or not low <= value <= high:
            raise error(f"{where}: {key} must be from {low} to {high}, got {shown(value)}")
    return {key: NUMBERS[key](value) for key, value in values.items()}


def notes_in(index: Mapping[str, Any], where: Path | str) -> dict[str, Any]:
    """What a model_index.json says to this package alone.

    Args:
        index: its values.
        where: the file, for errors.

    Returns:
        `recommended`: settings by the names of the command line; `instead_of`: the class of scheduler in whose place
        the recommended one is; `RECIPE`. Each may be missing; what is not known is left out.

    Raises:
        ModelLoadError: a value is not allowed.
    """
    found = index.get(KEY, {})
    recommended = found.get("recommended", {}) if isinstance(found, dict) else None
    if not isinstance(recommended, dict):
        raise ModelLoadError(f"{where}: {KEY} must be a table, with one of settings in it, got {shown(found)}")
    notes: dict[str, Any] = {}
    if numbers := {key: recommended[key] for key in recommended if key in NUMBERS}:
        notes["recommended"] = check_numbers(numbers, f"{where}: {KEY}", ModelLoadError)
    if (scheduler := recommended.get("scheduler")) is not None:
        if not isinstance(scheduler, str) or not _SCHEDULER.fullmatch(scheduler):
            raise ModelLoadError(f"{where}: {KEY}: scheduler must be the name of one, got {shown(scheduler)}")
        notes["recommended"] = {**notes.get("recommended", {}), "scheduler": scheduler}
    if isinstance(instead := found.get("instead_of"), str):
        notes["instead_of"] = instead
    return notes | ({RECIPE: True} if found.get(RECIPE) is True else {})


def notes_of(folder: Path | str) -> dict[str, Any]:
    """`notes_in` the model_index.json of a pipeline folder."""
    return notes_in(_values(folder), Path(folder) / INDEX)


def recommended_by(folder: Path | str) -> dict[str, Any]:
    """The settings that a pipeline folder recommends, by the names of the command line. The scheduler is among them
    only while the folder has the one that it is recommended in place of: another was chosen by whoever saved it. A
    learned one has numbers of steps of its own."""
    values = _values(folder)
    notes = notes_in(values, Path(folder) / INDEX)
    found = dict(notes.get("recommended", {}))
    own = values.get("scheduler") if found else None
    if notes.get("instead_of") not in (None, own[-1] if isinstance(own, list) and own else None):
        found.pop("scheduler", None)
    if isinstance(own, list) and own[-1:] == [LEARNED]:
        found.pop("steps", None)
    return found


def _values(folder: Path | str) -> dict[str, Any]:
    values = read_json(Path(folder) / INDEX, error=ModelLoadError, nonfinite=True)
    return values if isinstance(values, dict) else {}
