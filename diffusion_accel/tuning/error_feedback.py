"""The error-feedback fit: a plan whose steps make up for the errors of those before them.

The calibration images are rolled out under the plan. At a step the scheduler's update is affine in the prediction, so
with two probes on a copy of the scheduler, f0 = step(0) and f1 = step(1), the prediction that lands on the baseline's
next latents is (wanted − f0) / (f1 − f0). The combination of what there is, predictions and latents of the last full
steps and the latents now, is fitted towards it; the rollout goes on with what it gives. Steps that are computed are
corrected in the same way.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from diffusion_accel.prediction import Conversion, converted, model_input
from diffusion_accel.reuse.plan import Plan, Step

from .fits import combination, fitted
from .jumps import ORDER, Seen, Trajectory, evaluated, step_of
from .replay import Recording, Replay
from .together import ALONE, Together

_UNEVEN = 1e-3  # relative; a step that differs more between values is not affine in the prediction
_FLAT = 1e-9  # a step that answers to the prediction less does not answer at all


class Rollout:
    """The calibration images under a plan, with the scheduler's own steps.

    Attributes:
        replay: the denoiser with guidance.
        recording: the baseline, whose latents are what is wanted.
        images: which images are rolled out.
        together: the processes that do so, each with images of its own.
        apart: whether fits may use what guidance adds.
    """

    def __init__(
        self,
        replay: Replay,
        recording: Recording,
        trajectory: Trajectory,
        images: Sequence[int],
        together: Together = ALONE,
        apart: bool = False,
    ) -> None:
        self.together, self.apart = together, apart
        self.replay, self.recording, self.trajectory, self.images = replay, recording, trajectory, list(images)
        self.scheduler: Any = copy.deepcopy(recording.scheduler)
        self.conversion = Conversion(self.scheduler)
        self.sample = recording.samples[0][self.images].float()
        self.seen = Seen()

    def plan(self, nodes: Sequence[int]) -> Plan:
        """The plan with these full steps, the first of which is 0; ~n: with the conditional branch only."""
        full, total = {step_of(node): node for node in nodes}, len(self.recording)
        steps = []
        for i in range(total):
            lands = i + 1 == total or i + 1 in full
            steps.append(self._step(i, full.get(i), lands))
        return Plan(tuple(steps))

    def _step(self, i: int, node: int | None, lands: bool) -> Step:
        """Make one step. What lands on the next full one is fitted by channel, others alike for all channels."""
        own, time = self.trajectory, self.scheduler.timesteps[i]
        a, s = own.alphas[i], own.sigmas[i]
        x = model_input(self.scheduler, self.sample, time)
        if node is not None:
            known = self.seen.differences
            self.seen = self.seen.then(*evaluated(self.replay, own, node, x, self.images, self.apart, known))
            latents = list(self.seen.latents)
        else:
            latents = [x, *self.seen.latents]
        clean, additions = list(self.seen.clean), list(self.seen.additions)
        wanted = self._wanted(i, time, x)
        fit = None
        if wanted is not None:
            features = [*clean, *latents, *additions]
            centre = [1.0] + [0.0] * (len(features) - 1)
            goal = converted("sample", own.kind, wanted, x, a, s)
            alike = own.alike or not lands
            weights = fitted(features, goal, centre, alike, self.together, self.images)
            fit = combination(weights, len(clean), len(latents))
        value = clean[0] if fit is None else fit.apply(clean, latents, additions)
        self.sample = self._made(self.scheduler, i, time, self.conversion.back("sample", value, x, float(time)))
        if node is None:
            return Step("hold", space="sample", fit=fit)
        space = "sample" if fit else ""
        return Step(space=space, fit=fit) if node >= 0 else Step(space=space, fit=fit, order=ORDER, guidance="reuse")

    def _wanted(self, i: int, time: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
        """The prediction that lands where the baseline is after this step; None if none does."""
        total, goals = len(self.recording), self.recording
        goal = (goals.samples[i + 1] if i + 1 < total else goals.result)[self.images].float()
        zero, one = (
            self._made(copy.deepcopy(self.scheduler), i, time, torch.full_like(x, value)) for value in (0.0, 1.0)
        )
        slope = one - zero
        mean = slope.mean()
        off = bool(slope.numel()) and (
            abs(float(mean)) < _FLAT or float((slope - mean).abs().max()) > _UNEVEN * abs(float(mean))
        )
        if self.together.total(torch.tensor(float(off))) > 0:
            return None
        return (goal - zero) / mean

    def _made(self, scheduler: Any, i: int, time: torch.Tensor, prediction: torch.Tensor) -> torch.Tensor:
        extra = dict(self.recording.extra)
        if self.recording.draws:
            extra["generator"] = [_generator(self.recording.draws[i][image]) for image in self.images]
        return scheduler.step(prediction, time, self.sample, **extra, return_dict=False)[0]


def _generator(state: torch.Tensor) -> torch.Generator:
    generator = torch.Generator()
    generator.set_state(state)
    return generator
