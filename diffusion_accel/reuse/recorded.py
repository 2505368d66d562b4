"""What one call in full says about plans: its predictions, how well they can be forecast, how much an error matters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from diffusion_accel.prediction import SPACES, Conversion

from .plan import Plan
from .search import Forecasts, Rule, best_plans

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from diffusion_accel.steps import StepClock

ROWS = 4  # images of a batch that are recorded
VALUES = 2**14  # of each image, evenly spaced
STEPS = 4  # fewer are not worth a plan
SEARCHED = 150  # steps up to which the places of full ones are searched
RULES = (Rule(1), Rule(2), Rule(1, True), Rule(2, True))


class Recording:
    """The predictions of a call that computes every step, as the scheduler gets them, and the latents before each."""

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock
        self.segment = clock.segment
        self.times = list(clock.timesteps)
        self.predictions: list[torch.Tensor] = []
        self.inputs: list[torch.Tensor] = []
        self.last = torch.zeros(0)

    def __call__(self, named: dict[str, Any]) -> None:
        """Note what `scheduler.step` is called with."""
        if self.clock.segment != self.segment or len(self.predictions) > len(self.times):
            return
        scheduler, x, predicted = self.clock.scheduler, named["sample"], named["model_output"]
        if hasattr(scheduler, "scale_model_input"):
            x = scheduler.scale_model_input(x, named["timestep"])
        if predicted.dim() == x.dim() and predicted.shape[1] > x.shape[1]:
            predicted = predicted[:, : x.shape[1]]  # a learned variance behind it
        self.predictions.append(_some(predicted))
        self.inputs.append(_some(x))

    def after(self, sample: torch.Tensor) -> torch.Tensor:
        """Note what a step leads to."""
        if self.clock.segment == self.segment:
            self.last = sample
        return sample

    @property
    def problem(self) -> str | None:
        """Why nothing can be learned from such calls; None if something can."""
        if len(self.predictions) > len(self.times):
            return f"the scheduler stepped more than {len(self.times)} times for as many timesteps"
        if len(self.times) < STEPS:
            return f"{len(self.times)} steps are too few to leave one out"
        if len({*self.times}) < len(self.times):
            return "the scheduler comes to the same timestep twice"
        if not Conversion(self.clock.scheduler).possible:
            return f"what a prediction means with {type(self.clock.scheduler).__name__} is not known"
        if any(v.shape != self.inputs[0].shape for v in self._all()):
            return "a prediction was not of the shape of the latents"
        return None

    @property
    def accident(self) -> str | None:
        """Why this call teaches nothing, though another one like it may; None if it does."""
        if len(self.predictions) < len(self.times):
            return f"the call stopped after {len(self.predictions)} of {len(self.times)} steps"
        if any(not bool(v.isfinite().all()) for v in self._all()):
            return "a prediction was not finite"
        return None

    def _all(self) -> list[torch.Tensor]:
        return [*self.predictions, *self.inputs]

    def search(self) -> Callable[[int], Plan | None]:
        """Plans by how many steps there are for each full one; only if there is no `problem` and no `accident`."""
        scheduler, total = self.clock.scheduler, len(self.times)
        if total > SEARCHED:
            return lambda _interval: None
        predictions, inputs = torch.stack(self.predictions), torch.stack(self.inputs)
        gained = influence(scheduler, predictions, inputs, self.times)
        forecasts = forecasts_of(scheduler, predictions, inputs, self.times, gained)
        found = best_plans(forecasts, -(-total // 2), RULES)
        return lambda interval: found.get(-(-total // interval))


def _some(tensor: torch.Tensor) -> torch.Tensor:
    """Some values of some rows, in float32 on the CPU: (rows, values)."""
    flat = tensor.detach()[:ROWS].flatten(1)
    step = -(-flat.shape[1] // VALUES)
    return flat[:, ::step].to("cpu", torch.float32, copy=True)


def influence(
    scheduler: SchedulerMixin, predictions: torch.Tensor, inputs: torch.Tensor, times: list[float]
) -> np.ndarray:
    """How much the last latents change, root mean square, for a change of the prediction at one step by 1.

    A change at one step is carried on by the first-order update between the noise levels, and what the denoiser makes
    of it at the later steps is known without running it: the derivative of its clean sample x0 is α/σ² · Cov(x0 | x)
    (Tweedie's formula for the second moment; Efron, JASA 2011), and the distance between its clean sample and the last
    one is about as large as that covariance. Near the end, where that distance says nothing any more, the derivative
    stays what it was; the last step passes on what it gets. On the embedded model it is the measured influence of the
    steps of DDIM, DPM-Solver++ and Euler but for a factor, within a third; a trained DiT corrects early errors less
    than it says, so plans that follow from it are tried beside others.

    Args:
        scheduler: of the call, with its timesteps.
        predictions: what it was given at each step, (steps, images, values).
        inputs: the latents as the denoiser sees them, of the same shape.
        times: the timesteps.

    Returns:
        (steps,), above 0.
    """
    conversion = Conversion(scheduler)
    levels = [conversion.coefficients(t) for t in times]
    clean = [conversion.to("sample", p, x, t) for p, x, t in zip(predictions, inputs, times, strict=True)]
    following = 0.0  # the most of the derivatives so far
    gains, updates = [], []
    for (a, s), (a1, s1), x0 in zip(levels, [*levels[1:], (1.0, 0.0)], clean, strict=True):
        following = max(following, min(1 / a, a / s**2 * float((x0 - clean[-1]).square().mean())))
        gains.append(following)
        updates.append((s1 / s, a1 - a * s1 / s))
    gains[-1] = 1.0
    after, found = 1.0, []
    for (kept, share), gain, time in reversed(list(zip(updates, gains, times, strict=True))):
        slope = 1.0 if conversion.kind == "sample" else abs(conversion.slope("sample", time))
        found.append(max(1e-12, abs(share) * slope * after))
        after *= abs(kept + share * gain)
    return np.array(found[::-1])


def forecasts_of(
    scheduler: SchedulerMixin,
    predictions: torch.Tensor,
    inputs: torch.Tensor,
    times: list[float],
    influence: np.ndarray,
) -> list[Forecasts]:
    """What recorded predictions say in every space that the scheduler allows; arguments as of `influence`."""
    conversion, found = Conversion(scheduler), []
    for space in ("", *SPACES) if conversion.possible else ("",):
        if space == conversion.kind:
            continue  # the prediction itself
        values, scale = predictions, np.ones(len(times))
        if space:
            pairs = zip(predictions, inputs, times, strict=True)
            values = torch.stack([conversion.to(space, p, x, t) for p, x, t in pairs])
            scale = np.array([conversion.slope(space, t) for t in times])
        products = functools.reduce(np.add, ((one @ one.T).numpy() for one in values.double().unbind(1)))
        found.append(Forecasts(times, products / values[0].numel(), influence / np.abs(scale), space))
    return found
