"""The tuner: searches the plan of a speed-up or of a fidelity for one pipeline, scheduler and number of steps."""

from __future__ import annotations

import json
import logging
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ConfigurationError, UnsupportedPipelineError
from ..evaluation.fidelity import psnr
from ..evaluation.flops import count_flops
from ..evaluation.sampler import Sampler
from ..prediction import SPACES, Conversion
from ..steps import StepClock
from ..switchboard import accelerate
from .plan import FULL, Plan, Preset, Step
from .reuse import Reuse
from .search import Forecasts, sensitivities
from .tuned import TunedPlan, conditions

logger = logging.getLogger(__name__)

CEILING = 80.0  # dB; a picture nearer than that counts as equal
CONDITIONAL = Step(order=1, guidance="reuse")
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Target:
    """What to reach: a speed-up of the whole call at the best fidelity, or a fidelity at the highest speed-up.

    Attributes:
        speedup: at least 1; None if `min_psnr` is given.
        min_psnr: dB, the median over the pictures against the pipeline without reuse.
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


@dataclass(frozen=True)
class Costs:
    """Seconds of a call: `fixed` for everything that no plan saves, and what each kind of step adds."""

    fixed: float
    steps: dict[str, float]

    def seconds(self, plan: Plan) -> float:
        return self.fixed + sum(self.steps[kind(step)] for step in plan.steps)


def kind(step: Step) -> str:
    """The kind of a step by what it costs; the order of a forecast costs next to nothing."""
    half = step.guidance != "both" and step.mode != "hold"
    return str(replace(step, order=0, space="", guidance="reuse" if half else "both"))


@dataclass(frozen=True)
class Reference:
    """The baseline that everything is compared with.

    Attributes:
        sampler: calls it, for the calibration prompts.
        heldout: the same with prompts that the search does not see.
        scheduler: its scheduler.
        pictures: of the calibration prompts, (N, 3, H, W) in 0..1.
        seconds: of one picture.
    """

    sampler: Sampler
    heldout: Sampler
    scheduler: Any
    pictures: torch.Tensor
    seconds: float

    @classmethod
    def measure(cls, sampler: Sampler, heldout: Sampler) -> Reference:
        took = []
        for _ in range(4):
            began = time.perf_counter()
            sampler.part(0, 1).images()
            took.append(time.perf_counter() - began)
        return cls(sampler, heldout, sampler.pipe.scheduler, sampler.images(), statistics.median(took[1:]))


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
        pipe = self.sampler.pipe
        self.progress("predictions", 0.0)
        predictions, inputs, times = record(self.sampler)
        self.total = len(times)
        conversion = Conversion(pipe.scheduler)
        self.forecasts = []
        for space in ("", *SPACES) if conversion.possible else ("",):
            if space == conversion.kind:
                continue  # the prediction itself
            values = predictions
            if space:
                pairs = zip(predictions, inputs, times, strict=True)
                values = torch.stack([conversion.to(space, p, x, t) for p, x, t in pairs])
            gram = torch.einsum("ibd,jbd->ij", values, values).double().numpy() / values.shape[1]
            try:
                influence = sensitivities(pipe.scheduler, self.sampler.steps, space)
            except (TypeError, ValueError, AttributeError, RuntimeError) as error:
                logger.info("the scheduler cannot be probed (%s): every step counts the same", error)
                influence = np.ones(self.total)
            if len(influence) != self.total:
                influence = np.ones(self.total)
            self.forecasts.append(Forecasts(times, gram, influence, space))
        self.guided = bool(getattr(pipe, "do_classifier_free_guidance", False))
        self.costs = self.measure_costs()

    def measure_costs(self) -> Costs:
        """From whole calls of one picture: all steps full, all but the first held, all but the first half."""
        rest = self.total - 1
        plans = {"full": Plan((FULL,) * self.total), "hold": Plan((FULL, *(Step("hold"),) * rest))}
        if self.guided:
            plans["full/reuse"] = Plan((FULL, *(CONDITIONAL,) * rest))
        one = self.sampler.part(0, 1)
        seconds: dict[str, list[float]] = {name: [] for name in plans}
        for turn in range(4):
            for name, plan in plans.items():
                self.progress("costs", 0.0)
                with self.running(plan):
                    began = time.perf_counter()
                    one.images()
                    if turn:  # the first warms up
                        seconds[name].append(time.perf_counter() - began)
        took = {name: statistics.median(values) for name, values in seconds.items()}
        each = {name: max(0.0, (took[name] - took["hold"]) / rest) for name in plans}
        return Costs(took["hold"] - each["full"], each)

    def running(self, plan: Plan) -> Any:
        return reusing(self.sampler.pipe, Reuse(plan=f"steps:{plan}"))

    def scores(self, plan: Plan, at_least: float | None = None) -> list[float]:
        """PSNR of every calibration picture, at most `CEILING`; of fewer if a mean `at_least` so high is hopeless."""
        name = str(plan)
        if name in self.known:
            return self.known[name]
        values: list[float] = []
        with self.running(plan):
            for start, end in self.sampler.chunks():
                drawn = self.sampler.call(start, end)
                values += psnr(self.reference.pictures[start:end], drawn).clamp(max=CEILING).tolist()
                if at_least is not None and statistics.fmean(values) < at_least - 3.0:
                    break
        self.known[name] = values
        self.evaluated += 1
        if self.state is not None:
            with self.state.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"plan": name, "psnr": [round(v, 3) for v in values]}) + "\n")
        return values

    # ------------------------------------------------------------------ searching
    def search(self) -> Plan:
        """The best plan within the time budget.

        Raises:
            ConfigurationError: no plan of the family reaches the target.
        """
        self.began = time.monotonic()
        self.measure()
        self.resume()
        families = self.families()
        if self.target.speedup is not None:
            limit = self.reference.seconds / self.target.speedup
            affordable = [[p for p in plans if self.costs.seconds(p) <= limit] for plans in families]
            starts = [max(plans, key=self.costs.seconds) for plans in affordable if plans]
            if not starts:
                fastest = self.reference.seconds / self.costs.seconds(Plan((FULL, *(Step("hold"),) * (self.total - 1))))
                raise ConfigurationError(
                    f"no plan is {self.target.speedup:g} times as fast: what a plan cannot save limits it to "
                    f"{fastest:.1f} here (decoding, the scheduler's own steps)"
                )
            return self.climb(starts, limit, self.share(1.0))
        floor = float(self.target.min_psnr or 0.0)
        return self.cheapest(families, floor)

    def families(self) -> list[list[Plan]]:
        """Plans to begin with, by family: those of the dynamic programme in each space and up to each order, for every
        number of full steps, also with some of them without guidance's unconditional branch."""
        found = [list(f.plans(self.total, order).values()) for f in self.forecasts for order in (0, 1, 2)]
        found.append([Preset("hold", interval, order=2).plan(self.total) for interval in (2, 3, 4)])
        if self.guided:
            found += [[halved(plan, every) for plan in plans] for plans in found for every in (2, 3)]
        return found

    def cheapest(self, families: list[list[Plan]], floor: float) -> Plan:
        """The fastest plan whose median reaches the floor: first without, then with a search around the candidates."""
        starts = sorted({plan for plans in families for plan in plans}, key=lambda p: (self.costs.seconds(p), str(p)))
        reached: list[Plan] = []
        for plans in families:
            ordered = sorted(set(plans), key=lambda p: (self.costs.seconds(p), str(p)))
            if reached:  # only what would be faster
                limit = min(map(self.costs.seconds, reached))
                ordered = [plan for plan in ordered if self.costs.seconds(plan) < limit]
            low, high = 0, len(ordered)
            while low < high and self.left() > 0:  # within a family fidelity grows with cost, nearly always
                middle = (low + high) // 2
                if self.median(ordered[middle], floor) >= floor:
                    reached.append(ordered[middle])
                    high = middle
                else:
                    low = middle + 1
        best = min(reached, key=self.costs.seconds, default=None)
        if best is None:
            raise ConfigurationError(f"no plan reaches {floor:g} dB on these prompts within the time budget")
        while self.left() > 0:
            limit = self.costs.seconds(best) * 0.999
            cheaper = [p for p in starts if limit * 0.8 <= self.costs.seconds(p) <= limit][-12:]
            if not cheaper:
                break
            found = self.climb(cheaper, limit, self.share(0.34), stop_at=floor)
            if self.median(found, floor) < floor:
                break
            best = found
        return best

    def climb(self, starts: list[Plan], limit: float, until: float, stop_at: float | None = None) -> Plan:
        """Hill climbing from the best of the starts, among plans of at most `limit` seconds: the better one stays."""
        rng = random.Random(0)
        best, score = starts[0], -1.0
        for plan in starts:
            if time.monotonic() > until and score > 0:
                break
            mean = self.mean(plan, score)
            if mean > score:
                best, score = plan, mean
            self.tell(best, score)
        failures, seen = 0, set()
        while time.monotonic() < until and failures < 80:
            if stop_at is not None and self.median(best, stop_at) >= stop_at:
                break
            other = mutated(best, rng, self.guided, tuple(f.space for f in self.forecasts))
            if other == best or self.costs.seconds(other) > limit or other in seen:
                failures += 1
                continue
            seen.add(other)
            mean = self.mean(other, score)
            failures = failures + 1 if mean <= score else 0
            if mean > score:
                best, score = other, mean
            self.tell(best, score)
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
        speed = self.reference.seconds / self.costs.seconds(plan)
        text = f"{self.evaluated} plans, best {score:.1f} dB at {speed:.2f}x"
        self.progress(text, 1 - max(0.0, self.left()) / self.seconds)

    def resume(self) -> None:
        """Take over what an earlier search with the same conditions evaluated."""
        if self.state is None:
            return
        head = {"conditions": self.conditions(), "prompts": list(self.sampler.prompts)}
        if self.state.exists():
            text = self.state.read_text(encoding="utf-8").splitlines()
            lines = [json.loads(line) for line in text if line.endswith("}")]  # the last one may be cut
            if lines and lines[0] == json.loads(json.dumps(head)):
                self.known = {line["plan"]: line["psnr"] for line in lines[1:]}
                return
        self.state.write_text(json.dumps(head) + "\n", encoding="utf-8")

    def conditions(self) -> dict[str, Any]:
        return conditions(self.sampler.pipe, self.total) | {"call": {**self.sampler.options, "seed": self.sampler.seed}}

    # ------------------------------------------------------------------ the result
    def result(self, plan: Plan, rounds: int = 5) -> TunedPlan:
        """The plan with its measurements on the held-out prompts: times of single pictures, in turn."""
        pipe, base = self.sampler.pipe, self.reference
        mine = replace(base.heldout, steps=self.sampler.steps)
        one, plain = mine.part(0, 1), base.heldout.part(0, 1)
        self.progress("held-out prompts", 1.0)
        with scheduling(pipe, base.scheduler):
            pictures = base.heldout.images()
            with count_flops() as whole:
                plain.images()
        with self.running(plan):
            values = psnr(pictures, mine.images()).clamp(max=CEILING)
            counters = pipe.acceleration.report().counters["reuse"]
            with count_flops() as fast:
                one.images()
        ratios = []
        for _ in range(rounds):
            with scheduling(pipe, base.scheduler):
                began = time.perf_counter()
                plain.images()
                took = time.perf_counter() - began
            with self.running(plan):
                began = time.perf_counter()
                one.images()
                ratios.append(took / (time.perf_counter() - began))
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
            "predicted_time_ratio": round(base.seconds / self.costs.seconds(plan), 3),
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

    The fidelity is the PSNR to the pictures of the same pipeline without reuse. Two thirds of the prompts calibrate,
    the others measure the result. For an unconditional pipeline prompts only count the pictures.

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
            value = tuner.mean(plan) if speedup is not None else -tuner.costs.seconds(plan)
            if best is None or value > best[0]:
                best = value, tuner, plan, scheduler
        if best is None:
            assert failure is not None
            raise failure
        _, tuner, plan, scheduler = best
        with scheduling(pipe, scheduler):
            return tuner.result(plan)


