"""`accelerate`: a model made fast and small, as a folder with its recipe."""

from __future__ import annotations

import json
from contextlib import closing
from shlex import quote
from typing import Annotated

import typer

import diffusion_accel as api
from diffusion_accel import interrupts
from diffusion_accel.conditioning import usual_texts
from diffusion_accel.making.wish import LEAST_PROMPTS, check_wish
from diffusion_accel.outputs import check_free_folder, output_path, work_folder

from .common_options import (
    SECONDS,
    AllowPickle,
    AsJson,
    Batch,
    Device,
    GuidanceScale,
    Overwrite,
    Pixels,
    PromptsFile,
    Quiet,
    Restart,
    Scheduler,
    Seed,
    StepsOr50,
    count_option,
    in_panels,
    settings_of,
    time_option,
)
from .prompts import texts_of
from .terminal import Bar, say

_PANELS = {
    "Output": "output overwrite restart as_json quiet",
    "Target": "min_psnr max_size budget",
    "Prompts": "prompts_file count seed",
    "What it is for": "steps guidance_scale scheduler width height",
    "Machine": "batch device allow_pickle",
}


@in_panels(_PANELS)
def accelerate(
    model: Annotated[str, typer.Argument(help="Embedded name, hub id, folder, or .safetensors file.")],
    output: Annotated[str, typer.Option("--output", "-o", metavar="DIR", help="The pipeline folder to write.")],
    min_psnr: Annotated[
        float, typer.Option(help="The median PSNR to the model as it was, all together. (5 to 80 dB)")
    ] = 40.0,
    max_size: Annotated[
        float | None,
        typer.Option(help="The most that the denoiser may take on disk, as a share of float32.", show_default="1"),
    ] = None,
    budget: Annotated[float, time_option("Time for the searches", SECONDS, show_default="20m")] = 1200.0,
    prompts_file: PromptsFile = None,
    count: Annotated[int, count_option(LEAST_PROMPTS)] = 96,
    seed: Seed = 0,
    steps: StepsOr50 = None,
    guidance_scale: GuidanceScale = None,
    scheduler: Scheduler = None,
    width: Pixels = None,
    height: Pixels = None,
    batch: Batch = 8,
    restart: Restart = False,
    overwrite: Overwrite = False,
    device: Device = None,
    allow_pickle: AllowPickle = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Make a model fast: tune, quantize to a size, check both together, write a folder with its recipe and a report.

    `generate --model DIR` then draws so. An interrupted run goes on from where it was when it is called again; what
    lies between is kept in DIR.work. With another --min-psnr only the choice is made anew.
    """
    options = locals()
    check_wish(min_psnr, max_size, budget, steps)
    folder = output_path(output)
    check_free_folder(folder, overwrite)
    work = work_folder(folder)
    interrupts.explain(lambda: interrupts.how_to_go_on(work, work.is_dir()))
    settings, source = settings_of(options)
    texts = texts_of(prompts_file, count, source, LEAST_PROMPTS)

    from diffusion_accel.pipelines.loading import load_pipeline  # heavy: torch, diffusers

    from .session import check_machine, check_texts, open_for  # heavy: torch, diffusers

    check_texts(source, texts, "what is kept depends on the kind of prompts", LEAST_PROMPTS)
    pipe = open_for(settings, source, check_machine(settings), promptless=True)
    with closing(Bar(quiet)) as bar:
        found = api.make_fast(
            pipe, texts or usual_texts(pipe, count), folder, min_psnr=min_psnr, max_size=max_size, seconds=budget,
            steps=settings.steps or 50, seed=seed, guidance_scale=settings.guidance_scale, height=settings.height,
            width=settings.width, batch=batch, overwrite=overwrite, restart=restart, progress=bar, source=source,
            load=load_pipeline,
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        say(found.text(), lines=True)
        say(f"draw with it: diffusion-accel generate … --model {quote(str(output))}")
        say(f"what was tried, with images: {folder / 'report.html'}")
