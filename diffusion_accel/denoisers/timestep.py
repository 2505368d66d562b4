"""What a denoiser is told of the scheduler's timesteps."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import TYPE_CHECKING

import torch
from torch import nn

from diffusion_accel.hooks import model_of
from diffusion_accel.noise_level import matches_flow

from .families import UNITS, Moment, Unit, family_of, model_family
from .find import find_denoiser

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

_TIME_ARGUMENTS = ("timestep", "timesteps", "t")


def time_argument(names: Container[str]) -> str | None:
    """Which of a denoiser's arguments is the timestep; None if none of them is."""
    return next((name for name in _TIME_ARGUMENTS if name in names), None)


def told(pipeline: DiffusionPipeline, scheduler: SchedulerMixin, unit: Unit) -> list[float]:
    """What the denoiser is told at each of the scheduler's timesteps, in a unit of `UNITS` or by a function."""
    timesteps = [float(t) for t in scheduler.timesteps.tolist()]
    sigmas = getattr(scheduler, "sigmas", None)
    known = [float(s) for s in sigmas.tolist()] if isinstance(sigmas, torch.Tensor) else []
    known += [math.nan] * (len(timesteps) - len(known))
    training = float(getattr(scheduler, "config", {}).get("num_train_timesteps", 1000))
    scale = getattr(getattr(find_denoiser(pipeline), "config", None), "timestep_scale", None) or 1.0
    tell = UNITS[unit] if isinstance(unit, str) else unit
    return [tell(Moment(t, s, training, scale)) for t, s in zip(timesteps, known, strict=False)]


def timestep_kind(pipeline: DiffusionPipeline, denoiser: nn.Module) -> str:
    """What a denoiser is told by its pipeline: "index" (0 ... 999), "flow" (0 ... 1000) or "unit" (0 ... 1)."""
    family = model_family(type(model_of(denoiser)))
    if "t/1000" in (family_of(pipeline).time, family.time if family is not None else ""):
        return "unit"
    return "flow" if matches_flow(pipeline.scheduler) else "index"