# ---------------------------------------------------------------------- helpers
class reusing:
    """Within this context the pipeline reuses by one plan; after it everything is as it was before."""

    def __init__(self, pipe: Any, feature: Reuse) -> None:
        self.pipe, self.feature = pipe, feature

    def __enter__(self) -> None:
        handle = getattr(self.pipe, "acceleration", None)
        self.before = None if handle is None else handle.features.get("reuse")
        self.accelerated = handle is not None
        accelerate(self.pipe, self.feature)

    def __exit__(self, *exception: object) -> None:
        if not self.accelerated:
            self.pipe.acceleration.remove()
        elif self.before is not None:
            accelerate(self.pipe, self.before)
        else:
            self.pipe.acceleration.remove("reuse")


@contextmanager
def scheduling(pipe: Any, scheduler: Any) -> Iterator[None]:
    """Within this context the pipeline has another scheduler."""
    before = pipe.scheduler
    pipe.scheduler = scheduler
    try:
        yield
    finally:
        pipe.scheduler = before


def record(sampler: Sampler) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """What the scheduler is given at every step, prediction and latents as the denoiser sees them, and the timesteps.

    Both are (steps, pictures, values) in float32.
    """
    clock = StepClock(sampler.pipe)
    seen: list[torch.Tensor] = []

    def note(named: dict[str, Any]) -> None:
        x = clock.scheduler.scale_model_input(named["sample"], named["timestep"])
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


