"""The tuner: searches the plan of a speed-up or of a fidelity for one pipeline, scheduler and number of steps."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from diffusion_accel.denoisers import guided, no_branches
from diffusion_accel.errors import ConfigurationError, UnsupportedPipelineError
from diffusion_accel.flops import count_flops
from diffusion_accel.hooks import call_arguments
from diffusion_accel.measure.fidelity import psnr
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.reuse.plan import FULL, Plan, Preset, Step
from diffusion_accel.reuse.plan_file import TunedPlan, conditions
from diffusion_accel.reuse.reuse import Reuse

from .fit_weights import polish, weighted
from .measure import Reference, Reusing, measure_costs, measure_forecasts, scheduling, seconds_of
from .neighbours import halved, mutated
from .search import Rule, best_plans, predicted_error, refitted
from .state import add_score, read_search, write_search

MANY, FEW = 20, 6  # families of plans that are tried: for a speed-up, and for each step towards a fidelity
CEILING = 80.0  # dB; an image nearer than that counts as equal
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Target:
    """What to reach: a speed-up of the whole call at the best fidelity, or a fidelity at the highest speed-up.

    Attributes:
        speedup: at least 1; None if `min_psnr` is given.
        min_psnr: dB, the median over the images against the pipeline without reuse.
    """

    speedup: float | None = None
    min_psnr: float | None = None

    def __post_init__(self) -> None:
        if (self.speedup is None) == (self.min_psnr is None):
            raise ConfigurationError("give either a speed-up or a lowest PSNR as the target")
        if self.speedup is not None and not 1 < self.speedup < 1000:
            raise ConfigurationError(f"the speed-up must be above 1, got {self.speedup}")
        if self.min_psnr is not None and not 5 <= self.min_psnr <= CEILING:
            raise ConfigurationError(f"the lowest PSNR must be 5 to {CEILING:g} dB, got {self.min_psnr}")


@dataclass
class Tuner:
    """One search, for one scheduler and number of steps. `tune` is the simple way to use it.

    Attributes:
        sampler: the pipeline with the calibration prompts, and the number of steps that the plan is for.
        reference: the baseline, which may have more steps or another scheduler.
        target: what to reach.
        seconds: time budget of the search.
        state: file that keeps every evaluated plan, so that a search that was stopped goes on; None: none.
        progress: called with what is being done and the share of the time budget that is used.
    """

    sampler: Sampler
    reference: Reference
    target: Target
    seconds: float = 600.0
    state: Path | None = None
    progress: Progress = lambda text, share: None
    known: dict[str, list[float]] = field(default_factory=dict)
    evaluated: int = 0

    # ------------------------------------------------------------------ measuring
    def measure(self) -> None:
        """The predictions at every step, and what a step of each kind costs."""
        self.progress("predictions", 0.0)
        self.forecasts = measure_forecasts(self.sampler, lambda: self.progress("influence of the steps", 0.0))
        self.total = len(self.forecasts[0].times)
        pipe = self.sampler.pipe
        arguments = call_arguments(type(pipe).__call__, (), self.sampler.options)
        self.guided = no_branches(pipe) is None and guided(pipe, arguments)
        self.costs = measure_costs(
            self.sampler, self.reference, self.total, self.guided, lambda: self.progress("costs", 0.0)
        )

    def scores(self, plan: Plan, at_least: float | None = None) -> list[float]:
        """PSNR of every calibration image, at most `CEILING`; of fewer if a mean `at_least` so high is hopeless."""
        name = str(plan)
        if name in self.known:
            return self.known[name]
        values: list[float] = []
        with Reusing(self.sampler.pipe, plan):
            for start, end in self.sampler.chunks():
                drawn = self.sampler.call(start, end)
                values += psnr(self.reference.images[start:end], drawn).clamp(max=CEILING).tolist()
                if at_least is not None and statistics.fmean(values) < at_least - 3.0:
                    break
        self.keep(name, values)
        return values

    def draw(self, plan: Plan) -> torch.Tensor:
        """The calibration images with a plan."""
        with Reusing(self.sampler.pipe, plan):
            images = self.sampler.images()
        self.keep(str(plan), psnr(self.reference.images, images).clamp(max=CEILING).tolist())
        return images

    def keep(self, name: str, values: list[float]) -> None:
        self.known[name] = values
        self.evaluated += 1
        if self.state is not None:
            add_score(self.state, name, values)

    # ------------------------------------------------------------------ searching
    def search(self) -> Plan:
        """The best plan within the time budget.

        Raises:
            ConfigurationError: no plan of the family reaches the target.
        """
        self.measure()
        self.began = time.monotonic()
        self.families = self.find_families()
        if self.target.speedup is None:
            self.resume()
            return self.polished(self.cheapest(float(self.target.min_psnr or 0.0)), self.share(1.0))
        limit = 1 / self.target.speedup
        starts = self.starts(limit)
        if not starts:
            fastest = self.costs.speedup(Plan((FULL, *(Step("hold"),) * (self.total - 1))))
            raise ConfigurationError(
                f"no plan is {self.target.speedup:g} times as fast: what a plan cannot save limits it to "
                f"{fastest:.1f} here (decoding, the scheduler's own steps)"
            )
        self.resume()
        return self.polished(self.climb(starts[:MANY], limit, self.share(0.6)), self.share(1.0))

    def find_families(self) -> list[list[Plan]]:
        """Plans to begin with, by family: those of the dynamic programme for every number of full steps, in all spaces
        together and in each, with fewer or more rules; also with guidance's unconditional branch left out at some."""
        found = []
        for chosen in (self.forecasts, *([f] for f in self.forecasts if len(self.forecasts) > 1)):
            for rules in ([Rule(1, True)], [Rule(1, True), Rule(2, True)], [Rule(1), Rule(2), Rule(3)]):
                for careful in (True, False)[: len(rules)]:
                    found.append(list(best_plans(chosen, self.total, rules, careful).values()))
        found.append([Preset("hold", interval, order=2).plan(self.total) for interval in (2, 3, 4)])
        if self.guided:
            found += [[halved(plan, every) for plan in plans] for plans in found for every in (2, 3)]
        return found

    def starts(self, limit: float) -> list[Plan]:
        """The best plan of each family within a time of `limit`, the one of smallest predicted error first.

        Plans that reuse guidance come last: what that costs is not predicted.
        """
        affordable = [[plan for plan in plans if self.costs.time(plan) <= limit] for plans in self.families]
        chosen = dict.fromkeys(max(plans, key=self.costs.time) for plans in affordable if plans)
        return sorted(chosen, key=lambda plan: (plan.reuses_guidance, predicted_error(plan, self.forecasts)))

    def cheapest(self, floor: float) -> Plan:
        """The fastest plan whose median reaches the floor: first among the families, then with a search around them."""
        limits = sorted({self.costs.time(plan) for plans in self.families for plan in plans})
        best: Plan | None = None
        low, high = 0, len(limits)
        while low < high and (best is None or self.left() > 0):  # what is dearer is nearer, nearly always
            middle = (low + high) // 2
            plans = (plan for plan in self.starts(limits[middle])[:FEW] if self.median(plan, floor) >= floor)
            if (found := next(plans, None)) is not None:
                best, high = found, middle
            else:
                low = middle + 1
        if best is None:
            raise ConfigurationError(f"no plan reaches {floor:g} dB on these prompts within the time budget")
        while self.left() > 0:
            limit = self.costs.time(best) * 0.999
            cheaper = self.starts(limit)[:FEW]
            if not cheaper:
                break
            found = self.climb(cheaper, limit, self.share(0.3), stop_at=floor)
            if self.median(found, floor) < floor:
                found = self.polished(found, self.share(0.3))
            if self.median(found, floor) < floor:
                break
            best = found
        return best

    def climb(self, starts: list[Plan], limit: float, until: float, stop_at: float | None = None) -> Plan:
        """Hill climbing from the best of the starts, among plans of at most that time: the better one stays."""
        rng = random.Random(0)
        best, score = starts[0], -1.0
        for plan in starts:
            if time.monotonic() > until and score > 0:
                break
            mean = self.mean(plan, score)
            if mean > score:
                best, score = plan, mean
            self.tell(best, score)
        failures, rejected, seen = 0, 0, set()
        before = predicted_error(best, self.forecasts, careful=False)
        while time.monotonic() < until and failures < 80 and rejected < 5000:
            if stop_at is not None and self.median(best, stop_at) >= stop_at:
                break
            other = refitted(mutated(best, rng, self.guided, tuple(f.space for f in self.forecasts)), self.forecasts)
            hopeless = predicted_error(other, self.forecasts, careful=False) > 1.5 * before
            if hopeless or other == best or self.costs.time(other) > limit or other in seen:
                rejected += 1
                continue
            seen.add(other)
            mean = self.mean(other, score)
            failures = failures + 1 if mean <= score else 0
            if mean > score:
                best, score = other, mean
                before = predicted_error(best, self.forecasts, careful=False)
            self.tell(best, score)
        return best

    def polished(self, plan: Plan, until: float) -> Plan:
        """The plan with better weights, as long as there is time and they become better."""
        best = plan
        while time.monotonic() < until:
            weights = weighted(best, self.forecasts[0].times)
            better = polish(weights, self.draw, self.reference.images, lambda: time.monotonic() < until)
            if better is None or self.mean(better) <= self.mean(best) + 0.05:
                break
            best = better
            self.tell(best, self.mean(best))
        return best

    def mean(self, plan: Plan, at_least: float | None = None) -> float:
        values = self.scores(plan, at_least)
        return statistics.fmean(values) if len(values) == len(self.sampler.prompts) else -1.0

    def median(self, plan: Plan, at_least: float | None = None) -> float:
        values = self.scores(plan, at_least)
        return statistics.median(values) if len(values) == len(self.sampler.prompts) else -1.0

    def left(self) -> float:
        return self.began + self.seconds - time.monotonic()

    def share(self, part: float) -> float:
        """The moment at which this part of the time that is left is over."""
        return time.monotonic() + part * max(0.0, self.left())

    def tell(self, plan: Plan, score: float) -> None:
        text = f"{self.evaluated} plans, best {score:.1f} dB at {self.costs.speedup(plan):.2f}x"
        self.progress(text, 1 - max(0.0, self.left()) / self.seconds)

    def resume(self) -> None:
        """Take over what an earlier search with the same conditions evaluated."""
        if self.state is None:
            return
        head = {"conditions": self.conditions(), "prompts": list(self.sampler.prompts)}
        if self.state.exists():
            before, known = read_search(self.state)
            if before == json.loads(json.dumps(head)):
                self.known = known
        write_search(self.state, head, self.known)

    def conditions(self) -> dict[str, Any]:
        return conditions(self.sampler.pipe, self.total) | {"call": {**self.sampler.options, "seed": self.sampler.seed}}

    # ------------------------------------------------------------------ the result
    def result(self, plan: Plan, rounds: int = 5) -> TunedPlan:
        """The plan with its measurements on the held-out prompts: times of single images, in turn."""
        pipe, base = self.sampler.pipe, self.reference
        mine = replace(base.heldout, steps=self.sampler.steps)
        one, plain = mine.part(0, 1), base.heldout.part(0, 1)
        self.progress("held-out prompts", 1.0)
        with scheduling(pipe, base.scheduler):
            images = base.heldout.images()
            with count_flops() as whole:
                plain.images()
        with Reusing(self.sampler.pipe, plan):
            values = psnr(images, mine.images()).clamp(max=CEILING)
            counters = pipe.acceleration.report().counters["reuse"]
            with count_flops() as fast:
                one.images()
        ratios = []
        for _ in range(rounds):
            with scheduling(pipe, base.scheduler):
                took = seconds_of(plain.images)
            with Reusing(self.sampler.pipe, plan):
                ratios.append(took / seconds_of(one.images))
        measured = {
            "pictures": len(values),
            "psnr_median": round(float(values.quantile(0.5)), 2),
            "psnr_worst_decile": round(float(values.quantile(0.1)), 2),
            "time_ratio": round(statistics.median(ratios), 3),
            "flop_ratio": round(whole.total / max(1.0, fast.total), 3),
            "full_steps": counters["full_steps"],
            "peak_cache_bytes": counters["peak_cache_bytes"],
        }
        search = {
            "target": {k: v for k, v in vars(self.target).items() if v is not None},
            "predicted_time_ratio": round(self.costs.speedup(plan), 3),
            "baseline": {"steps": base.sampler.steps, "scheduler": type(base.scheduler).__name__},
            "calibration_psnr_median": round(self.median(plan), 2),
            "calibration_pictures": len(self.sampler.prompts),
            "plans_evaluated": self.evaluated,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        }
        return TunedPlan(plan, self.conditions(), measured, search)


