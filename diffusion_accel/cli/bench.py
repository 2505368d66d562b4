"""`bench`: compare settings, fewer steps and other accelerators on one model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from diffusion_accel.bench.entries import Entry
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import replacing
from diffusion_accel.outputs import check_distinct, check_free, output_path

from .common_options import (
    BATCH,
    ROUNDS,
    AllowPickle,
    AsJson,
    Debug,
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
    number,
    settings_of,
)
from .prompts import read_jobs
from .terminal import console, say
from .tune import embedded_prompts

UNSEEN = 200  # of the embedded model's prompts: those that `tune` begins with are left to it
USUAL = "reuse:hold:2 reuse:hold:3 reuse:deepcache:3 reuse:faster-diffusion encoder-reuse fewer-steps:25 fewer-steps:17"


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
    debug: Debug = False,
) -> None:
    """Measure speed and fidelity of any set of settings against the plain model, times in turn.

    Entries: any feature with its settings (reuse:tuned:fast, encoder-reuse:schedule=paper), fewer steps
    (fewer-steps:STEPS[,SCHEDULER]), and other packages if they are installed: deepcache:n[,branch], tomesd:ratio,
    tgate:step, pab:range.
    """
    options = locals()
    parsed = [Entry.parse(text) for text in entries or USUAL.split()]
    if len(set(parsed)) < len(parsed):
        raise ConfigurationError("an entry is given twice")
    files = {"html": html, "plot": plot, "output": output, "markdown": markdown_file}
    written = [output_path(file, f"--{name}") for name, file in files.items() if file is not None]
    check_free(written, overwrite)
    check_distinct(written)
    settings, source = settings_of(options)
    for entry in parsed:
        if reason := entry.refusal(settings.steps or 50, settings.scheduler or ""):
            raise ConfigurationError(f"the entry {entry.name} cannot work: {reason}")
    if prompts_file is not None:
        prompts = [job.prompt for job in read_jobs([], prompts_file)][:count]
    else:
        prompts = embedded_prompts(count, UNSEEN) if source.kind == "embedded" else [""] * count

    import torch

    from diffusion_accel.bench import report, run
    from diffusion_accel.bench.runner import Job

    from .session import check_machine

    call = {"guidance_scale": settings.guidance_scale, "height": settings.height, "width": settings.width}
    job = Job(
        model=settings.model,
        prompts=tuple(prompts),
        steps=settings.steps or 50,
        scheduler=settings.scheduler,
        seed=seed,
        batch=batch,
        device=check_machine(settings),
        dtype=settings.dtype,
        allow_pickle=settings.allow_pickle,
        threads=torch.get_num_threads(),
        options=call,
    )
    with Status(quiet) as status:
        result = run.bench(job, parsed, rounds, converged, status)
    texts = {
        "html": lambda: report.page(result),
        "plot": lambda: report.plot(result, "psnr", "PSNR to the baseline, dB"),
        "output": lambda: json.dumps(result.to_dict(), indent=1) + "\n",
        "markdown": lambda: report.markdown(result),
    }
    for name, file in files.items():
        if file is not None:
            with replacing(Path(file)) as temporary:
                temporary.write_text(texts[name](), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(result.to_dict()))
    else:
        say(report.markdown(result), lines=True)


class Status:
    """The line that says what is being done."""

    def __init__(self, quiet: bool) -> None:
        self.console = console(err=True, quiet=quiet)
        self.status = self.console.status("")

    def __enter__(self) -> Status:
        if self.console.is_terminal:
            self.status.start()
        return self

    def __call__(self, what: str, share: float = 0.0, left: float | None = None) -> None:
        self.status.update(self.console.render_str(what))

    def __exit__(self, *exception: object) -> None:
        self.status.stop()
