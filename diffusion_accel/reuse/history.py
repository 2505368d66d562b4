"""What the last full steps left, and what it will be at another time: finite differences in the scheduler's time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from diffusion_accel.hooks import map_tensors, tensor_bytes, tensors_in


def weights(times: list[float], at: float) -> list[float]:
    """Lagrange weights: f(at) ≈ Σ wᵢ f(timesᵢ), exact for polynomials of degree len(times) − 1.

    The same as Newton's divided differences; the times must differ.
    """
    result = []
    for i, own in enumerate(times):
        weight = 1.0
        for j, other in enumerate(times):
            if j != i:
                weight *= (at - other) / (own - other)
        result.append(weight)
    return result


class History:
    """Values (a tensor, or tuples of tensors) of the last `size` full steps, the newest first."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.times: list[float] = []
        self.values: list[Any] = []

    def push(self, time: float, value: Any) -> None:
        """Keep a value. One of the same time replaces the older one (solvers that repeat a timestep)."""
        if time in self.times:
            i = self.times.index(time)
            del self.times[i], self.values[i]
        self.times.insert(0, time)
        self.values.insert(0, value)
        del self.times[self.size :], self.values[self.size :]

    def and_then(self, time: float, value: Any) -> History:
        """The same with one value more."""
        longer = History(self.size)
        longer.times, longer.values = list(self.times), list(self.values)
        longer.push(time, value)
        return longer

    def at(self, time: float, order: int, given: tuple[float, ...] = ()) -> Any:
        """The value at `time`, of degree `order` or of as many values as there are. Order 0 is the newest itself.

        With weights `given` their sum of the values instead, as long as there are so many.
        """
        count = min(order + 1, len(self.values))
        fitted = bool(given) and len(given) <= len(self.values)
        if count == 1 and not fitted:
            return self.values[0]
        shares = list(given) if fitted else weights(self.times[:count], time)
        parts = [tensors_in(value) for value in self.values[:count]]
        mixed = iter([_mix(shares, tensors) for tensors in zip(*parts, strict=True)])
        return map_tensors(lambda _: next(mixed), self.values[0])

    def __len__(self) -> int:
        return len(self.values)

    def bytes(self) -> int:
        """What the kept values hold."""
        return tensor_bytes(self.values)


@dataclass(frozen=True)
class GivenStep:
    """What a scheduler was given at a full step, for steps with a fit.

    Attributes:
        place: the pass over the timesteps, and the shapes: what the steps that follow must have in common with it.
        time: the scheduler's timestep.
        value: the prediction, after guidance.
        latents: as the denoiser is given them.
        addition: of guidance, `value` minus the conditional prediction; None if it is not known.
    """

    place: tuple[Any, ...]
    time: float
    value: torch.Tensor
    latents: torch.Tensor
    addition: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        """All that are kept."""
        return [tensor for tensor in (self.value, self.latents, self.addition) if tensor is not None]


def _mix(shares: list[float], tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    result = tensors[0] * shares[0]
    for share, tensor in zip(shares[1:], tensors[1:], strict=True):
        result.add_(tensor, alpha=share)
    return result
