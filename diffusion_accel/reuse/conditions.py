"""What a tuned plan is valid for, and how a pipeline differs from that."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from diffusion_accel.denoisers import find_denoisers, fingerprint, scale_argument
from diffusion_accel.io import printable, shown

from . import needs
from .plan_family import PlanFamily, load_shipped
from .plan_file import TunedPlan

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

_NEAR = 1.5  # times the guidance scale of the calibration: up to there docs/reuse.md has at most 3 dB lost
_OF_A_SCHEDULER = ("prediction_type", "timestep_spacing", "algorithm_type", "solver_order", "use_karras_sigmas")


def conditions(pipe: DiffusionPipeline, steps: int) -> dict[str, Any]:
    """What a plan depends on: the denoiser, its weights (None where they are offloaded to another place), the scheduler
    and the number of steps."""
    denoisers, scheduler = find_denoisers(pipe), pipe.scheduler
    config = getattr(scheduler, "config", {})
    return {
        "denoiser": _kind(denoisers),
        "weights": fingerprint(*denoisers),
        "scheduler": type(scheduler).__name__,
        "scheduler_config": {key: config[key] for key in _OF_A_SCHEDULER if key in config},
        "steps": steps,
    }


def supports(tuned: TunedPlan, pipe: DiffusionPipeline) -> str | None:
    """Why a pipeline cannot follow a tuned plan: what any plan needs, or another class of denoiser; None if it can."""
    return needs.unfollowable(pipe) or for_another_denoiser(tuned, find_denoisers(pipe)) or needs.supports(tuned, pipe)


def for_another_denoiser(tuned: TunedPlan, denoisers: Sequence[nn.Module]) -> str | None:
    """That a plan was tuned for another class of denoiser; None if it is for this one."""
    made_for = tuned.conditions.get("denoiser")
    if made_for == _kind(denoisers):
        return None
    name = made_for if isinstance(made_for, str) else "a model that it does not name"
    return f"the plan was tuned for {printable(name)[:80]}, this pipeline has {_kind(denoisers)}"


def check(tuned: TunedPlan, pipe: DiffusionPipeline, arguments: Mapping[str, Any]) -> None:
    """Log how a pipeline, or a call with `arguments`, differs from what a plan was tuned for, and what fits it."""
    _check_pipeline(tuned, pipe)
    if said := _of_another_call(pipe, tuned.conditions.get("call"), arguments):
        logger.warning("the plan was tuned with %s: what it was measured to keep does not hold here", said)


def _of_another_call(pipe: DiffusionPipeline, made_for: object, arguments: Mapping[str, Any]) -> str | None:
    """Which arguments of a call are too far from those of the calibration; None if none is.

    `eta` is the share of fresh noise in a step of DDIM (Song et al. 2021, equation 16): weights that were fitted
    without it know nothing of it.
    """
    if not isinstance(made_for, dict):
        return None
    noise, tuned_noise = arguments.get("eta"), made_for.get("eta", 0.0)
    if isinstance(noise, (int, float)) and noise != tuned_noise:
        return f"eta {shown(tuned_noise)} (here {noise:g})"
    name = scale_argument(pipe, arguments)
    scale, scales = arguments.get(name), made_for.get("guidance_scale")
    known = [one for one in (scales if isinstance(scales, list) else [scales]) if isinstance(one, (int, float))]
    if known and isinstance(scale, (int, float)) and scale > max(1.0, _NEAR * max(known)):
        return f"{name} {max(known):g} (here {scale:g})"
    return None


def _check_pipeline(tuned: TunedPlan, pipe: DiffusionPipeline) -> None:
    here = conditions(pipe, len(tuned.plan))
    for key, what in (("weights", "other weights"), ("scheduler", "another scheduler"), ("scheduler_config", "")):
        if here[key] == tuned.conditions.get(key) or here[key] is None:
            continue
        fitting = [f"{family} ({', '.join(family.names)})" for family in load_shipped().values() if _fits(family, here)]
        logger.warning(
            "the plan was tuned with %s (%s, here %s): what it was measured to keep does not hold here; %s",
            what or "other settings of the scheduler",
            shown(tuned.conditions.get(key)),
            shown(here[key]),
            f"plans for what is here: {', '.join(fitting)}" if fitting else "make one with diffusion-accel tune",
        )
        return


def _fits(family: PlanFamily, here: dict[str, Any]) -> bool:
    keys = ("denoiser", "weights", "scheduler", "scheduler_config")
    return all(here[key] == family.conditions.get(key) for key in keys)


def _kind(denoisers: Sequence[nn.Module]) -> str:
    return "+".join(type(denoiser).__name__ for denoiser in denoisers)
