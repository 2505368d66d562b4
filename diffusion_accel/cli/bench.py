"""`bench`: compare settings, fewer steps and other accelerators on one model."""

from __future__ import annotations

import json
from contextlib import closing
from typing import Annotated

import typer

import diffusion_accel as api
from diffusion_accel.bench.entries import USUAL, check_entries, read_entries
from diffusion_accel.outputs import check_distinct, check_free, output_path

from .common_options import (
    BATCH,
    ROUNDS,
    AllowPickle,
    AsJson,
    Device,
    Dtype,
    GuidanceScale,
    Model,
    Overwrite,
    Pixels,
    PromptsFile,
    Quiet,
    Scheduler,
    Seed,
    StepsOr50,
    count_option,
    in_panels,
    number,
    settings_of,
)
from .prompts import read_jobs
from .terminal import Bar, say

_PANELS = {
    "What is drawn": "model prompts_file count steps guidance_scale scheduler width height seed",
    "How it is measured": "batch rounds converged",
    "Output": "html plot output markdown_file overwrite as_json quiet",
    "Machine": "device dtype allow_pickle",
}


@in_panels(_PANELS)
def bench(
    entries: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ENTRY]...", help="KIND or KIND:SETTINGS, such as reuse:hold:3, deepcache:3,0, fewer-steps:25."
        ),
    ] = None,
    model: Model = None,
    prompts_file: PromptsFile = None,
    count: Annotated[int, count_option(1, "How many prompts to use.")] = 16,
    steps: StepsOr50 = None,
    guidance_scale: GuidanceScale = None,
    scheduler: Scheduler = None,
    width: Pixels = None,
    height: Pixels = None,
    seed: Seed = 0,
    batch: Annotated[int, number("Images in a call, except for times.", BATCH)] = 8,
    rounds: Annotated[int, number("Timed rounds; every entry has its turn in each.", ROUNDS)] = 5,
    converged: Annotated[bool, typer.Option(help="Also measure the distance to many steps of a good solver.")] = True,
    html: Annotated[str | None, typer.Option(metavar="FILE", help="Write a page with images and plots.")] = None,
    plot: Annotated[str | None, typer.Option(metavar="FILE", help="Write the plot as SVG.")] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Write the numbers as JSON.")
    ] = None,
    markdown_file: Annotated[str | None, typer.Option("--markdown", metavar="FILE", help="Write the table.")] = None,
    overwrite: Overwrite = False,
    device: Device = None,
    dtype: Dtype = None,
    allow_pickle: AllowPickle = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure speed and fidelity of any set of settings against the plain model, times in turn.

    Entries: any feature with its settings (reuse:tuned:fast, encoder-reuse:schedule=paper), every plan of a tuned
    family (family:FILE), fewer steps (fewer-steps:STEPS[,SCHEDULER[,SPACING]]), several of these together
    (compiled:precision=bf16+reuse:tuned:balanced), other methods' forecasts in the place of steps
    (forecast:hermite,5,sample; hold, taylor, hermite, foca, spectrum, dmd, sada, easycache), and other accelerators,
    settings in this order or by name: deepcache:INTERVAL[,BRANCH], tomesd:RATIO, tgate:STEP, pab:RANGE,
    first-block:THRESHOLD, taylorseer:interval=3,order=2, mag:THRESHOLD[,SKIPS], sea:THRESHOLD, faster-cache:RANGE,
    dbcache:THRESHOLD[,FIRST], optimum-intel:PRECISION.
    """
    options = locals()
    parsed = read_entries(entries or USUAL)
    files = {"html": html, "plot": plot, "json": output, "markdown": markdown_file}
    flags = {"html": "--html", "plot": "--plot", "json": "--output", "markdown": "--markdown"}
    written = [output_path(file, flags[kind]) for kind, file in files.items() if file is not None]
    check_free(written, overwrite)
    check_distinct(written)
    settings, source = settings_of(options)
    check_entries(parsed, settings.steps or 50, settings.scheduler or "", source)
    prompts = None if prompts_file is None else [job.prompt for job in read_jobs([], prompts_file)][:count]

    from diffusion_accel.bench import report  # heavy: torch

    from .session import check_machine, check_texts  # heavy: torch, diffusers

    if source.kind != "embedded":
        check_texts(source, prompts, "fidelity depends on what is drawn", 1)
    with closing(Bar(quiet)) as bar:
        result = api.benchmark(
            settings.model,
            prompts,
            entries=parsed,
            steps=settings.steps,
            seed=seed,
            guidance_scale=settings.guidance_scale,
            height=settings.height,
            width=settings.width,
            scheduler=settings.scheduler,
            count=count,
            batch=batch,
            rounds=rounds,
            converged=converged,
            device=check_machine(settings),
            dtype=settings.dtype,
            allow_pickle=settings.allow_pickle,
            progress=bar,
        )
    for kind, file in files.items():
        if file is not None:
            report.write(result, kind, file)
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
    else:
        say(report.markdown(result), lines=True)
