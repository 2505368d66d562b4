#!/usr/bin/env python3
"""Plans without tuning beside each other: auto, presets of every order, other methods' rules, and fewer steps.

python scripts/measure_auto.py --model sticker --model runs/dit/pipeline --count 12

Auto learns from one call with another seed. Each line is one way, grouped by evaluations of the denoiser; what a group
is compared by is the line "fewer-steps" in it, the same scheduler in as many steps.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffusion_accel.bench.entries import Entry
from diffusion_accel.bench.runner import Job, Runner
from diffusion_accel.conditioning import CLASS, PROMPT, condition_of
from diffusion_accel.denoisers import find_denoisers, not_a_unet
from diffusion_accel.errors import AccelerationError
from diffusion_accel.evaluation.prompts import embedded_prompts
from diffusion_accel.flops import count_flops
from diffusion_accel.measure.fidelity import psnr, spread
from diffusion_accel.pipelines.loading import load_pipeline

BASELINES = "ddim:50,dpm++:20,euler:30,unipc:20"
INTERVALS = (2, 3, 5)
ADAPTIVE = ("forecast:sada", "forecast:easycache")
TEACHING = 987_654  # the seed of the image that auto learns from


def entries(steps: int, unet: bool) -> Iterator[tuple[str, list[str]]]:
    """Groups of entries, with the evaluations that they are for."""
    yield "auto by itself", ["reuse:auto", *ADAPTIVE]
    for n in INTERVALS:
        names = [f"reuse:auto:{n}", *(f"reuse:hold:{n}@{order}" for order in range(3)), f"reuse:hold:{n},epsilon@0"]
        names += [f"reuse:deepcache:{n}@{order}" for order in (0, 1)] if unet else []
        names += [f"forecast:hermite,{n}", f"fewer-steps:{-(-steps // n)}"]
        yield f"{-(-steps // n)} of {steps}", names


def measure(runner: Runner, name: str, plain: torch.Tensor, flops: float) -> dict[str, Any]:
    """Fidelity and cost of one entry."""
    entry = Entry.parse(name)
    if name.startswith("reuse:auto"):  # taught by an image that is not measured
        with runner.active(entry, sampler=replace(runner.sampler.part(0, 1), seed=TEACHING)) as sampler:
            sampler.images()
    with runner.active(entry) as sampler:
        images = sampler.images()
    with runner.active(entry, sampler=runner.sampler.part(0, 1)) as sampler, count_flops() as count:
        calls = Calls(runner.pipe)
        sampler.images()
    values = psnr(plain, images)
    median, worst = spread(values)
    line = {"entry": name, "calls": calls.stop(), "flops": flops / count.total}
    line |= {"median": round(median, 2), "worst_decile": round(worst, 2)}
    return line | {"psnr": [round(float(v), 2) for v in values.clamp(max=200)]}


class Calls:
    """Counts the calls of the denoisers that compute something: those in which their first layer runs."""

    def __init__(self, pipe: Any) -> None:
        self.count = 0
        kinds = (torch.nn.Linear, torch.nn.Conv2d)
        first = [next(m for m in denoiser.modules() if isinstance(m, kinds)) for denoiser in find_denoisers(pipe)]
        self.handles = [layer.register_forward_pre_hook(self._note) for layer in first]

    def _note(self, *_: Any) -> None:
        self.count += 1

    def stop(self) -> int:
        """The count; the hooks are gone."""
        for handle in self.handles:
            handle.remove()
        return self.count


def prompts_for(pipe: Any, count: int) -> tuple[str, ...]:
    """Prompts, classes, or nothing, whatever the pipeline is called with."""
    kind = condition_of(pipe)
    if kind == PROMPT:
        return tuple(embedded_prompts(count))
    return tuple(str((17 * i + 3) % 280) for i in range(count)) if kind == CLASS else ("",) * count


def run(model: str, scheduler: str, steps: int, count: int) -> Iterator[dict[str, Any]]:
    """Every entry on one model, scheduler and number of steps."""
    called = next(part for part in reversed(Path(model).parts) if part != "pipeline")
    pipe = load_pipeline(model)
    pipe.set_progress_bar_config(disable=True)
    options = {} if condition_of(pipe) not in (PROMPT, CLASS) else {"guidance_scale": 3.0}
    options |= {"height": 96, "width": 96} if condition_of(pipe) == PROMPT else {}
    job = Job(model, prompts_for(pipe, count), steps, scheduler, batch=count, options=options)
    runner = Runner(job, pipe)
    plain = runner.images(Entry("baseline"))
    with count_flops() as whole:
        runner.sampler.part(0, 1).images()
    unet = all(not_a_unet(denoiser) is None for denoiser in find_denoisers(pipe))
    for group, names in entries(steps, unet):
        for name in names:
            try:
                line = measure(runner, name, plain, whole.total)
            except AccelerationError as error:
                line = {"entry": name, "refused": str(error)}
            yield {"model": called, "baseline": f"{scheduler} {steps}", "group": group} | line


def shown(line: dict[str, Any]) -> str:
    """One row of the table."""
    head = f"| {line['model']} | {line['baseline']} | {line['group']} | {line['entry']} | "
    if "refused" in line:
        return head + f"refused: {line['refused'][:60]} | | | |"
    return head + f"{line['calls']} | {line['flops']:.2f} | {line['median']:.1f} | {line['worst_decile']:.1f} |"


def main() -> int:
    """Measure, and print a table row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="embedded name or pipeline folder (default: sticker)")
    parser.add_argument("--baselines", default=BASELINES, help="scheduler:steps, with commas between")
    parser.add_argument("--count", type=int, default=12, help="images")
    parser.add_argument("--json", type=Path, help="also write every image's PSNR into this file, one line an entry")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | baseline | computed | entry | calls | FLOP ratio | PSNR dB | worst decile |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DIFFUSION_ACCEL_AUTO"] = str(Path(folder) / "auto.json")
        for model in options.model or ["sticker"]:
            for baseline in options.baselines.split(","):
                scheduler, _, steps = baseline.partition(":")
                for line in run(model, scheduler, int(steps), options.count):
                    print(shown(line), flush=True)
                    if options.json:
                        with options.json.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(line) + "\n")
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
