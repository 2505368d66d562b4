"""α and σ of a model's training at any timestep: of variance-preserving latents by diffusers' tables, or of a flow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import first_line, shown
from diffusion_accel.model_files.folders import TIMESTEPS_LIMIT
from diffusion_accel.prediction import Conversion

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

KINDS = ("epsilon", "v_prediction", "sample")
_ALIKE = 1e-4  # relative, of σ/α at a timestep, where two noise schedules are the same


class NoiseSchedule:
    """x = α·x0 + σ·ε at timesteps, which need not be whole numbers.

    Attributes:
        training: the number of training timesteps.
        flow: whether α = 1 − σ and timesteps are σ · `training`; else α² + σ² = 1.
        alphas_cumprod: diffusers' table, α² at each training timestep; None of a flow.
    """

    def __init__(self, training: object, flow: object, **betas: Any) -> None:
        if type(training) is not int or not 1 <= training <= TIMESTEPS_LIMIT:
            raise ConfigurationError(
                f"num_train_timesteps must be a whole number from 1 to {TIMESTEPS_LIMIT}, got {shown(training)}"
            )
        if not isinstance(flow, bool):
            raise ConfigurationError(f"flow must be true or false, got {shown(flow)}")
        self.training, self.flow = training, flow
        self.alphas_cumprod = None if flow else _alphas_cumprod(training, **betas)
        table = np.ones(1) if self.alphas_cumprod is None else self.alphas_cumprod.double().numpy()
        self._ratios = np.sqrt((1 - table) / table)  # σ/α

    def at(self, timesteps: Sequence[float]) -> tuple[list[float], list[float]]:
        """α and σ at each; σ/α is interpolated between training timesteps, as diffusers does."""
        if self.flow:
            sigmas = [min(1.0, max(0.0, t / self.training)) for t in timesteps]
            return [1 - s for s in sigmas], sigmas
        ratios = np.interp(timesteps, np.arange(len(self._ratios)), self._ratios)
        alphas = 1 / np.sqrt(1 + ratios**2)
        return [float(a) for a in alphas], [float(s) for s in alphas * ratios]

    def beside(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """α and σ of each sample, in the shape in which they are multiplied with samples; no device is waited for."""
        times = torch.as_tensor(timesteps, device=like.device).flatten().float()
        if self.flow:
            sigma = (times / self.training).clamp(0, 1)
            alpha = 1 - sigma
        else:
            ratios = torch.from_numpy(self._ratios).to(like.device, torch.float32)
            low = times.floor().long().clamp(0, len(ratios) - 1)
            high = (low + 1).clamp(max=len(ratios) - 1)
            ratio = torch.lerp(ratios[low], ratios[high], (times - low).clamp(0, 1))
            alpha = torch.rsqrt(1 + ratio**2)
            sigma = alpha * ratio
        shape = (-1, *(1,) * (like.dim() - 1))
        return alpha.view(shape), sigma.view(shape)

    def unlike(self, scheduler: SchedulerMixin, kind: str) -> str | None:
        """Why the model of a scheduler was trained otherwise; None if it was not.

        Args:
            scheduler: of the model.
            kind: what the model is to predict, see `prediction.converted`.
        """
        theirs, name = Conversion(scheduler), type(scheduler).__name__
        if (theirs.kind, theirs.flow) != (kind, self.flow):
            return f"it is for a model that predicts {kind}, {name} is for {theirs.kind}"
        if theirs.training != self.training:
            return f"it counts {self.training} training timesteps, {name} has {theirs.training:g}"
        ratios = [math.sqrt((1 - a) / max(a, 2.0**-24)) for a in theirs.table]
        if not self.flow and not (len(ratios) == self.training and np.allclose(ratios, self._ratios, rtol=_ALIKE)):
            return f"its noise schedule (betas) is not that of {name}"
        return None


def prediction_kind(given: object, flow: bool) -> str:
    """What a model predicts, by the name that `prediction.converted` has for it.

    Raises:
        ConfigurationError: it is none that such a model has.
    """
    if flow and given in (None, "flow", "flow_prediction"):
        return "flow"
    if not flow and given in (None, *KINDS):
        return str(given or "epsilon")
    allowed = "flow, with flow" if flow else f"{', '.join(KINDS)}, or flow with flow=True"
    raise ConfigurationError(f"prediction_type must be {allowed}, got {shown(given)}")


def _alphas_cumprod(training: int, *, trained_betas: Any = None, rescale_betas_zero_snr: bool, **given: Any) -> Any:
    """Diffusers' own table of ᾱ for a noise schedule."""
    betas = trained_betas.tolist() if isinstance(trained_betas, (np.ndarray, torch.Tensor)) else trained_betas
    if not isinstance(betas, list | tuple | None) or not isinstance(rescale_betas_zero_snr, bool):
        raise ConfigurationError("trained_betas must be a list of numbers, and rescale_betas_zero_snr true or false")
    numbers = [given["beta_start"], given["beta_end"]] if betas is None else betas
    right = all(isinstance(b, (int, float)) and not isinstance(b, bool) and 0 <= b < 1 for b in numbers)
    if not right or (betas is not None and len(betas) != training):
        what = "beta_start and beta_end" if betas is None else f"trained_betas ({training} of them)"
        raise ConfigurationError(f"{what} must be numbers from 0 to less than 1, got {shown(numbers)}")
    try:
        made = DPMSolverMultistepScheduler(
            num_train_timesteps=training,
            trained_betas=betas,
            rescale_betas_zero_snr=rescale_betas_zero_snr,
            **given,
        )
    except (NotImplementedError, ValueError, TypeError) as error:
        name = shown(given["beta_schedule"])
        raise ConfigurationError(f"beta_schedule {name} cannot be used: {first_line(error)}") from error
    return made.alphas_cumprod
