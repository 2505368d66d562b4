"""The plan that a search found, with what it costs and keeps on prompts that the search did not see."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from diffusion_accel.flops import count_flops
from diffusion_accel.measure.fidelity import conformal_floor, psnr, spread
from diffusion_accel.measure.timing import seconds_of
from diffusion_accel.reuse.plan import Plan
from diffusion_accel.reuse.plan_file import TunedPlan

from .measure import Observations, Reference, reusing, scheduling
from .target import CEILING, Target
from .together import ALONE, Together
from .trials import Trials

_COUNTED = ("full_steps", "evaluations", "peak_cache_bytes")
FLOOR_SHARE = 0.9  # of new images that reach the floor


def tuned_plan(plan: Plan, trials: Trials, seen: Observations, target: Target, rounds: int = 5) -> TunedPlan:
    """A plan as a file has it, with its measurements on the held-out prompts."""
    base = trials.reference
    search = {
        "target": {k: v for k, v in vars(target).items() if v is not None},
        "predicted_time_ratio": round(seen.costs.speedup(plan), 3),
        "baseline": {"steps": base.sampler.steps, "scheduler": type(base.scheduler).__name__},
        "calibration_psnr_median": round(trials.median(plan), 2),
        "calibration_pictures": len(trials.sampler.prompts),
        "plans_evaluated": trials.evaluated,
        "guidance_reuse": seen.unguided or "searched",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    return TunedPlan(plan, trials.conditions(seen.total), measured(plan, base, trials.sampler.steps, rounds), search)


def measured(plan: Plan, base: Reference, steps: int, rounds: int) -> dict[str, Any]:
    """What a plan costs and keeps on the held-out prompts: times of single images, in turn with the baseline.

    Args:
        plan: for the scheduler that the pipeline has now.
        base: the baseline.
        steps: that the pipeline is asked for with the plan.
        rounds: of timing.
    """
    pipe, mine = base.sampler.pipe, replace(base.heldout, steps=steps)
    one, plain = mine.part(0, 1), base.heldout.part(0, 1)
    with scheduling(pipe, base.scheduler):
        images = base.heldout.images()
        with count_flops() as whole:
            plain.images()
    with reusing(pipe, plan):
        values = psnr(images, mine.images())
        counters = pipe.acceleration.report().counters["reuse"]
        with count_flops() as fast:
            one.images()
    ratios = []
    for _ in range(rounds):
        with scheduling(pipe, base.scheduler):
            took = seconds_of(plain.images)
        with reusing(pipe, plan):
            ratios.append(took / seconds_of(one.images))
    return {
        **fidelity_of(values),
        "time_ratio": round(statistics.median(ratios), 3),
        "flop_ratio": round(whole.total / max(1.0, fast.total), 3),
        "full_steps": counters["full_steps"],
        "evaluations": counters["full_steps"],
        "peak_cache_bytes": counters["peak_cache_bytes"],
    }


def measured_together(
    plans: Sequence[Plan], base: Reference, rounds: int, together: Together = ALONE
) -> list[dict[str, Any]]:
    """The same for several plans, which share the calls of the baseline.

    Args:
        plans: for the pipeline's scheduler and number of steps.
        base: the baseline, with the held-out images of this process.
        rounds: of timing.
        together: the processes that measure; the first one counts and times, while the others wait.
    """
    mine = base.heldout
    images, found = mine.images() if mine.prompts else None, []
    for plan in plans:
        values: list[float] = []
        if images is not None:
            with reusing(mine.pipe, plan):
                values = psnr(images, mine.images()).tolist()
        found.append(fidelity_of(together.in_order(values)))
    numbers = together.agreed(_costs(plans, base, rounds) if together.first else None)
    return [own | cost for own, cost in zip(found, numbers, strict=True)]


def _costs(plans: Sequence[Plan], base: Reference, rounds: int) -> list[dict[str, Any]]:
    """What plans compute, and their times of single images, in turn with the baseline; counting warms up."""
    pipe, one, found = base.sampler.pipe, base.heldout.part(0, 1), []
    with count_flops() as whole:
        one.images()
    for plan in plans:
        with reusing(pipe, plan), count_flops() as fast:
            one.images()
            counters = pipe.acceleration.report().counters["reuse"]
        numbers = {key: counters["full_steps" if key == "evaluations" else key] for key in _COUNTED}
        found.append({"flop_ratio": round(whole.total / max(1.0, fast.total), 3)} | numbers)
    ratios: list[list[float]] = [[] for _ in plans]
    for _ in range(rounds):
        took = seconds_of(one.images)
        for plan, own in zip(plans, ratios, strict=True):
            with reusing(pipe, plan):
                own.append(took / seconds_of(one.images))
    return [f | {"time_ratio": round(statistics.median(own), 3)} for f, own in zip(found, ratios, strict=True)]


def fidelity_of(values: Sequence[float] | torch.Tensor) -> dict[str, Any]:
    """What the PSNR of held-out images says of a plan, as its file has it.

    Args:
        values: in dB, of images that nothing was fitted to.
    """
    psnr_each = [min(float(value), CEILING) for value in values]
    median, worst = spread(psnr_each)
    floor = conformal_floor(psnr_each, FLOOR_SHARE)
    return {
        "pictures": len(psnr_each),
        "psnr_median": round(median, 2),
        "psnr_worst_decile": round(worst, 2),
        "psnr_floor": None if floor is None else math.floor(floor * 100) / 100,
        "floor_share": FLOOR_SHARE,
        "psnr_each": [round(value, 2) for value in psnr_each],
    }
