"""Heun's method for models of flow matching, with the noise levels of the Euler scheduler in its place.

diffusers' own FlowMatchHeunDiscreteScheduler has levels of its own and takes neither `sigmas` nor `mu`, which pipelines
such as Flux always give.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput


class FlowMatchHeunScheduler(FlowMatchEulerDiscreteScheduler):
    """Heun's method: each step but the last is one of Euler's, then one by the mean of the velocities at its two ends.

    n steps are 2n − 1 evaluations, at the levels of n steps of Euler's. Its configuration is that of
    `FlowMatchEulerDiscreteScheduler`.
    """

    __module__ = __package__  # a model_index.json gets this name
    timesteps: torch.Tensor
    sigmas: torch.Tensor
    order = 2
    begun: tuple[torch.Tensor, torch.Tensor] | None = None  # the sample and the velocity where the step begins

    @functools.wraps(FlowMatchEulerDiscreteScheduler.set_timesteps, assigned=())  # pipelines look at its parameters
    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """As of the Euler scheduler; then each but the first timestep is there twice."""
        super().set_timesteps(*args, **kwargs)
        self.timesteps = _twice(self.timesteps)
        self.sigmas = torch.cat([_twice(self.sigmas[:-1]), self.sigmas[-1:]])
        self.begun = None

    def step(  # type: ignore[override]
        self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, return_dict: bool = True
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[torch.Tensor]:
        """One evaluation further.

        Args:
            model_output: the velocity ε − x0, of the shape of `sample`.
            timestep: of the scheduler's `timesteps`.
            sample: (1 − σ) · x0 + σ · ε.
            return_dict: return an object rather than a tuple.
        """
        (moved,) = super().step(model_output, timestep, sample, return_dict=False)
        if self.begun is None:
            self.begun = sample.float(), model_output
        else:
            at = self.step_index - 1  # of this evaluation: the step above has counted it
            (start, first), self.begun = self.begun, None
            moved = start + (self.sigmas[at] - self.sigmas[at - 1]) * (first + model_output) / 2
            moved = moved.to(model_output.dtype)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=moved) if return_dict else (moved,)


def _twice(values: torch.Tensor) -> torch.Tensor:
    return torch.cat([values[:1], values[1:].repeat_interleave(2)])
