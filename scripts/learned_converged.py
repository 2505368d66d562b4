"""How near the learned solver comes to the converged images, beside the stock solvers that came nearest with 2.5 times
as many evaluations (twice as many of 10 and 12), and how fast it is.

Which stock solvers and spacings those are `measure_solvers.py` found; here they draw the same images as the
learned one.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from measuring import STICKER, head, line, numbers, short
from PIL import Image

from diffusion_accel.bench.benchmark import UNSEEN
from diffusion_accel.bench.run import CONVERGED_STEPS
from diffusion_accel.evaluation.prompts import embedded_prompts
from diffusion_accel.measure.grids import grid
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.measure.timing import in_turn, ratios, seconds_of
from diffusion_accel.pipelines.schedulers import set_scheduler

USUAL = ("dpm++", 20)  # what most people run
# for a number of learned evaluations: stock solvers with their spacing and evaluations
RIVALS: dict[int, tuple[tuple[str, int], ...]] = {
    5: (("euler,exponential", 12), ("euler,exponential", 13), ("deis,exponential", 13)),
    6: (("deis,exponential", 15), ("dpm++,lu", 15)),
    8: (("deis,exponential", 20), ("dpm++,exponential", 20)),
    10: (("deis,exponential", 20), ("dpm++,exponential", 20)),
    12: (("dpm++,exponential", 25), ("deis,exponential", 25)),
}
SHOWN, DRAWN = 6, (5, 8)  # rows of the grid, and numbers of evaluations in it


def run(pipe: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Nearness, times, and the grid."""
    sampler = Sampler(pipe, tuple(embedded_prompts(options.count, UNSEEN)), 1, options.seed, options.batch, STICKER)
    sizes = options.sizes or [*RIVALS]
    images: dict[tuple[str, int], torch.Tensor] = {}
    plain = pipe.scheduler

    def drawn(scheduler: str, steps: int) -> torch.Tensor:
        if (scheduler, steps) not in images:
            pipe.scheduler = plain  # some schedulers refuse the configuration of others
            set_scheduler(pipe, scheduler)
            images[scheduler, steps] = replace(sampler, steps=steps).images()
        return images[scheduler, steps]

    times = measured_times(sampler, options, sizes)
    goal = drawn("dpm++", CONVERGED_STEPS)
    rows: list[dict[str, Any]] = []

    def near(scheduler: str, steps: int) -> dict[str, Any]:
        known = [row for row in rows if (row["scheduler"], row["evaluations"]) == (scheduler, steps)]
        if not known:
            rows.append({"scheduler": scheduler, "evaluations": steps} | numbers(goal, drawn(scheduler, steps)))
        return (known or rows[-1:])[0]

    head("learned", "dB: median / worst decile / worst", "best stock solver", "its dB", "difference", "time ratio")
    for n in sizes:
        own, rivals = near(options.solver, n), [near(*rival) for rival in RIVALS[n]]
        best, lowest = max(rivals, key=lambda r: r["median"]), max(r["worst_decile"] for r in rivals)
        own["time_ratio"] = times[n]
        ahead = f"{own['median'] - best['median']:+.1f}, {own['worst_decile'] - lowest:+.1f}"
        name = f"{best['scheduler']}, {best['evaluations']}"
        line(n, short(own, True), name, short(best, True), ahead, f"{times[n]:.2f}")
    line(f"{USUAL[0]}, {USUAL[1]}", short(near(*USUAL), True), "", "", "", "1.00")
    if options.grid is not None:
        save(options, sampler.prompts, goal, drawn)
    return rows


def measured_times(sampler: Sampler, options: argparse.Namespace, sizes: list[int]) -> dict[int, float]:
    """How many times as fast as the usual solver, one image, rounds in turn."""
    one, plain = sampler.part(0, 1), sampler.pipe.scheduler

    def took(scheduler: str, steps: int) -> Callable[[], float]:
        def call() -> float:
            sampler.pipe.scheduler = plain
            set_scheduler(sampler.pipe, scheduler)
            return seconds_of(replace(one, steps=steps).images)

        return call

    calls = {0: took(*USUAL)} | {n: took(options.solver, n) for n in sizes}
    seconds = in_turn(calls, options.rounds)
    return {n: round(statistics.median(ratios(seconds[0], seconds[n])), 2) for n in sizes}


def save(
    options: argparse.Namespace, prompts: tuple[str, ...], goal: torch.Tensor, drawn: Callable[[str, int], torch.Tensor]
) -> None:
    """Some images side by side."""
    chosen = [k * len(prompts) // SHOWN for k in range(SHOWN)]
    columns = {f"converged ({CONVERGED_STEPS} steps)": goal, f"DPM-Solver++, {USUAL[1]} steps": drawn(*USUAL)}
    columns |= {f"learned, {n} evaluations": drawn(options.solver, n) for n in DRAWN}
    rows = [[as_image(images[k]) for images in columns.values()] for k in chosen]
    captions = []
    for k in chosen:
        near = [numbers(goal[k : k + 1], images[k : k + 1])["median"] for images in [*columns.values()][1:]]
        captions.append([prompts[k], *(f"{value:.1f} dB" for value in near)])
    options.grid.parent.mkdir(parents=True, exist_ok=True)
    grid(rows, [*columns], captions, scale=2).save(options.grid, optimize=True)


def as_image(pixels: torch.Tensor) -> Image.Image:
    """(3, H, W) in 0..1 for people."""
    return Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy())
