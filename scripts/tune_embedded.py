#!/usr/bin/env python3
"""Make what ships beside the embedded models: families of plans, and learned solvers.

    python scripts/tune_embedded.py ddim --seconds 900      # sticker
    python scripts/tune_embedded.py dpm --seconds 600       # sticker
    python scripts/tune_embedded.py flow --seconds 900      # sticker-dit
    python scripts/tune_embedded.py solver --seconds 900    # --model sticker-dit: the other one
    python scripts/tune_embedded.py solver --seconds 900 --evaluations 8 --keep-timesteps --out runs/eight
    python scripts/tune_embedded.py merge runs/eight runs/ten    # their solvers take the place of those that ship
    python scripts/tune_embedded.py retime     # the speed-ups of all families once more, in CPU time of one thread

Calibrated on captions of the kind the models were trained on and on what people type (`data/varied_prompts.txt`): a
third of the images by which computed steps are chosen, half of the others that fits see. Measured on other captions.
Writes into `diffusion_accel/assets`, or into --out.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import diffusion_accel
from diffusion_accel import LearnedMultistepScheduler
from diffusion_accel.evaluation.prompts import embedded_prompts
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.model_files.names import EMBEDDED
from diffusion_accel.pipelines.schedulers import set_scheduler
from diffusion_accel.reuse.plan_family import PlanFamily
from diffusion_accel.schedulers.solver import read_file
from diffusion_accel.tuning.measure import reusing

ASSETS = Path(diffusion_accel.__file__).parent / "assets"
VARIED = Path(__file__).parent / "data" / "varied_prompts.txt"
CALL: dict[str, Any] = {"guidance_scale": 3.0, "height": 96, "width": 96}


class Family(NamedTuple):
    """A family that ships: of which model, with which scheduler (None: its own) and steps, the evaluations of the
    plans, and what some of them are called."""

    model: str
    scheduler: str | None
    steps: int
    names: dict[int, str]


FAMILIES = {
    "ddim": Family("sticker", "ddim", 50, {5: "", 6: "fast", 8: "balanced", 10: "", 14: "quality", 18: ""}),
    "dpm": Family("sticker", "dpm++", 20, {4: "", 5: "fast", 6: "", 8: "balanced", 11: "quality"}),
    "flow": Family("sticker-dit", None, 28, {5: "", 6: "", 8: "fast", 10: "balanced", 13: "quality", 16: ""}),
}
UNSEEN = 1000  # how many captions are passed by before those that measure
SIZES = (5, 6, 8, 10, 12)  # evaluations of the solver
SOLVERS = Path("solvers")


def opened(model: str, scheduler: str | None = None) -> Any:
    """An embedded model that shows no bars."""
    pipe: Any = diffusion_accel.load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    if scheduler is not None:
        set_scheduler(pipe, scheduler)
    return pipe


def prompts(count: int) -> list[str]:
    """Captions, with what people type for every third, of which rollouts are compared; captions with that for half of
    them, which fits see as well; other captions, on which the result is measured. So many of each: the last third is
    held out, as `tune` has it.
    """
    compared = range(2, count, 3)
    fitted = [i for i in range(count, 2 * count) if i // 2 % 2]  # fits are judged by even and odd images: some of each
    typed = itertools.cycle(VARIED.read_text(encoding="utf-8").splitlines())
    mixed = embedded_prompts(2 * count)
    for i, text in zip([*compared, *fitted], typed, strict=False):
        mixed[i] = text
    return mixed + embedded_prompts(count, UNSEEN)


def retime(folder: Path, rounds: int = 9) -> None:
    """Measure the speed-ups of all families again: CPU time of single images, in turn with the baseline, so that other
    work on the machine does not count."""
    for name, (model, scheduler, steps, _) in FAMILIES.items():
        pipe = opened(model, scheduler)
        family = PlanFamily.load(folder / "plans" / f"{name}.json")
        one = Sampler(pipe, tuple(embedded_prompts(1, UNSEEN)), steps, 1000, 1, CALL)
        ratios: list[list[float]] = [[] for _ in family.members]
        for turn in range(rounds + 1):
            whole = cpu_seconds(one)
            for plan, own in zip(family.members, ratios, strict=True):
                with reusing(pipe, plan.plan):
                    part = cpu_seconds(one)
                if turn:  # the first round warms up
                    own.append(whole / part)
        members = [
            replace(plan, measured=plan.measured | {"time_ratio": round(statistics.median(own), 3)})
            for plan, own in zip(family.members, ratios, strict=True)
        ]
        PlanFamily.of(members, search=family.search).save(folder / "plans" / f"{name}.json", overwrite=True)
        for plan in members:
            print(name, plan.name, plan.evaluations, plan.speedup, plan.psnr_median, plan.psnr_worst_decile)


def cpu_seconds(sampler: Sampler) -> float:
    """CPU time of the images of a sampler."""
    began = time.process_time()
    with torch.inference_mode():
        sampler.images()
    return time.process_time() - began


def told(what: str, share: float = 0.0, left: float | None = None) -> None:
    """Progress, a line each."""
    print(f"{share:4.0%} {what}" + (f", {left:.0f} s left" if left is not None else ""), flush=True)


def merge(model: str, folder: Path, others: Sequence[Path]) -> None:
    """Put the solvers of other folders in the place of those of a folder, or beside them, with their measurements."""
    whole = read_file(folder / SOLVERS / model)
    for other in others:
        new = read_file(other / SOLVERS / model)
        for n, solver in new["solvers"].items():
            before = whole["solvers"].get(n, {})
            if solver["timesteps"] == before.get("timesteps") and "start" in before:
                solver.setdefault("start", before["start"])
        whole["solvers"] |= new["solvers"]
        whole["made_for"]["measured"] |= new["made_for"]["measured"]
    LearnedMultistepScheduler.from_config(whole).save_pretrained(folder / SOLVERS / model)
    for n, numbers in whole["made_for"]["measured"].items():
        print(n, numbers["psnr_median"], numbers["psnr_worst_decile"], numbers["psnr_floor"])


def main() -> int:
    """Tune one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=(*FAMILIES, "solver", "merge", "retime"))
    parser.add_argument("--model", choices=tuple(EMBEDDED), default="sticker", help="solver, merge: of which model")
    parser.add_argument("folders", type=Path, nargs="*", help="merge: what `solver` wrote")
    parser.add_argument("--seconds", type=float, default=900.0, help="time budget of the search")
    parser.add_argument("--count", type=int, default=24, help="images that measure; twice as many calibrate")
    parser.add_argument("--batch", type=int, default=8, help="images in a call")
    parser.add_argument("--evaluations", type=int, nargs="+", default=SIZES, help="solver: only these")
    parser.add_argument("--keep-timesteps", action="store_true", help="solver: those of the one that ships")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder to write into")
    options = parser.parse_args()
    if options.what == "retime":
        retime(options.out)
        return 0
    if options.what == "merge":
        merge(options.model, options.out, options.folders)
        return 0
    common: dict[str, Any] = CALL | {"seconds": options.seconds, "progress": told, "seed": 20_000}
    common["batch"] = options.batch
    texts = prompts(options.count)
    if options.what == "solver":
        pipe = opened(options.model)
        start = LearnedMultistepScheduler.for_model(options.model) if options.keep_timesteps else None
        made = diffusion_accel.tune_solver(pipe, texts, options.evaluations, start=start, **common)
        made.save_pretrained(options.out / SOLVERS / options.model)
        print(made.config.made_for["measured"])
        return 0
    model, scheduler, steps, names = FAMILIES[options.what]
    pipe = opened(model, scheduler)
    family: Any = diffusion_accel.tune(pipe, texts, steps=steps, computed_steps=tuple(names), images=1e6, **common)
    members = [replace(plan, name=names.get(plan.evaluations, "")) for plan in family.members]
    named = PlanFamily.of(members, search=family.search)
    (options.out / "plans").mkdir(parents=True, exist_ok=True)
    named.save(options.out / "plans" / f"{options.what}.json", overwrite=True)
    for plan in named.members:
        print(plan.name, plan.evaluations, plan.speedup, plan.psnr_median, plan.psnr_worst_decile, plan.psnr_floor)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
