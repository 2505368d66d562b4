"""What is asked of a pipeline when it is measured: the prompts and the settings of its calls, checked before the first.

`compare`, `benchmark` and `evaluate` take the same arguments with the same meaning; they are checked here.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from diffusion_accel.conditioning import CLASS, PROMPT, call_arguments, call_parameters, condition_of
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import shown

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MAX_SEED = 2**63 - 1
MOST_STEPS = 10_000
_NAMES = {"steps": "num_inference_steps"}  # of the arguments of a pipeline's call that have other names here


def whole(name: str, value: int, least: int = 1, most: int | None = None) -> int:
    """A whole number within its bounds.

    Raises:
        ConfigurationError: it is none, or outside of them; names the argument.
    """
    allowed = f"at least {least}" if most is None else f"{least} to {most}"
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        raise ConfigurationError(f"{name} must be a whole number of {allowed}, got {shown(value)}")
    return value


def listed(prompts: str | Sequence[str]) -> list[str]:
    """Prompts or names of classes as a list; one text is a list of one. Raises `ConfigurationError` for no texts."""
    texts = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise ConfigurationError(f"prompts must be a text or a list of texts, got {shown(prompts)}")
    return list(texts)


def texts_of(pipe: DiffusionPipeline, prompts: str | Sequence[str], least: int = 1) -> list[str]:
    """Prompts or names of classes as a list, checked for a pipeline; one text is a list of one.

    Raises:
        ConfigurationError: they are no texts, too few, or classes that the model has not; empty where the pipeline
            takes a prompt.
    """
    texts = listed(prompts)
    if len(texts) < least:
        raise ConfigurationError(f"prompts must be at least {least}, got {len(texts)}")
    condition = condition_of(pipe)
    if condition == PROMPT and not any(text.strip() for text in texts):
        raise ConfigurationError(f"prompts are all empty, but {type(pipe).__name__} draws what a prompt says")
    if condition == CLASS:
        call_arguments(pipe, texts)  # refuses unknown classes
    return texts


def options_of(pipe: DiffusionPipeline, **wanted: Any) -> dict[str, Any]:
    """Arguments of the pipeline's call, by its own names, of the settings that are not None.

    Args:
        pipe: the pipeline that will be called.
        wanted: steps (1 to 10,000), guidance_scale (0 to 1000), height, width (pixels, at least 8), and whatever else
            its call may take.

    Raises:
        ConfigurationError: a value is outside of its bounds, or the pipeline takes no such argument.
    """
    given = {name: value for name, value in wanted.items() if value is not None}
    if "steps" in given:
        whole("steps", given["steps"], 1, MOST_STEPS)
    for name in {"height", "width"} & given.keys():
        whole(name, given[name], 8, 32_768)
    scale = given.get("guidance_scale", 0)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not (0 <= scale <= 1000):
        raise ConfigurationError(f"guidance_scale must be a number of 0 to 1000, got {shown(scale)}")
    taken = call_parameters(pipe)
    unknown = [name for name in given if _NAMES.get(name, name) not in taken]
    if unknown:
        raise ConfigurationError(f"{type(pipe).__name__} does not take {', '.join(unknown)}")
    return {_NAMES.get(name, name): value for name, value in given.items()}


def usual_steps(pipe: DiffusionPipeline) -> int | None:
    """How many steps the pipeline does if nobody says; None where its call has no default."""
    parameter = inspect.signature(type(pipe).__call__).parameters.get("num_inference_steps")
    return parameter.default if parameter is not None and isinstance(parameter.default, int) else None
