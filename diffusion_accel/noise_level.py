"""How noisy the latents are at each of a scheduler's timesteps, in one unit for all of them.

The unit is the share of the training timesteps at which the latents are less noisy: 0 is clean, 1 is noise. For
schedulers that count in training timesteps that is timestep / num_train_timesteps; for those that count otherwise
(log σ, angles) the timestep that has their σ; for flow matching σ itself. A scheduler without a table of training
timesteps (EDM) takes Stable Diffusion's.
"""

from __future__ import annotations

import bisect
import functools
import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

# by the class of the scheduler or one of its base classes
_KINDS: dict[str, str] = {
    **dict.fromkeys(
        """
        CogVideoXDDIMScheduler CogVideoXDPMScheduler DDIMInverseScheduler DDIMParallelScheduler DDIMScheduler
        DDPMParallelScheduler DDPMScheduler DEISMultistepScheduler DPMSolverMultistepInverseScheduler
        DPMSolverMultistepScheduler DPMSolverSDEScheduler DPMSolverSinglestepScheduler EulerAncestralDiscreteScheduler
        EulerDiscreteScheduler HeunDiscreteScheduler KDPM2AncestralDiscreteScheduler KDPM2DiscreteScheduler LCMScheduler
        LMSDiscreteScheduler LearnedMultistepScheduler PNDMScheduler RePaintScheduler SASolverScheduler TCDScheduler
        UnCLIPScheduler UniPCMultistepScheduler VQDiffusionScheduler
        """.split(),
        "training",
    ),
    **dict.fromkeys(
        """
        FlowMapEulerDiscreteScheduler FlowMatchEulerDiscreteScheduler FlowMatchHeunDiscreteScheduler
        FlowMatchLCMScheduler HeliosDMDScheduler HeliosScheduler LTXEulerAncestralRFScheduler MiniMaxH3Scheduler
        PiflowScheduler
        """.split(),
        "flow",
    ),
    **dict.fromkeys(
        """
        CMStochasticIterativeScheduler CosineDPMSolverMultistepScheduler EDMDPMSolverMultistepScheduler
        EDMEulerScheduler ScoreSdeVeScheduler
        """.split(),
        "sigma",
    ),
    **dict.fromkeys(("DDPMWuerstchenScheduler", "IPNDMScheduler", "ScoreSdeVpScheduler"), "share"),
    "KarrasVeScheduler": "schedule",
    "SCMScheduler": "angle",
}


def _kind(scheduler: SchedulerMixin) -> str | None:
    kind = next((_KINDS[c.__name__] for c in type(scheduler).__mro__ if c.__name__ in _KINDS), None)
    config = getattr(scheduler, "config", {})
    if kind == "flow" and config.get("stages", 1) > 1:
        return None  # σ begins anew in every stage
    if kind == "training" and config.get("use_flow_sigmas"):
        return "flow"
    continuous = (config.get("timestep_type"), config.get("prediction_type")) == ("continuous", "v_prediction")
    if kind == "training" and (continuous or config.get("interpolation_type") == "log_linear"):
        return "sigma"  # Euler's timesteps are log(σ)/4, or do not have these σ in the table
    return kind


def matches_flow(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler is one of flow matching: x = (1 − σ)·x0 + σ·ε, and the model predicts ε − x0."""
    name, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    if name == "LearnedMultistepScheduler":
        return bool(config.get("flow"))
    of_flow = bool(config.get("use_flow_sigmas")) and config.get("prediction_type") == "flow_prediction"
    return of_flow or name.startswith("FlowMatch")


def counts_by_sigma(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler's timesteps do not say how noisy the latents are: its σ do."""
    return _kind(scheduler) == "sigma"


def unknown_noise_levels(scheduler: SchedulerMixin) -> str | None:
    """Why the noise levels of a scheduler are not known; None if they are."""
    return None if _kind(scheduler) else f"the noise levels of {type(scheduler).__name__} are not known to this toolkit"


def noise_levels(scheduler: SchedulerMixin) -> list[float]:
    """The noise level at each of the scheduler's timesteps, 0 … 1.

    Raises:
        ValueError: they are not known (see `unknown_noise_levels`).
    """
    kind, config = _kind(scheduler), getattr(scheduler, "config", {})
    if kind is None:
        raise ValueError(unknown_noise_levels(scheduler))
    times = [float(t) for t in scheduler.timesteps.tolist()]
    if kind == "training":
        found = [t / float(config.get("num_train_timesteps", 1000)) for t in times]
    elif kind == "share":
        found = times
    elif kind == "angle":
        found = [math.sin(t) / (math.cos(t) + math.sin(t)) for t in times]
    else:
        sigmas = _sigmas(scheduler, times)
        if kind == "flow":
            found = [1 - s for s in sigmas] if config.get("invert_sigmas") else sigmas
        else:
            found = [share_of(sigma, scheduler) for sigma in sigmas]
    return [min(1.0, max(0.0, level)) for level in found]


def _sigmas(scheduler: SchedulerMixin, times: list[float]) -> list[float]:
    """σ at each of the timesteps."""
    if (schedule := getattr(scheduler, "schedule", None)) is not None:
        return [float(schedule[int(t)]) for t in times]
    return [float(s) for s in scheduler.sigmas.tolist()[: len(times)]]


def share_of(sigma: float, scheduler: SchedulerMixin | None = None) -> float:
    """The share of the training timesteps whose σ/α is below `sigma`, interpolated in log σ as sigma schedulers do."""
    table = getattr(scheduler, "alphas_cumprod", None)
    ratios = _ratios(tuple(float(a) for a in table)) if table is not None else _stable_diffusion()
    if sigma <= ratios[0]:
        return 0.0
    high = bisect.bisect_left(ratios, sigma)
    if high >= len(ratios):
        return 1.0
    low = high - 1
    span = math.log(ratios[high] / ratios[low])
    return (low + (math.log(sigma / ratios[low]) / span if span else 0.0)) / len(ratios)


@functools.lru_cache(maxsize=8)
def _ratios(alphas_cumprod: tuple[float, ...]) -> list[float]:
    return [math.sqrt(max(1e-12, 1 - a) / max(1e-12, a)) for a in alphas_cumprod]


@functools.cache
def _stable_diffusion() -> list[float]:
    """σ/α at the 1,000 training timesteps of Stable Diffusion (scaled linear betas, 0.00085 … 0.012)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return _ratios(tuple((1 - betas).cumprod(0).tolist()))
