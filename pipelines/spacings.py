"""How a scheduler spaces its steps, by short names: everything that diffusers offers."""

from __future__ import annotations

import inspect
from typing import Any

from diffusion_accel.arguments import nearest
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import shown

_BY_TIMESTEPS = ("leading", "linspace", "trailing")
# short name -> the switch in a scheduler's configuration; at most one of them may be on
_SWITCHES = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
    "lu": "use_lu_lambdas",
}
#: the names of all spacings: of timesteps; of σ (Karras et al. 2022; evenly in log σ; Lee et al. 2024; Lu et al. 2022)
SPACINGS = (*_BY_TIMESTEPS, *_SWITCHES)
_BY_SIGMA = ("karras", "exponential", "beta")
# class -> the spacings that its configuration has, for those that have short names; the others are asked when loaded
TAKES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            "DDIMScheduler",
            "DDPMScheduler",
            "EulerAncestralDiscreteScheduler",
            "LCMScheduler",
            "PNDMScheduler",
        ),
        _BY_TIMESTEPS,
    ),
    **dict.fromkeys(
        (
            "DEISMultistepScheduler",
            "EulerDiscreteScheduler",
            "HeunDiscreteScheduler",
            "KDPM2AncestralDiscreteScheduler",
            "KDPM2DiscreteScheduler",
            "LMSDiscreteScheduler",
            "UniPCMultistepScheduler",
        ),
        (*_BY_TIMESTEPS, *_BY_SIGMA),
    ),
    "DPMSolverMultistepScheduler": SPACINGS,
    "DPMSolverSinglestepScheduler": _BY_SIGMA,
    "FlowMatchEulerDiscreteScheduler": _BY_SIGMA,
}


def check_spacing(scheduler: str, class_name: str, spacing: str) -> None:
    """Refuse a spacing that there is not, or that a scheduler does not offer, as far as its class is known by name.

    Args:
        scheduler: as it was named, for the message.
        class_name: of diffusers.
        spacing: one of `SPACINGS`.

    Raises:
        ConfigurationError: it is not.
    """
    if spacing not in SPACINGS:
        near = nearest(spacing[:100], SPACINGS)
        hint = f"did you mean {near!r}? " if near else ""
        raise ConfigurationError(f"unknown spacing {shown(spacing)}; {hint}allowed: {', '.join(SPACINGS)}")
    takes = TAKES.get(class_name, SPACINGS)
    if spacing not in takes:
        raise ConfigurationError(
            f"scheduler {scheduler!r} has no {spacing} spacing; it has: {', '.join(takes) or 'only its own'}"
        )


def spacing_changes(scheduler: str, cls: type, spacing: str) -> dict[str, Any]:
    """What a spacing changes in a scheduler's configuration: its own switch, and those of the other spacings off.

    A spacing of σ is one over all noise levels: Euler's and Heun's take the highest and the lowest from their
    timesteps, and "leading" ones would leave the noisiest out.

    Raises:
        ConfigurationError: the class has no such spacing.
    """
    known = inspect.signature(cls).parameters
    key = _SWITCHES.get(spacing, "timestep_spacing")
    if key not in known:
        has = [name for name in SPACINGS if _SWITCHES.get(name, "timestep_spacing") in known]
        raise ConfigurationError(
            f"scheduler {scheduler!r} has no {spacing} spacing; it has: {', '.join(has) or 'only its own'}"
        )
    changes: dict[str, Any] = {switch: switch == key for switch in _SWITCHES.values() if switch in known}
    if "timestep_spacing" in known:
        changes["timestep_spacing"] = spacing if key == "timestep_spacing" else "linspace"
    return changes
