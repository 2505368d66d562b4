"""The tuner: searches the plan of a speed-up or of a fidelity for one pipeline, scheduler and number of steps."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from diffusion_accel.arguments import public, refuse_unknown
from diffusion_accel.conditioning import call_parameters
from diffusion_accel.errors import ConfigurationError, UnsupportedPipelineError
from diffusion_accel.io import shown
from diffusion_accel.measure.request import MAX_SEED, MOST_STEPS, listed, options_of, usual_steps, whole
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.progress import Progress, silent
from diffusion_accel.reuse.plan import FULL, Plan, Step
from diffusion_accel.reuse.plan_file import TunedPlan
from diffusion_accel.reuse.reuse import Reuse
from diffusion_accel.reuse.search import predicted_error, refitted

from .budget import Budget
from .families import find_families, starts
from .fit_weights import fit_weights, with_weights
from .measure import Observations, Reference, scheduling
from .neighbours import neighbour
from .result import tuned_plan
from .target import Target, one_target
from .trials import Trials

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

MANY, FEW = 20, 6  # families of plans that are tried: for a speed-up, and for each step towards a fidelity
USUAL_STEPS = 50  # of a pipeline that names no number of its own


class Tuner:
    """One search, for one scheduler and number of steps. `tune` is the simple way to use it.

    Attributes:
        trials: runs plans, and remembers how near each came.
        seen: what is known of the pipeline.
        target: what to reach.
        budget: how much time there is.
        families: plans to begin with.
        progress: called with what is being done, the share of the time budget that is used, and the seconds left.
    """

    def __init__(
        self,
        trials: Trials,
        seen: Observations,
        target: Target,
        budget: Budget,
        progress: Progress = silent,
    ) -> None:
        self.trials, self.seen, self.target, self.budget, self.progress = trials, seen, target, budget, progress
        self.families = find_families(seen)

    def search(self) -> Plan:
        """The best plan within the time budget.

        Raises:
            ConfigurationError: no plan of the families reaches the target.
        """
        if self.target.speedup is None:
            self.trials.resume(self.seen.total)
            best = self.cheapest(float(self.target.min_psnr or 0.0))
        else:
            limit = 1 / self.target.speedup
            first = self._within(limit)
            if not first:
                raise ConfigurationError(self._too_fast(self.target.speedup))
            self.trials.resume(self.seen.total)
            best = self.climb(first[:MANY], limit, self.budget.share(0.6))
        return self.with_fitted_weights(best, self.budget.share(1.0))

    def cheapest(self, floor: float) -> Plan:
        """The fastest plan whose median reaches the floor: first among the families, then with a search around them."""
        best = self._cheapest_of_the_families(floor)
        while self.budget.left() > 0:
            limit = self.seen.costs.time(best) * 0.999
            cheaper = self._within(limit)[:FEW]
            if not cheaper:
                break
            found = self.climb(cheaper, limit, self.budget.share(0.3), stop_at=floor)
            if self.trials.median(found, floor) < floor:
                found = self.with_fitted_weights(found, self.budget.share(0.3))
            if self.trials.median(found, floor) < floor:
                break
            best = found
        return best

    def climb(self, first: Sequence[Plan], limit: float, until: float, stop_at: float | None = None) -> Plan:
        """Hill climbing from the best of some plans, among plans of at most that time: the better one stays."""
        trials, forecasts, rng = self.trials, self.seen.forecasts, random.Random(0)
        best, score = self._best_of(first, until)
        failures, rejected, seen = 0, 0, set()
        before = predicted_error(best, forecasts, careful=False)
        while time.monotonic() < until and failures < 80 and rejected < 5000:
            if stop_at is not None and trials.median(best, stop_at) >= stop_at:
                break
            other = refitted(neighbour(best, rng, self.seen.guided, tuple(f.space for f in forecasts)), forecasts)
            hopeless = predicted_error(other, forecasts, careful=False) > 1.5 * before
            if hopeless or other == best or self.seen.costs.time(other) > limit or other in seen:
                rejected += 1
                continue
            seen.add(other)
            mean = trials.mean(other, score)
            failures = failures + 1 if mean <= score else 0
            if mean > score:
                best, score = other, mean
                before = predicted_error(best, forecasts, careful=False)
            self._tell(best, score)
        return best

    def with_fitted_weights(self, plan: Plan, until: float) -> Plan:
        """The plan with better weights, as long as there is time and they become better."""
        best, trials = plan, self.trials
        while time.monotonic() < until:
            weights = with_weights(best, self.seen.times)
            better = fit_weights(weights, trials.draw, trials.reference.images, lambda: time.monotonic() < until)
            if better is None or trials.mean(better) <= trials.mean(best) + 0.05:
                break
            best = better
            self._tell(best, trials.mean(best))
        return best

    def _within(self, limit: float) -> list[Plan]:
        return starts(self.families, self.seen, limit)

    def _too_fast(self, speedup: float) -> str:
        fastest = self.seen.costs.speedup(Plan((FULL, *(Step("hold"),) * (self.seen.total - 1))))
        return (
            f"no plan is {speedup:g} times as fast: what a plan cannot save limits it to {fastest:.1f} here (decoding, "
            "the scheduler's own steps)"
        )

    def _cheapest_of_the_families(self, floor: float) -> Plan:
        limits = sorted({self.seen.costs.time(plan) for plans in self.families for plan in plans})
        best: Plan | None = None
        low, high = 0, len(limits)
        while low < high and (best is None or self.budget.left() > 0):  # what is dearer is nearer, nearly always
            middle = (low + high) // 2
            some = self._within(limits[middle])[:FEW]
            found = next((plan for plan in some if self.trials.median(plan, floor) >= floor), None)
            if found is not None:
                best, high = found, middle
            else:
                low = middle + 1
        if best is None:
            raise ConfigurationError(f"no plan reaches {floor:g} dB on these prompts within the time budget")
        return best

    def _best_of(self, plans: Sequence[Plan], until: float) -> tuple[Plan, float]:
        best, score = plans[0], -1.0
        for plan in plans:
            if time.monotonic() > until and score > 0:
                break
            mean = self.trials.mean(plan, score)
            if mean > score:
                best, score = plan, mean
            self._tell(best, score)
        return best, score

    def _tell(self, plan: Plan, score: float) -> None:
        text = f"{self.trials.evaluated} plans, best {score:.1f} dB at {self.seen.costs.speedup(plan):.2f}x"
        self.progress(text, self.budget.used(), max(0.0, self.budget.left()))


@public
def tune(
    pipe: DiffusionPipeline,
    prompts: str | Sequence[str],
    *,
    steps: int | None = None,
    seed: int = 0,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    speedup: float | None = None,
    min_psnr: float | None = None,
    seconds: float = 600.0,
    batch: int = 8,
    state: str | Path | None = None,
    progress: Progress = silent,
    try_steps: tuple[int, ...] = (),
    try_schedulers: tuple[Any, ...] = (),
    **options: Any,
) -> TunedPlan:
    """Search the reuse plan of a pipeline: the best fidelity at a speed-up, or the highest speed-up at a fidelity.

        plan = tune(pipe, prompts, steps=50, speedup=2.0)
        plan.save(Path("fast.json"))
        accelerate(pipe, Reuse(plan=plan))

    The fidelity is the PSNR to the images of the same pipeline without reuse. Two thirds of the prompts calibrate,
    the others measure the result. For an unconditional pipeline prompts only count the images.

    Args:
        pipe: a loaded pipeline, with the scheduler that will be used.
        prompts: at least 6; 24 or more are recommended.
        steps: denoising steps of the calls that the plan is for, at least 4; None: the pipeline's own default.
        seed: image k starts from the noise of seed + k.
        guidance_scale, height, width: of those calls; None: the pipeline's own default.
        speedup, min_psnr: the target, one of them; see `Target`.
        seconds: time budget of the search, without measuring before and after it.
        batch: images in a call.
        state: file that keeps every plan that was tried, so that an interrupted search goes on; None: none.
        progress: told how many plans were tried and what the best one does.
        try_steps, try_schedulers: fewer steps and other schedulers that the plan may use to come near the baseline; the
            time budget is shared among all combinations. The plan's conditions say which were chosen.
        options: further arguments of the pipeline's call.

    Returns:
        The plan with its conditions and measurements; `save` writes it. `search["guidance_reuse"]` says whether plans
        that leave a branch of guidance out at some steps were among those searched, and else why not.

    Raises:
        ConfigurationError: a setting is impossible, or no plan reaches the target.
        UnsupportedPipelineError: the pipeline's steps cannot be left out.
    """
    prompts = tuple(listed(prompts))
    steps = usual_steps(pipe) or USUAL_STEPS if steps is None else steps
    named = {"guidance_scale": guidance_scale, "height": height, "width": width}
    options |= {name: value for name, value in named.items() if value is not None}
    target = _checked(pipe, prompts, steps, options, one_target(speedup, min_psnr))
    options_of(pipe, **{name: value for name, value in named.items() if name in call_parameters(pipe)})
    whole("seed", seed, 0, MAX_SEED), whole("batch", batch)
    if type(seconds) not in (int, float) or not seconds >= 0:
        raise ConfigurationError(f"seconds must be a number of at least 0, got {shown(seconds)}")
    if not isinstance(try_steps, tuple | list):
        raise ConfigurationError(f"try_steps must be a list of numbers of steps, got {shown(try_steps)}")
    for number in try_steps:
        whole("try_steps", number, 1, MOST_STEPS)
    everything, calibration = Sampler(pipe, prompts, steps, seed, batch, options), 2 * len(prompts) // 3
    variants = [(n, s) for s in (pipe.scheduler, *try_schedulers) for n in dict.fromkeys((steps, *try_steps))]
    with torch.inference_mode():
        reference = Reference.measure(everything.part(0, calibration), everything.part(calibration, len(prompts)))
        best = _best(reference, variants, target, seconds, None if state is None else Path(state), progress)
        progress("held-out prompts", 1.0)
        with scheduling(pipe, best.scheduler):
            return tuned_plan(best.plan, best.tuner.trials, best.tuner.seen, target)


class Found(NamedTuple):
    """The plan of one number of steps and scheduler, and how good it is: the higher the value the better."""

    value: float
    tuner: Tuner
    plan: Plan
    scheduler: Any


def _best(
    reference: Reference,
    variants: Sequence[tuple[int, SchedulerMixin]],
    target: Target,
    seconds: float,
    state: Path | None,
    progress: Progress,
) -> Found:
    """The best plan of all numbers of steps and schedulers, which share the time.

    Raises:
        ConfigurationError: none of them has a plan that reaches the target.
    """
    found, failure = [], ConfigurationError("nothing was searched")
    for i, (steps, scheduler) in enumerate(variants):
        file = state.with_name(f"{state.name}.{i}") if state is not None and i else state
        trials = Trials(replace(reference.sampler, steps=steps), reference, file)
        try:
            found.append(_searched(trials, scheduler, target, seconds / len(variants), progress))
        except ConfigurationError as error:
            failure = error
    if not found:
        raise failure
    return max(found, key=lambda one: one.value)


def _searched(trials: Trials, scheduler: SchedulerMixin, target: Target, seconds: float, progress: Progress) -> Found:
    with scheduling(trials.sampler.pipe, scheduler):
        seen = Observations.measure(trials.sampler, trials.reference, progress)
        tuner = Tuner(trials, seen, target, Budget(seconds), progress)
        plan = tuner.search()
        value = trials.mean(plan) if target.speedup is not None else -seen.costs.time(plan)
        return Found(value, tuner, plan, scheduler)


def _checked(
    pipe: DiffusionPipeline, prompts: Sequence[str], steps: int, options: dict[str, Any], target: Target
) -> Target:
    """The target, if it can be searched for."""
    own = [name for name in tune.__annotations__ if name not in ("pipe", "prompts", "options", "return")]
    refuse_unknown(options, {*call_parameters(pipe), *own}, "tune()")
    if len(prompts) < 6:
        raise ConfigurationError(f"tuning needs at least 6 prompts (24 or more are recommended), got {len(prompts)}")
    if whole("steps", steps, 1, MOST_STEPS) < 4:
        raise ConfigurationError(f"tuning needs at least 4 steps, got {steps}")
    if reason := Reuse().supports(pipe):
        raise UnsupportedPipelineError(f"reuse cannot be used on {type(pipe).__name__}: {reason}")
    return target
