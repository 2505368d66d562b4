"""`family:FILE`: a tuned family as an entry stands for a row of each of its plans."""

from __future__ import annotations

import dataclasses

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import shown
from diffusion_accel.reuse.plan_family import PlanFamily
from diffusion_accel.reuse.reuse import Reuse

KIND = "family"


def members_of(settings: str) -> list[str]:
    """What `reuse` takes for each plan of a family, the slowest first, with the settings behind the file.

    Args:
        settings: the family's file or "tuned:NAME", and settings of `Reuse` behind it.

    Raises:
        ConfigurationError: there is no such file, it holds one plan, or a choice is made among its plans.
    """
    if not settings:
        raise ConfigurationError("family takes the file of a tuned family, such as family:tuned:ddim")
    feature = Reuse.parse(settings)
    family = feature.object_of("plan")
    if not isinstance(family, PlanFamily):
        raise ConfigurationError(f"{shown(settings)} is no family of tuned plans; reuse:{settings} compares one plan")
    if feature.speedup is not None or feature.min_psnr is not None:
        raise ConfigurationError(
            f"family compares all plans of {shown(feature.plan)}; reuse:{settings} compares the one that is chosen"
        )
    changed = [(f.name, getattr(feature, f.name)) for f in dataclasses.fields(feature) if f.name != "plan"]
    usual = Reuse()
    behind = "".join(f",{name}={value}" for name, value in changed if value != getattr(usual, name))
    return [f"{plan.text}{behind}" for plan in family.members]
