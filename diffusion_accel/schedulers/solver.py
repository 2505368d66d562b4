"""What a learned solver is made of, as its file says it: timesteps and combinations for each number of evaluations.

Needs neither torch nor diffusers, so that a number of steps is refused before a model is loaded.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from diffusion_accel.combination import Combination
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import at_home, is_there, printable, read_json, shown
from diffusion_accel.model_files.index_notes import LEARNED
from diffusion_accel.model_files.names import EMBEDDED

from .in_family import is_family, together

CLASS = LEARNED
FILE = "scheduler_config.json"
SHIPPED = Path(str(resources.files("diffusion_accel.assets"))) / "solvers"  # a folder for each embedded model
MOST_EVALUATIONS = 1000
MOST_SOLVERS = 64  # of one file
LEAST_STEP = 0.001  # from a timestep to the next
SIZE_LIMIT = 16 * 2**20  # bytes of a file
_FIELDS = ("timesteps", "steps", "start")


@dataclass(frozen=True)
class Solver:
    """The steps for one number of evaluations.

    Attributes:
        timesteps: of the evaluations, from noisy to clean, in units of the training's.
        steps: for each evaluation, the next latents from the clean samples and latents up to there.
        start: by the number of a step, what stands in for it where fewer evaluations were made than it needs (an image
            to start from): with one, with two, ... of them.
    """

    timesteps: tuple[float, ...]
    steps: tuple[Combination, ...]
    start: Mapping[int, tuple[Combination, ...]] = field(default_factory=dict)

    @property
    def combinations(self) -> list[Combination]:
        """All of them."""
        return [*self.steps, *(one for several in self.start.values() for one in several)]

    @property
    def history(self) -> int:
        """How many evaluations are to be kept, the newest included; neutral steps need two."""
        return max(2, *(needs(one) for one in self.combinations))

    def to_dict(self) -> dict[str, Any]:
        """What a file has of it."""
        values: dict[str, Any] = {"timesteps": list(self.timesteps), "steps": [str(step) for step in self.steps]}
        if self.start:
            values["start"] = {str(i): [str(one) for one in several] for i, several in self.start.items()}
        return values


def needs(combination: Combination) -> int:
    """How many evaluations a combination looks back on, the newest included."""
    return max(combination.count, combination.count_latents)


# ---------------------------------------------------------------------- reading
def read_solvers(values: object, training: int, flow: bool = False) -> dict[int, Solver]:
    """Solvers by number of evaluations.

    Args:
        values: as a file has them, {"8": {"timesteps": [...], "steps": [...], "start": {"4": [...]}}}.
        training: the number of training timesteps.
        flow: the timesteps are σ times that.

    Raises:
        ConfigurationError: they are not that, with the number and what is wrong.
    """
    if not isinstance(values, dict) or len(values) > MOST_SOLVERS:
        raise ConfigurationError(f"solvers must be a table of at most {MOST_SOLVERS} solvers, got {shown(values)}")
    solvers: dict[int, Solver] = {}
    for key, entry in values.items():
        name = str(key)
        if not name.isascii() or not name.isdecimal() or not 1 <= int(name[:9]) <= MOST_EVALUATIONS:
            raise ConfigurationError(
                f"solvers: a number of evaluations must be from 1 to {MOST_EVALUATIONS}, got {shown(key)}"
            )
        try:
            solvers[int(name)] = _solver(entry, int(name), training, flow)
        except ConfigurationError as error:
            raise ConfigurationError(f"the solver for {name} evaluations: {error}") from error
    channels = {one.channels for solver in solvers.values() for one in solver.combinations} - {1}
    if len(channels) > 1:
        raise ConfigurationError(f"solvers: all must be for as many channels, got {sorted(channels)}")
    return dict(sorted(solvers.items()))


def _solver(entry: object, count: int, training: int, flow: bool) -> Solver:
    if isinstance(entry, Solver):
        entry = entry.to_dict()
    if not isinstance(entry, dict) or not {"timesteps", "steps"} <= entry.keys() <= {*_FIELDS}:
        raise ConfigurationError(f"it must have timesteps and steps, and may have start; got {shown(entry)}")
    start = entry.get("start") or {}
    if not isinstance(start, dict):
        raise ConfigurationError(f"start must be a table, got {shown(start)}")
    solver = Solver(
        _timesteps(entry["timesteps"], count, training, flow),
        _combinations(entry["steps"], "steps", count),
        {_place(key, count): _combinations(texts, f"start {key}") for key, texts in start.items()},
    )
    for i, step in enumerate(solver.steps):
        if needs(step) > i + 1:
            raise ConfigurationError(f"step {i} needs {needs(step)} evaluations, and {i + 1} are made until then")
    for i, several in solver.start.items():
        for made, one in enumerate(several, 1):
            if needs(one) > made or made > i:
                raise ConfigurationError(f"start {i}: entry {made} needs more evaluations than there are")
    return solver


def _timesteps(values: object, count: int, training: int, flow: bool) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)) or len(values) != count or not all(_is_number(v) for v in values):
        raise ConfigurationError(f"timesteps must be {count} numbers, got {shown(values)}")
    times = tuple(float(v) for v in values)
    if not all(a - b >= LEAST_STEP for a, b in itertools.pairwise(times)):
        raise ConfigurationError(
            f"timesteps must fall by at least {LEAST_STEP} from each to the next, got {shown(list(times))}"
        )
    highest = training if flow else training - 1
    if times[0] > highest or times[-1] < 0 or (flow and times[-1] == 0):
        least = "above 0" if flow else "0"
        raise ConfigurationError(f"timesteps must be from {least} to {highest}, got {shown(list(times))}")
    return times


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _combinations(texts: object, what: str, count: int | None = None) -> tuple[Combination, ...]:
    if not isinstance(texts, (list, tuple)) or not texts or (count is not None and len(texts) != count):
        raise ConfigurationError(f"{what} must be {count or 'some'} combinations, got {shown(texts)}")
    if wrong := [text for text in texts if not isinstance(text, (str, Combination))]:
        raise ConfigurationError(f"{what}: a combination is a text, got {shown(wrong[0])}")
    read = tuple(text if isinstance(text, Combination) else Combination.parse(text) for text in texts)
    if any(one.count_additions for one in read):
        raise ConfigurationError(f"{what}: a scheduler is not told what guidance adds")
    return read


def _place(key: object, count: int) -> int:
    name = str(key)
    if not name.isascii() or not name.isdecimal() or not 1 <= int(name[:9]) < count:
        raise ConfigurationError(f"start: the number of a step must be from 1 to {count - 1}, got {shown(key)}")
    return int(name)


# ---------------------------------------------------------------------- files
def read_file(path: Path | str) -> dict[str, Any]:
    """The configuration of a saved learned scheduler: a folder with a scheduler_config.json, or that file, or the file
    of a family of plans that has solvers.

    Raises:
        ConfigurationError: there is none, or it is the configuration of another class.
    """
    file = at_home(path)
    if is_there(file, "dir"):
        file = file / FILE
    values = read_json(file, "the learned solver", limit=SIZE_LIMIT, nonfinite=True)  # DPM-Solver's own -Infinity
    if is_family(values):
        values = together(values["solvers"], str(file))
    name = values.get("_class_name") if isinstance(values, dict) else None
    if name != CLASS:
        raise ConfigurationError(f"{file} is no learned solver: its _class_name is {shown(name)}, not {CLASS}")
    return {key: value for key, value in values.items() if not key.startswith("_")}  # diffusers' own notes


def evaluations_in(path: Path | str) -> list[int]:
    """The numbers of evaluations that a saved learned scheduler was learnt for; its file is checked."""
    values = read_file(path)
    training = values.get("num_train_timesteps", 1000)
    if type(training) is not int:
        raise ConfigurationError(f"{path}: num_train_timesteps must be a whole number, got {shown(training)}")
    try:
        return [*read_solvers(values.get("solvers") or {}, training, values.get("flow") is True)]
    except ConfigurationError as error:
        raise ConfigurationError(f"{printable(path)}: {error}") from error


def shipped_file(model: str) -> Path | None:
    """Where the learned solver of an embedded model is; None if none ships for it."""
    if model not in EMBEDDED:
        return None
    file = SHIPPED / model / FILE
    return file if file.is_file() else None


def shipped_models() -> list[str]:
    """The embedded models for which a learned solver ships."""
    return [model for model in EMBEDDED if shipped_file(model) is not None]


def not_learnt(learnt: Sequence[int], wanted: object) -> str | None:
    """Why so many evaluations cannot be made, with the nearest number that can; None if they can."""
    if not isinstance(wanted, bool) and wanted in learnt:
        return None
    if not learnt:
        return "it holds no solver: load one with from_pretrained, or make one with tune"
    message = f"learnt for {_listed(learnt)} evaluations"
    if not isinstance(wanted, int) or isinstance(wanted, bool):
        return f"{message}, got {shown(wanted)}"
    least = min(abs(n - wanted) for n in learnt)
    near = [n for n in learnt if abs(n - wanted) == least]
    return f"{message}; the nearest to {wanted} is {_listed(near, 'or')}"


def _listed(numbers: Iterable[int], word: str = "and") -> str:
    *others, last = [str(n) for n in sorted(numbers)]
    return f"{', '.join(others)} {word} {last}" if others else last
