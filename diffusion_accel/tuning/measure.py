"""What the tuner measures of a pipeline: the baseline, its predictions, and what a step of each kind costs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from diffusion_accel.conditioning import own_arguments
from diffusion_accel.denoisers import guided, no_branches
from diffusion_accel.errors import UnsupportedPipelineError
from diffusion_accel.hooks import call_arguments
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.measure.timing import seconds_of
from diffusion_accel.prediction import model_input
from diffusion_accel.progress import Progress
from diffusion_accel.reuse.plan import FULL, Plan, PlanSource, Step
from diffusion_accel.reuse.recorded import forecasts_of
from diffusion_accel.reuse.reuse import Reuse
from diffusion_accel.reuse.search import Forecasts
from diffusion_accel.steps import StepClock
from diffusion_accel.switchboard import accelerate

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

PROBES = 12  # steps at which the influence is measured, along the trajectory
ENDING = 4  # and all of the last ones, where it changes quickly
CONDITIONAL = Step(order=1, guidance="reuse")


@dataclass(frozen=True)
class Costs:
    """Times as parts of the baseline's: `fixed` for everything that no plan saves, and what each kind of step adds."""

    fixed: float
    steps: dict[str, float]

    def time(self, plan: Plan) -> float:
        """What a call with this plan takes, 1 being the baseline's."""
        return self.fixed + sum(self.steps[kind(step)] for step in plan.steps)

    def speedup(self, plan: Plan) -> float:
        """How many times as fast as the baseline a call with this plan is."""
        return 1 / self.time(plan)


def kind(step: Step) -> str:
    """The kind of a step by what it costs; the order of a forecast costs next to nothing."""
    half = step.guidance != "both" and step.mode != "hold"
    return str(replace(step.unfitted(), order=0, space="", guidance="reuse" if half else "both"))


@dataclass(frozen=True)
class Reference:
    """The baseline that everything is compared with.

    Attributes:
        sampler: calls it, for the calibration prompts.
        heldout: the same with prompts that the search does not see.
        scheduler: its scheduler.
        images: of the calibration prompts, (N, 3, H, W) in 0..1.
    """

    sampler: Sampler
    heldout: Sampler
    scheduler: Any
    images: torch.Tensor

    @classmethod
    def measure(cls, sampler: Sampler, heldout: Sampler) -> Reference:
        """Draw the images of the pipeline as it is, with its own scheduler."""
        return cls(sampler, heldout, sampler.pipe.scheduler, sampler.images())


@dataclass(frozen=True)
class Observations:
    """All that a search knows of a pipeline before it tries a plan.

    Attributes:
        forecasts: what the baseline's predictions say, one for each space.
        costs: what a step of each kind costs.
        unguided: why no plan leaves a branch of guidance out; empty if some do.
    """

    forecasts: list[Forecasts]
    costs: Costs
    unguided: str = ""

    @classmethod
    def measure(cls, sampler: Sampler, reference: Reference, progress: Progress) -> Observations:
        """The predictions at every step, and what a step of each kind costs."""
        progress("predictions", 0.0)
        forecasts = measure_forecasts(sampler, lambda: progress("influence of the steps", 0.0))
        unguided = why_unguided(sampler)
        total = len(forecasts[0].times)
        costs = measure_costs(sampler, reference, total, not unguided, lambda: progress("costs", 0.0))
        return cls(forecasts, costs, unguided)

    @property
    def total(self) -> int:
        """How many steps a call has."""
        return len(self.forecasts[0].times)

    @property
    def times(self) -> list[float]:
        """The timestep of each step."""
        return self.forecasts[0].times

    @property
    def guided(self) -> bool:
        """Whether plans may leave a branch of guidance out."""
        return not self.unguided


def why_unguided(sampler: Sampler) -> str:
    """Why a search for these calls leaves no branch of guidance out; empty if it does. Asked after such a call."""
    pipe = sampler.pipe
    least = {"guidance_scale": min(sampler.scales)} if sampler.scales else {}
    arguments = call_arguments(type(pipe).__call__, (), own_arguments(pipe, sampler.options | least))
    if reason := no_branches(pipe):
        return reason
    return "" if guided(pipe, arguments) else "these calls use no guidance"


def measure_costs(sampler: Sampler, reference: Reference, total: int, guided: bool, tell: Callable[[], None]) -> Costs:
    """From whole calls of one image: all steps full, all but the first held, all but the first half.

    In turn with calls of the baseline: what slows down the machine for a while slows down all of them.
    """
    rest = total - 1
    plans = {"full": Plan((FULL,) * total), "hold": Plan((FULL, *(Step("hold"),) * rest))}
    if guided:
        plans["full/reuse"] = Plan((FULL, *(CONDITIONAL,) * rest))
    one, base = sampler.part(0, 1), reference.sampler.part(0, 1)
    parts: dict[str, list[float]] = {name: [] for name in plans}
    for turn in range(4):
        with scheduling(sampler.pipe, reference.scheduler):
            whole = seconds_of(base.images)
        for name, plan in plans.items():
            tell()
            with reusing(sampler.pipe, plan):
                part = seconds_of(one.images) / whole
                if turn:  # the first warms up
                    parts[name].append(part)
    took = {name: statistics.median(values) for name, values in parts.items()}
    each = {name: max(0.0, (took[name] - took["hold"]) / rest) for name in plans}
    return Costs(took["hold"] - each["full"], each)


