"""Contact sheet of the embedded model: plain diffusers and a tuned plan side by side, and what that gained and lost.

    python scripts/demo.py -o demo

Writes contact-sheet.png, one image for each prompt and setting, and prints a table.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import diffusers
import torch
import transformers
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from diffusion_accel import AccelerationError, Reuse, accelerate
from diffusion_accel.image_files import save_image
from diffusion_accel.measure.comparison import Comparison, compare_calls
from diffusion_accel.measure.grids import grid
from diffusion_accel.outputs import check_writable
from diffusion_accel.pipelines.loading import load_pipeline
from diffusion_accel.pipelines.schedulers import set_scheduler
from diffusion_accel.reuse.plan_file import TunedPlan

PLAN = "tuned:ddim-balanced"
PROMPTS = [
    ("red apple, 3d style", 0),
    ("pizza, 3d style", 0),
    ("hamburger, flat style", 0),
    ("tiger face, noto style", 0),
    ("panda, twemoji style", 0),
    ("rocket, flat style", 4),
    ("sunflower, twemoji style", 5),
    ("rainbow, 3d style", 0),
]


def run(folder: Path, steps: int, rounds: int) -> None:
    """Draw all prompts plain and accelerated, and write the images and the sheet."""
    check_writable(folder)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    pipe = load_pipeline("sticker")
    set_scheduler(pipe, "ddim")
    pipe.set_progress_bar_config(disable=True)
    accelerate(pipe, Reuse(plan=PLAN, stretch=True))
    results: list[Comparison] = []
    for prompt, seed in track(PROMPTS, description="drawing", console=Console(stderr=True), transient=True):

        def call(pipe: Any, prompt: str = prompt, seed: int = seed) -> list[Image.Image]:
            generator = torch.Generator().manual_seed(seed)
            return pipe(prompt, num_inference_steps=steps, guidance_scale=3.0, generator=generator).images

        # the work is the same for every prompt: count it once
        results.append(compare_calls(pipe, call, rounds, results[0].flop_ratio if results else None))
        name = prompt.replace(",", "").replace(" ", "-")
        save_image(results[-1].baseline[0], folder / f"{name}-plain.png")
        save_image(results[-1].accelerated[0], folder / f"{name}-accelerated.png")
    half = len(PROMPTS) // 2
    rows, captions = [], []
    for left, right in zip(range(half), range(half, len(PROMPTS)), strict=False):
        rows.append([i for k in (left, right) for i in (results[k].baseline[0], results[k].accelerated[0])])
        captions.append(
            [f"{PROMPTS[k][0]}: {results[k].time_ratio:.1f}x, {results[k].psnr[0]:.0f} dB" for k in (left, right)]
        )
    full = sum(step.mode == "full" for step in TunedPlan.load(PLAN).plan.stretched(steps).steps)
    title = f"sticker, DDIM {steps} steps: plain diffusers and --reuse {PLAN}, {full} of {steps} steps computed"
    sheet = grid(rows, ["plain", "accelerated"] * 2, captions, scale=2, title=title)
    save_image(sheet, folder / "contact-sheet.png")
    print_table(results)
    print(f"images: {folder / 'contact-sheet.png'}")


def print_table(results: list[Comparison]) -> None:
    """Print a row a prompt, and the medians."""
    table = Table(
        "prompt", "time ratio", "FLOP ratio", "PSNR dB", "SSIM", title=f"--reuse {PLAN} against plain diffusers"
    )
    numbers = [(r.time_ratio, r.flop_ratio, r.psnr[0], r.ssim[0]) for r in results]
    for (prompt, _), row in zip(PROMPTS, numbers, strict=True):
        table.add_row(prompt, *_cells(row))
    table.add_section()
    medians = tuple(statistics.median(column) for column in zip(*numbers, strict=True))
    table.add_row("median", *_cells(medians))  # type: ignore[arg-type]
    Console(width=90).print(table)
    print("time and FLOP ratio: plain / accelerated, above 1 is faster; PSNR and SSIM: to the plain image")


def _cells(row: tuple[float, float, float, float]) -> tuple[str, str, str, str]:
    return f"{row[0]:.2f}", f"{row[1]:.2f}", f"{row[2]:.1f}", f"{row[3]:.3f}"


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("demo"), help="folder to write to (default: demo)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=2, help="timed pairs for each prompt")
    args = parser.parse_args()
    try:
        run(args.output, args.steps, args.rounds)
    except AccelerationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
