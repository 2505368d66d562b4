"""Schedulers by short names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from diffusion_accel import schedulers
from diffusion_accel.arguments import nearest
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import first_line
from diffusion_accel.schedulers.solver import not_learnt

from .learned import (
    LEARNED,
    check_learned,
    check_own,
    is_learned,
    learned_for,
    learnt_evaluations,
    own_evaluations,
)
from .spacings import check_spacing, spacing_changes

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffusion_accel.model_files.names import ModelSource

# short name -> (diffusers class, changes of its configuration)
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {}),
    "dpm++-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++-single": ("DPMSolverSinglestepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2-a": ("KDPM2AncestralDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}

# what the same names are on models of flow matching: classes of diffusers, or of ours
FLOW_SCHEDULERS = {"euler": "FlowMatchEulerDiscreteScheduler", "heun": "FlowMatchHeunScheduler"}

# schedulers that were made here, and the configuration they were made from: a name does not inherit from another one
_MADE_FROM: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def check_scheduler(name: str) -> None:
    """Raise `ConfigurationError` if `name` is neither a short name nor a diffusers class name, or has a spacing behind
    a comma ("dpm++,lu") that is none of `SPACINGS` or that the scheduler does not offer."""
    short, comma, spacing = name.partition(",")
    if short in SCHEDULERS or (short.endswith("Scheduler") and short.isidentifier()):
        if comma:
            check_spacing(short, SCHEDULERS.get(short, (short,))[0], spacing)
        return
    if is_learned(name):
        return check_learned(name)
    near = nearest(short, [*SCHEDULERS, LEARNED])
    hint = f"did you mean {near!r}? " if near else ""
    raise ConfigurationError(
        f"unknown scheduler {name!r}; {hint}allowed: {', '.join(SCHEDULERS)}, {LEARNED}, a diffusers class name, "
        "these with a spacing behind a comma if wanted (dpm++,lu), or the folder or file of a saved learned solver"
    )


def is_file(name: str) -> bool:
    """Whether the name of a scheduler is the file or folder of a saved one."""
    return name.partition(",")[0] not in SCHEDULERS and name != LEARNED and is_learned(name)


def check_steps(name: str | None, source: ModelSource, steps: int | None) -> None:
    """Raise `ConfigurationError` if a scheduler cannot do so many steps of a model, before that is loaded.

    Args:
        name: of the scheduler; None: the model's own.
        source: the model.
        steps: of a call; None: they are not known, only whether there is such a scheduler.
    """
    if name is not None and name not in SCHEDULERS and is_learned(name):
        check_learned(name, source, steps)
    elif name is None and steps is not None:
        check_own(source, steps)


def most_steps(name: str | None, source: ModelSource) -> int | None:
    """The most steps that a scheduler was learnt for, which are those of a call that names none; None: any number.

    Args:
        name: of the scheduler; None: the model's own.
        source: the model.

    Raises:
        ConfigurationError: there is no such learned solver.
    """
    if name is None:
        return max(own_evaluations(source), default=None)
    learned = name not in SCHEDULERS and is_learned(name)
    return max(learnt_evaluations(name, source), default=None) if learned else None


def not_learnt_here(pipe: DiffusionPipeline, steps: int) -> str | None:
    """Why a pipeline's scheduler, a learned one, cannot do so many steps; None if it can."""
    evaluations = getattr(pipe.scheduler, "evaluations", None)
    return None if evaluations is None else not_learnt(evaluations, steps)


def set_scheduler(pipe: DiffusionPipeline, name: str) -> None:
    """Give `pipe` the scheduler `name`, configured like the one it was loaded with; see `scheduler_for`."""
    pipe.scheduler = scheduler_for(pipe, name)


def scheduler_for(pipe: DiffusionPipeline, name: str) -> Any:
    """The scheduler `name`, configured like the one that `pipe` has, which keeps its own.

    If that one was given by name, too, this one is configured like the one before it: what a name changes (a spacing,
    stochastic steps) is not inherited.

    Args:
        pipe: a loaded pipeline.
        name: a short name or a diffusers class, with another spacing of its steps behind a comma if wanted: "dpm++,lu".

    Raises:
        ConfigurationError: the name is unknown, or that scheduler does not fit the model.
    """
    import diffusers  # heavy: diffusers

    from diffusion_accel.noise_level import matches_flow  # heavy: torch

    check_scheduler(name)
    if name not in SCHEDULERS and is_learned(name):
        return learned_for(pipe, name)
    name, _, spacing = name.partition(",")
    flow = FLOW_SCHEDULERS if matches_flow(pipe.scheduler) else {}
    names = SCHEDULERS | {n: (c, {}) for n, c in flow.items()}
    class_name, changes = names.get(name, (name, {}))
    cls = getattr(diffusers, class_name, None) or getattr(schedulers, class_name, None)
    fitting = {c.__name__ for c in pipe.scheduler.compatibles} | {type(pipe.scheduler).__name__, *flow.values()}
    if cls is None or (class_name not in fitting and name != "lcm"):
        short = [n for n, (c, _) in names.items() if c in fitting]
        raise ConfigurationError(
            f"scheduler {name!r} does not fit this model ({type(pipe.scheduler).__name__}); "
            f"fitting: {', '.join(short or sorted(fitting))}"
        )
    if spacing:
        changes = changes | spacing_changes(name, cls, spacing)
    origin = _MADE_FROM.get(pipe.scheduler, pipe.scheduler.config)
    try:
        made = cls.from_config(origin, **changes)
    except (ImportError, ValueError) as error:
        raise ConfigurationError(f"scheduler {name!r} cannot be used: {first_line(error)}") from error
    _MADE_FROM[made] = origin
    return made
