"""Contact sheet of the embedded models: plain diffusers and a tuned plan side by side, and what that gained and lost.

    python scripts/demo.py -o demo

Writes contact-sheet.png, one image for each prompt and setting, and prints a table.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

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
from diffusion_accel.conditioning import own_arguments
from diffusion_accel.image_files import save_image
from diffusion_accel.measure.comparison import Comparison, compare_calls
from diffusion_accel.measure.grids import grid
from diffusion_accel.outputs import check_writable
from diffusion_accel.pipelines.loading import load_pipeline
from diffusion_accel.pipelines.schedulers import set_scheduler
from diffusion_accel.reuse.plan_file import TunedPlan


class Drawn(NamedTuple):
    """A model, what draws with it, and what makes it faster."""

    model: str
    scheduler: str | None
    steps: int
    plan: str


MODELS = [
    Drawn("sticker", "ddim", 50, "tuned:ddim-balanced"),
    Drawn("sticker-dit", None, 28, "tuned:flow-balanced"),
]
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


def run(folder: Path, rounds: int) -> None:
    """Draw all prompts plain and accelerated, and write the images and the sheet."""
    check_writable(folder)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    results = [compare(drawn, rounds) for drawn in MODELS]
    for drawn, rows in zip(MODELS, results, strict=True):
        for (prompt, _), row in zip(PROMPTS, rows, strict=True):
            name = f"{drawn.model}-{prompt.replace(',', '').replace(' ', '-')}"
            save_image(row.baseline[0], folder / f"{name}-plain.png")
            save_image(row.accelerated[0], folder / f"{name}-accelerated.png")
        print_table(drawn, rows)
    save_image(sheet(results), folder / "contact-sheet.png")
    print("time and FLOP ratio: plain / accelerated, above 1 is faster; PSNR and SSIM: to the plain image")
    print(f"images: {folder / 'contact-sheet.png'}")


def compare(drawn: Drawn, rounds: int) -> list[Comparison]:
    """Each prompt plain and accelerated, in turn."""
    pipe: Any = load_pipeline(drawn.model)
    if drawn.scheduler is not None:
        set_scheduler(pipe, drawn.scheduler)
    pipe.set_progress_bar_config(disable=True)
    accelerate(pipe, Reuse(plan=drawn.plan))
    options = own_arguments(pipe, {"guidance_scale": 3.0, "height": 96, "width": 96})
    results: list[Comparison] = []
    console, what = Console(stderr=True), f"drawing with {drawn.model}, plain and accelerated"
    if not console.is_terminal:  # a log: one line, as there is no bar
        print(f"{what}: {len(PROMPTS)} prompts", file=sys.stderr)
    told = track(PROMPTS, description=what, console=console, transient=True, disable=not console.is_terminal)
    for prompt, seed in told:

        def call(pipe: Any, prompt: str = prompt, seed: int = seed) -> list[Image.Image]:
            generator = torch.Generator().manual_seed(seed)
            return pipe(prompt, num_inference_steps=drawn.steps, generator=generator, **options).images

        # the work is the same for every prompt: count it once
        results.append(compare_calls(pipe, call, rounds, results[0].flop_ratio if results else None))
    return results


def sheet(results: list[list[Comparison]]) -> Image.Image:
    """A row for each prompt; plain and accelerated for each model."""
    rows, captions = [], []
    for (prompt, _), row in zip(PROMPTS, zip(*results, strict=True), strict=True):
        rows.append([image for r in row for image in (r.baseline[0], r.accelerated[0])])
        captions.append([f"{prompt}: {r.time_ratio:.1f}x, {r.psnr[0]:.0f} dB" for r in row])
    columns = [label for drawn in MODELS for label in (f"{drawn.model}, plain", drawn.plan.removeprefix("tuned:"))]
    return grid(rows, columns, captions, scale=2, title="plain diffusers, and --reuse with a tuned plan")


def print_table(drawn: Drawn, results: list[Comparison]) -> None:
    """Print a row a prompt, and the medians."""
    computed = sum(step.mode == "full" for step in TunedPlan.load(drawn.plan).plan.for_steps(drawn.steps).steps)
    title = f"{drawn.model} with --reuse {drawn.plan}: {computed} of {drawn.steps} steps computed"
    table = Table("prompt", "time ratio", "FLOP ratio", "PSNR dB", "SSIM", title=title)
    numbers = [(r.time_ratio, r.flop_ratio, r.psnr[0], r.ssim[0]) for r in results]
    for (prompt, _), row in zip(PROMPTS, numbers, strict=True):
        table.add_row(prompt, *_cells(row))
    table.add_section()
    medians = tuple(statistics.median(column) for column in zip(*numbers, strict=True))
    table.add_row("median", *_cells(medians))  # type: ignore[arg-type]
    Console(width=90).print(table)


def _cells(row: tuple[float, float, float, float]) -> tuple[str, str, str, str]:
    return f"{row[0]:.2f}", f"{row[1]:.2f}", f"{row[2]:.1f}", f"{row[3]:.3f}"


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("demo"), help="folder to write to (default: demo)")
    parser.add_argument("--rounds", type=int, default=1, help="timed pairs for each prompt")
    args = parser.parse_args()
    try:
        run(args.output, args.rounds)
    except AccelerationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