def halved(plan: Plan, every: int) -> Plan:
    """The plan with guidance's unconditional branch at each `every`-th of its full steps only."""
    number = -1
    steps = []
    for step in plan.steps:
        number += step.mode == "full"
        steps.append(CONDITIONAL if step.mode == "full" and number % every else step)
    return Plan(tuple(steps))


def mutated(plan: Plan, rng: random.Random, guided: bool, spaces: tuple[str, ...] = ("",)) -> Plan:
    """A neighbour: full steps moved, exchanged or traded, another order behind one of them, another branch kept."""
    steps = list(plan.steps)
    for _ in range(rng.choice((1, 1, 2))):
        nodes = [i for i, step in enumerate(steps) if step.mode == "full" and i]
        held = [i for i, step in enumerate(steps) if step.mode == "hold"]
        if not nodes or not held:
            return plan
        move = rng.random()
        node = rng.choice(nodes)
        if move < 0.55:  # move a full step a little
            to = node + rng.choice((-2, -1, -1, 1, 1, 2))
            if 0 < to < len(steps) and steps[to].mode == "hold":
                steps[node], steps[to] = steps[to], steps[node]
        elif move < 0.75:  # another order and space of the run behind a full step
            start = rng.choice([0, *nodes])
            order, space = rng.choice((0, 1, 2, 3)), rng.choice(spaces)
            end = next((i for i in nodes if i > start), len(steps))
            steps[start + 1 : end] = [replace(step, order=order, space=space) for step in steps[start + 1 : end]]
        elif move < 0.85 or not guided:  # take a full step away here, put it in there
            to = rng.choice(held)
            steps[node], steps[to] = steps[to], steps[node]
        elif steps[node].guidance == "both":  # give a branch away, and gain a step without it
            steps[node] = CONDITIONAL
            steps[rng.choice(held)] = CONDITIONAL
        else:
            steps[node] = FULL
            others = [i for i in nodes if steps[i].guidance == "reuse" and i != node]
            if others:
                steps[rng.choice(others)] = Step("hold", space=rng.choice(spaces))
    return Plan(tuple(steps))