def measure_forecasts(sampler: Sampler, tell: Callable[[], None]) -> list[Forecasts]:
    """What the predictions of the baseline say, in every space that the scheduler allows."""
    predictions, inputs, times = record(sampler)
    influence = measure_influence(sampler, predictions, tell)
    return forecasts_of(sampler.pipe.scheduler, predictions, inputs, times, influence)


def measure_influence(sampler: Sampler, predictions: torch.Tensor, tell: Callable[[], None]) -> np.ndarray:
    """How much the images change, root mean square, for a change of the prediction at one step by 1: (steps,).

    Measured by holding the prediction before it, so that what the later steps make of the change is in it: they correct
    much of what happens early. At `PROBES` steps and the last ones, and between them by interpolation.
    """
    total = len(predictions)
    few = sampler.part(0, min(4, len(sampler.prompts)))
    spread = {round(i) for i in np.linspace(1, total - 1, min(PROBES, total - 1))}
    places = sorted(spread | set(range(max(1, total - ENDING), total)))
    base, found = few.images(), []
    for i in places:
        tell()
        with reusing(few.pipe, Plan(tuple(Step("hold") if j == i else FULL for j in range(total)))):
            moved = (few.images() - base).pow(2).mean().sqrt()
        changed: torch.Tensor = (predictions[i] - predictions[i - 1])[: len(base)].pow(2).mean().sqrt()
        found.append(float(moved / changed.clamp(min=1e-8)))
    return np.exp(np.interp(np.arange(total), places, np.log(np.maximum(found, 1e-8))))


@contextmanager
def reusing(pipe: DiffusionPipeline, plan: PlanSource) -> Iterator[None]:
    """Within this context the pipeline reuses by one plan; after it everything is as it was before."""
    handle = getattr(pipe, "acceleration", None)
    before = None if handle is None else handle.features.get("reuse")
    enabled = handle is not None and handle.enabled("reuse")
    accelerate(pipe, Reuse(plan=plan))  # type: ignore[arg-type]
    try:
        yield
    finally:
        if handle is None:
            pipe.acceleration.remove()
        elif before is None:
            pipe.acceleration.remove("reuse")
        else:
            accelerate(pipe, before)
            if not enabled:
                pipe.acceleration.disable("reuse")


@contextmanager
def not_reusing(pipe: DiffusionPipeline) -> Iterator[None]:
    """Within this context the pipeline computes every step, whatever plan it has otherwise."""
    handle: Any = getattr(pipe, "acceleration", None)
    on = handle is not None and handle.enabled("reuse")
    if on:
        handle.disable("reuse")
    try:
        yield
    finally:
        if on:
            handle.enable("reuse")


@contextmanager
def scheduling(pipe: DiffusionPipeline, scheduler: SchedulerMixin) -> Iterator[None]:
    """Within this context the pipeline has another scheduler."""
    before = pipe.scheduler
    pipe.scheduler = scheduler
    try:
        yield
    finally:
        pipe.scheduler = before


def record(sampler: Sampler) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """What the scheduler is given at every step, prediction and latents as the denoiser sees them, and the timesteps.

    Both are (steps, images, values) in float32.
    """
    clock = StepClock(sampler.pipe)
    seen: list[torch.Tensor] = []

    def note(named: dict[str, Any]) -> None:
        x = model_input(clock.scheduler, named["sample"], named["timestep"])
        predicted = named["model_output"]
        if predicted.shape[1] > x.shape[1]:
            predicted = predicted[:, : x.shape[1]]  # a learned variance behind it
        seen.append(torch.stack([v.detach().float().cpu().flatten(1) for v in (predicted, x)]))

    parts = []
    clock.on_step(before=note)
    for start, end in sampler.chunks():
        seen.clear()
        clock.start([])
        try:
            sampler.call(start, end)
        finally:
            clock.stop()
        parts.append(torch.stack(seen, 1))
    times = [float(t) for t in sampler.pipe.scheduler.timesteps]
    predictions, inputs = torch.cat(parts, 2)
    if len(predictions) != len(times):
        raise UnsupportedPipelineError(
            f"{type(sampler.pipe).__name__} calls its scheduler {len(predictions)} times for {len(times)} timesteps"
        )
    return predictions, inputs, times
