#!/usr/bin/env python3
"""A minute of tuning against every preset of plain holding, on models that nothing here was made for.

    python scripts/measure_tuning.py --model runs/dit/pipeline --model runs/eps/pipeline --model runs/ddpm/pipeline

A row is a speed-up: the plan that was tuned for it, and of the presets `hold:N@ORDER` that compute no more steps than
it the best, by the median. Calibrated on other prompts (or classes) and seeds than those that are measured.

A budget is seconds of a machine that is idle: where this process got only a share of a core while presets were drawn,
the search gets so many times as long. What it really had is in the table.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measuring import STICKER, head, line, numbers, quiet, short, write

from diffusion_accel import Reuse, accelerate, tune
from diffusion_accel.bench.benchmark import UNSEEN
from diffusion_accel.conditioning import CLASS, PROMPT, class_count, class_names, condition_of
from diffusion_accel.evaluation.prompts import embedded_prompts
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.pipelines.schedulers import set_scheduler

SPEEDUPS = (2.3, 3.0, 3.5, 5.0)
PRESETS = tuple((n, order) for n in range(2, 9) for order in range(3))
CALIBRATING, MEASURING = 20_000, 1000  # seeds of the first images
NAMES = (
    "model",
    "asked for",
    "tuned: computed steps",
    "time ratio",
    "CPU seconds",
    "median / worst decile / worst, dB",
)
RIVAL = ("best preset", "its computed steps", "its dB", "difference of medians, of worst deciles")


def texts(pipe: Any, count: int, measured: bool) -> tuple[str, ...]:
    """Prompts, numbers of classes, or nothing; those that are measured are none of those that calibrate."""
    kind = condition_of(pipe)
    if kind == PROMPT:
        return tuple(embedded_prompts(count, UNSEEN if measured else 0))
    if kind != CLASS:
        return ("",) * count
    known = sorted(set(class_names(pipe).values())) or list(range(class_count(pipe)))
    own = known[int(measured) :: 2]
    return tuple(str(own[i * len(own) // count % len(own)]) for i in range(count))


class Clock:
    """CPU time and wall-clock time from now on, and how much of it a search had."""

    def __init__(self) -> None:
        self.began, self.cpu = time.perf_counter(), time.process_time()
        self.marks: dict[str, float] = {}

    def share(self) -> float:
        """Of a core, since this clock began."""
        return min(1.0, (time.process_time() - self.cpu) / (time.perf_counter() - self.began))

    def told(self, what: str, *_: object) -> None:
        """Progress of `tune`: the budget runs from when costs are measured until the held-out images are drawn."""
        self.marks.setdefault(what, time.process_time())

    def searched(self) -> float | None:
        """CPU seconds of the search."""
        begin, end = self.marks.get("costs"), self.marks.get("held-out prompts")
        return None if begin is None or end is None else round(end - begin, 1)


def rows_of(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The presets of one model, and the plans that were tuned for it."""
    pipe = quiet(model)
    set_scheduler(pipe, options.scheduler)
    kind = condition_of(pipe)
    call: dict[str, Any] = STICKER if kind == PROMPT else {"guidance_scale": 3.0} if kind == CLASS else {}
    sampler = Sampler(pipe, texts(pipe, options.count, True), options.steps, MEASURING, options.batch, call)
    plain = sampler.images()

    def measured(plan: Any) -> dict[str, Any]:
        accelerate(pipe, Reuse(plan=plan))
        found = numbers(plain, sampler.images())
        computed = pipe.acceleration.report().counters["reuse"]["full_steps"]
        pipe.acceleration.remove()
        return {"model": model, "computed": computed} | found

    rows: list[dict[str, Any]] = []
    clock = Clock()
    for n, order in PRESETS:
        rows.append({"preset": f"hold:{n}@{order}"} | measured(f"hold:{n}@{order}"))
        print(rows[-1]["preset"], rows[-1]["computed"], short(rows[-1], True), file=sys.stderr, flush=True)
    for speedup in options.speedups:
        stretched = options.seconds / max(0.05, clock.share())
        clock = Clock()
        plan: Any = tune(
            pipe,
            texts(pipe, options.calibration, False),
            steps=options.steps,
            seed=CALIBRATING,
            speedup=speedup,
            seconds=stretched,
            progress=clock.told,
            **call,
        )
        kept: dict[str, Any] = {key: plan.search.get(key) for key in ("method", "plans_evaluated", "work")}
        head_of = {"speedup": speedup, "time_ratio": plan.speedup, "search": kept, "cpu_seconds": clock.searched()}
        rows.append(head_of | measured(plan) | {"plan": [str(step) for step in plan.plan.steps]})
        show(rows[-1], rows)
    return rows


def show(row: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """One row of the table: a plan beside the best preset that computes no more steps."""
    name = Path(row["model"]).parent.name or row["model"]
    rivals = [r for r in rows if "preset" in r and r["computed"] <= row["computed"]]
    cells = [name, f"{row['speedup']:g}x", row["computed"], f"{row['time_ratio']:.2f}"]
    cells += [f"{row['cpu_seconds']:.0f}" if row["cpu_seconds"] else "", short(row, True)]
    if not rivals:
        return line(*cells, "none is as fast", "", "", "")
    best = max(rivals, key=lambda r: r["median"])
    lowest = max(r["worst_decile"] for r in rivals)  # of any of them
    ahead = f"{row['median'] - best['median']:+.1f}, {row['worst_decile'] - lowest:+.1f}"
    line(*cells, f"`{best['preset']}`", best["computed"], short(best, True), ahead)


def main() -> int:
    """Measure, print a table row by row, write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, help="pipeline folder")
    parser.add_argument("--scheduler", default="ddim")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--speedups", type=float, nargs="+", default=SPEEDUPS)
    parser.add_argument("--seconds", type=float, default=60.0, help="budget of each search")
    parser.add_argument("--count", type=int, default=24, help="images that are measured")
    parser.add_argument("--calibration", type=int, default=24, help="images that a search is given")
    parser.add_argument("--batch", type=int, default=12, help="images in a call")
    parser.add_argument("--json", type=Path, help="write every row, image by image")
    options = parser.parse_args()
    head(*NAMES, *RIVAL)
    rows: list[dict[str, Any]] = []
    for model in options.model:
        with torch.inference_mode():
            rows += rows_of(model, options)
        settings = {"scheduler": options.scheduler, "steps": options.steps, "seconds": options.seconds}
        write(options.json, settings | {"count": options.count}, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
