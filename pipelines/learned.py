"""Learned solvers by name: the one that ships for an embedded model, or a saved one as a folder or file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_accel.diffusers_compat import origin_of
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import is_there, printable, read_json
from diffusion_accel.model_files.names import EMBEDDED, ModelSource
from diffusion_accel.schedulers.solver import (
    CLASS,
    FILE,
    SIZE_LIMIT,
    evaluations_in,
    not_learnt,
    read_file,
    shipped_file,
    shipped_models,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

LEARNED = "learned"


def is_learned(name: str) -> bool:
    """Whether a scheduler's name means a learned solver: "learned", a .json file, or a folder that holds one."""
    if name == LEARNED or name.endswith(".json"):
        return True
    return "/" in name or is_there(Path(name) / FILE, "file")


def check_learned(name: str, source: ModelSource | None = None, steps: int | None = None) -> None:
    """Refuse a learned solver that is not there, or was not learnt for so many steps, before a model is loaded.

    Args:
        name: for which `is_learned` holds.
        source: the model, if it is known.
        steps: of a call, if they are known.

    Raises:
        ConfigurationError: with the numbers that it was learnt for, or what is wrong with its file.
    """
    if name == LEARNED and source is None:
        return
    if (reason := not_learnt(learnt_evaluations(name, source), steps)) and steps is not None:
        raise ConfigurationError(f"scheduler {printable(name)} with steps {steps}: {reason}")


def check_own(source: ModelSource, steps: int) -> None:
    """The same for a pipeline folder that was saved with a learned solver."""
    file = _own_file(source)
    if file is not None:
        check_learned(str(file), source, steps)


def own_evaluations(source: ModelSource) -> list[int]:
    """The numbers of evaluations of a learned solver that a pipeline folder was saved with; none without one."""
    file = _own_file(source)
    return [] if file is None else evaluations_in(file)


def learnt_evaluations(name: str, source: ModelSource | None) -> list[int]:
    """The numbers of evaluations of a solver by name (`is_learned`), for a model. Raises as `check_learned`."""
    if name == LEARNED and source is not None:
        return evaluations_in(_shipped(source.name if source.kind == "embedded" else "", source.name))
    return evaluations_in(Path(name))


def _own_file(source: ModelSource) -> Path | None:
    file = Path(source.location) / "scheduler" / FILE
    if source.kind not in ("embedded", "folder") or not is_there(file, "file"):
        return None
    values = read_json(file, limit=SIZE_LIMIT, nonfinite=True)
    return file if isinstance(values, dict) and values.get("_class_name") == CLASS else None


def learned_for(pipe: DiffusionPipeline, name: str) -> Any:
    """A learned solver for a pipeline, with the rest of its scheduler's configuration.

    Raises:
        ConfigurationError: there is none, or it was learnt for a model with another prediction or noise schedule.
    """
    from diffusion_accel.schedulers.learned import LearnedMultistepScheduler  # heavy: torch, diffusers

    if name == LEARNED:
        origin = origin_of(pipe)
        here = next((m for m, known in EMBEDDED.items() if origin == str(known.path)), "")
        file = _shipped(here, type(pipe).__name__ if origin is None else Path(origin).name)
    else:
        file = Path(name)
    learned = LearnedMultistepScheduler.from_config(read_file(file))
    if reason := learned.unfit_for(pipe.scheduler):
        raise ConfigurationError(f"scheduler {printable(name)} does not fit this model: {reason}")
    return LearnedMultistepScheduler.like(pipe.scheduler, learned.config.solvers, learned.config.made_for)


def _shipped(model: str, shown_as: str) -> Path:
    file = shipped_file(model)
    if file is None:
        there = ", ".join(shipped_models()) or "none"
        raise ConfigurationError(
            f"no learned solver ships for {printable(shown_as)} (models that have one: {there}); give the folder or "
            "file of a saved one instead of learned"
        )
    return file
