#!/usr/bin/env python3
"""Whether forecasting what is reused is better than reusing it as it is: PSNR by order, per prompt, and what it costs.

python scripts/measure_forecasts.py --count 20
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from diffusion_accel import Reuse, accelerate
from diffusion_accel.evaluation.prompts import embedded_prompts
from diffusion_accel.measure.fidelity import psnr
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.measure.timing import interleaved, ratios
from diffusion_accel.model_files.names import EMBEDDED
from diffusion_accel.pipelines.schedulers import set_scheduler

BASELINES = (("ddim", 50), ("dpm++", 20))
PRESETS: tuple[str, ...] = (
    "hold:2",
    "hold:3",
    "hold:5",
    "hold:2,epsilon",
    "hold:3,epsilon",
    "deepcache:2",
    "deepcache:3",
    "deepcache:5",
)
PRESETS += ("shallow:3,4", "uniform:3")


def main() -> int:
    """Measure, and print a table row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20, help="prompts")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved timings of one image")
    options = parser.parse_args()
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(EMBEDDED["sticker"].path)
    pipe.set_progress_bar_config(disable=True)
    prompts = tuple(embedded_prompts(options.count))
    print("| baseline | preset | order | PSNR dB, median | better than order 0 on | time against order 0 | cache KiB |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for scheduler, steps in BASELINES:
        set_scheduler(pipe, scheduler)
        sampler = Sampler(pipe, prompts, steps, options={"guidance_scale": 3.0, "height": 96, "width": 96})
        plain = sampler.images()
        for preset in PRESETS:
            values, cache = [], [0.0] * 3
            for order in range(3):
                accelerate(pipe, Reuse(plan=f"{preset}@{order}"))
                values.append(psnr(plain, sampler.images()).clamp(max=80))

            @contextmanager
            def of_order(order: int, preset: str = preset, cache: list[float] = cache) -> Iterator[None]:
                accelerate(pipe, Reuse(plan=f"{preset}@{order}"))
                yield
                cache[order] = pipe.acceleration.report().counters["reuse"]["peak_cache_bytes"] / 1024

            calls = dict.fromkeys(range(3), sampler.part(0, 1).images)
            took = interleaved(calls, options.rounds, warmup=0, around=of_order)
            pipe.acceleration.remove()
            for order in range(3):
                share = float((values[order] > values[0]).double().mean())
                ratio = statistics.median(ratios(took[order], took[0]))
                print(
                    f"| {scheduler} {steps} | {preset} | {order} | {float(values[order].median()):.1f} | "
                    + (f"{share:.0%} | {ratio:.3f}" if order else "– | 1")
                    + f" | {cache[order]:.0f} |",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
