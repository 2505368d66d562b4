"""The search by trials: plans are run in the pipeline itself.

For pipelines whose denoiser cannot be repeated alone, and for plans that may have another scheduler or fewer steps.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.progress import Progress, silent
from diffusion_accel.reuse.plan import FULL, Plan, Step
from diffusion_accel.reuse.plan_file import TunedPlan
from diffusion_accel.reuse.search import predicted_error, refitted

from .budget import Budget
from .families import find_families, starts
from .fit_weights import fit_weights, with_weights
from .measure import Observations, Reference, scheduling
from .neighbours import neighbour
from .result import tuned_plan
from .target import Target
from .trials import Trials

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

MANY, FEW = 20, 6  # families of plans that are tried: for a speed-up, and for each step towards a fidelity


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


class Found(NamedTuple):
    """The plan of one number of steps and scheduler, and how good it is: the higher the value the better."""

    value: float
    tuner: Tuner
    plan: Plan
    scheduler: Any


def search_by_trials(
    reference: Reference,
    variants: Sequence[tuple[int, SchedulerMixin]],
    target: Target,
    seconds: float,
    state: Path | None,
    progress: Progress,
) -> TunedPlan:
    """The best plan of all numbers of steps and schedulers, which share the time, with its measurements.

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
    best = max(found, key=lambda one: one.value)
    progress("held-out prompts", 1.0)
    with scheduling(reference.sampler.pipe, best.scheduler):
        return tuned_plan(best.plan, best.tuner.trials, best.tuner.seen, target)


def _searched(trials: Trials, scheduler: SchedulerMixin, target: Target, seconds: float, progress: Progress) -> Found:
    with scheduling(trials.sampler.pipe, scheduler):
        seen = Observations.measure(trials.sampler, trials.reference, progress)
        tuner = Tuner(trials, seen, target, Budget(seconds), progress)
        plan = tuner.search()
        value = trials.mean(plan) if target.speedup is not None else -seen.costs.time(plan)
        return Found(value, tuner, plan, scheduler)