def tune(
    pipe: Any,
    prompts: list[str],
    *,
    steps: int,
    speedup: float | None = None,
    min_psnr: float | None = None,
    seconds: float = 600.0,
    seed: int = 0,
    batch: int = 8,
    state: Path | None = None,
    progress: Progress = lambda text, share: None,
    try_steps: tuple[int, ...] = (),
    try_schedulers: tuple[Any, ...] = (),
    **options: Any,
) -> TunedPlan:
    """Search the reuse plan of a pipeline: the best fidelity at a speed-up, or the highest speed-up at a fidelity.

    The fidelity is the PSNR to the images of the same pipeline without reuse. Two thirds of the prompts calibrate,
    the others measure the result. For an unconditional pipeline prompts only count the images.

    Args:
        pipe: a loaded pipeline, with the scheduler that will be used.
        prompts: at least 6; 24 or more are recommended.
        steps: denoising steps of the calls that the plan is for.
        speedup, min_psnr: the target, see `Target`.
        seconds: time budget of the search, without measuring before and after it.
        seed, batch: see `Sampler`.
        state: see `Tuner`.
        progress: see `Tuner`.
        try_steps, try_schedulers: fewer steps and other schedulers that the plan may use to come near the baseline; the
            time budget is shared among all combinations. The plan's conditions say which were chosen.
        options: further arguments of the pipeline, such as guidance_scale, height and width.

    Returns:
        The plan with its conditions and measurements; `save` writes it.
    """
    if len(prompts) < 6:
        raise ConfigurationError(f"tuning needs at least 6 prompts (24 or more are recommended), got {len(prompts)}")
    if steps < 4:
        raise ConfigurationError(f"tuning needs at least 4 steps, got {steps}")
    reason = Reuse().supports(pipe)
    if reason:
        raise UnsupportedPipelineError(f"reuse cannot be used on {type(pipe).__name__}: {reason}")
    calibration = 2 * len(prompts) // 3
    whole, target = Sampler(pipe, tuple(prompts), steps, seed, batch, options), Target(speedup, min_psnr)
    variants = [(n, s) for s in (pipe.scheduler, *try_schedulers) for n in dict.fromkeys((steps, *try_steps))]
    best: tuple[float, Tuner, Plan, Any] | None = None
    failure: ConfigurationError | None = None
    with torch.inference_mode():
        reference = Reference.measure(whole.part(0, calibration), whole.part(calibration, len(prompts)))
        for i, (count, scheduler) in enumerate(variants):
            file = state.with_name(f"{state.name}.{i}") if state is not None and i else state
            sampler = replace(reference.sampler, steps=count)
            tuner = Tuner(sampler, reference, target, seconds / len(variants), file, progress)
            with scheduling(pipe, scheduler):
                try:
                    plan = tuner.search()
                except ConfigurationError as error:
                    failure = error
                    continue
            value = tuner.mean(plan) if speedup is not None else -tuner.costs.time(plan)
            if best is None or value > best[0]:
                best = value, tuner, plan, scheduler
        if best is None:
            assert failure is not None
            raise failure
        _, tuner, plan, scheduler = best
        with scheduling(pipe, scheduler):
            return tuner.result(plan)
