"""What a denoiser predicts, and the same said in other words: noise, clean sample, velocity.

x = α·x0 + σ·ε, with α and σ from the noise schedule at a timestep. A forecast of ε or x0 becomes a prediction with the
latents as they are now, so it corrects itself where a forecast of the velocity cannot.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from .noise_level import counts_by_sigma, matches_flow

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

SPACES = ("epsilon", "sample")
_LEAST = 1e-4


class Conversion:
    """Between the prediction type of a scheduler and noise ("epsilon") or clean sample ("sample").

    Args:
        scheduler: whose timesteps count.
        negated: whether the predictions are the opposite of what the scheduler is given.
    """

    def __init__(self, scheduler: SchedulerMixin, negated: bool = False) -> None:
        config = getattr(scheduler, "config", {})
        self.scheduler, self.negated = scheduler, negated
        self.flow = matches_flow(scheduler)
        self.kind = "flow" if self.flow else config.get("prediction_type", "epsilon")
        self.training = float(config.get("num_train_timesteps", 1000))
        table = getattr(scheduler, "alphas_cumprod", None)
        self.table: list[float] = [] if table is None or self.flow else torch.as_tensor(table).tolist()
        self.inverted = bool(config.get("invert_sigmas"))
        self.by_sigma = counts_by_sigma(scheduler)
        self._sigmas: tuple[Any, dict[float, float]] = (None, {})

    @property
    def possible(self) -> bool:
        """Whether α and σ are known and the prediction is one of epsilon, sample, v_prediction and flow."""
        if self.flow:
            return not self.inverted
        return bool(self.table) and self.kind in ("epsilon", "sample", "v_prediction")

    def coefficients(self, timestep: float) -> tuple[float, float]:
        """α and σ at a timestep, which need not be a whole number."""
        if self.flow:
            sigma = min(1.0, max(0.0, self._sigma(timestep, timestep / self.training)))
            return max(_LEAST, 1 - sigma), max(_LEAST, sigma)
        if self.by_sigma:
            return _scaled(self._sigma(timestep, math.exp(min(4 * timestep, 50.0))))
        low = min(len(self.table) - 1, max(0, math.floor(timestep)))
        high, share = min(len(self.table) - 1, low + 1), max(0.0, timestep - low)
        ratios = [math.sqrt((1 - self.table[i]) / max(self.table[i], 1e-12)) for i in (low, high)]
        ratio = ratios[0] + share * (ratios[1] - ratios[0])  # σ/α, interpolated as sigma schedulers do
        return _scaled(ratio)

    def _sigma(self, timestep: float, otherwise: float) -> float:
        """σ at one of the scheduler's timesteps: it need not follow from them (CogView 4 shifts σ only)."""
        times, sigmas = getattr(self.scheduler, "timesteps", None), getattr(self.scheduler, "sigmas", None)
        if isinstance(times, torch.Tensor) and isinstance(sigmas, torch.Tensor) and times is not self._sigmas[0]:
            self._sigmas = (times, dict(zip(times.tolist(), sigmas.tolist(), strict=False)))
        return self._sigmas[1].get(timestep, otherwise)

    def to(self, space: str, value: torch.Tensor, x: torch.Tensor, timestep: float) -> torch.Tensor:
        """A prediction in another space; `x` is what the denoiser was given, in at least as many channels."""
        own = -value if self.negated else value
        return self._map(own, x, timestep, lambda v, x, a, s: converted(space, self.kind, v, x, a, s))

    def back(self, space: str, value: torch.Tensor, x: torch.Tensor, timestep: float) -> torch.Tensor:
        """The inverse of `to`, with the latents as they are now."""
        own = self._map(value, x, timestep, lambda v, x, a, s: _from(space, self.kind, v, x, a, s))
        return -own if self.negated else own

    def slope(self, space: str, timestep: float) -> float:
        """How much the value in another space changes with the prediction, at given latents."""
        alpha, sigma = self.coefficients(timestep)
        one, zero = (converted(space, self.kind, value, 0.0, alpha, sigma) for value in (1.0, 0.0))
        return one - zero

    def _map(self, value: torch.Tensor, x: torch.Tensor, timestep: float, fn: Any) -> torch.Tensor:
        alpha, sigma = self.coefficients(timestep)
        if value.shape == x.shape:
            return fn(value, x, alpha, sigma)
        if value.dim() == x.dim() and value.shape[1] < x.shape[1]:  # inpainting: latents, mask, masked latents
            return fn(value, x[:, : value.shape[1]], alpha, sigma)
        own, rest = value.split([x.shape[1], value.shape[1] - x.shape[1]], 1)  # a learned variance behind it
        return torch.cat([fn(own, x, alpha, sigma), rest], 1)


def model_input(scheduler: SchedulerMixin, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
    """The scheduler's latents as the denoiser sees them; most schedulers of flow matching scale nothing."""
    scale = getattr(scheduler, "scale_model_input", None)
    return sample if scale is None else scale(sample, timestep)


def _scaled(ratio: float) -> tuple[float, float]:
    """α and σ with α² + σ² = 1 from σ/α."""
    alpha = 1 / math.sqrt(1 + ratio**2)
    return max(_LEAST, alpha), max(_LEAST, ratio * alpha)


def converted(space: str, kind: str, v: Any, x: Any, a: Any, s: Any) -> Any:
    """A prediction in another space.

    Args:
        space: "epsilon" (the noise) or "sample" (what is clean).
        kind: what `v` is: one of these, "v_prediction" (a·ε − s·x0) or "flow" (ε − x0).
        v: the prediction, tensor or number.
        x: the noisy sample, a·x0 + s·ε, of the same kind.
        a, s: α and σ, numbers or of a shape that broadcasts.
    """
    if kind == space:
        return v
    if kind == "v_prediction":
        return a * v + s * x if space == "epsilon" else a * x - s * v
    if kind == "flow":
        return x + a * v if space == "epsilon" else x - s * v
    return (x - a * v) / s if space == "epsilon" else (x - s * v) / a


def _from(space: str, kind: str, value: torch.Tensor, x: torch.Tensor, a: float, s: float) -> torch.Tensor:
    if kind == space:
        return value
    if kind == "v_prediction":
        return (value - s * x) / a if space == "epsilon" else (a * x - value) / s
    if kind == "flow":
        return (value - x) / a if space == "epsilon" else (x - value) / s
    return (x - s * value) / a if space == "epsilon" else (x - a * value) / s
