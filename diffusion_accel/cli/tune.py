"""`tune`: search the reuse plan of a pipeline and write it as a file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from diffusion_accel import interrupts
from diffusion_accel.conditioning import PROMPT, condition_of, usual_texts
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.generation.request import LIMITS, at_least
from diffusion_accel.io import printable
from diffusion_accel.outputs import check_free, output_path
from diffusion_accel.pipelines.schedulers import check_scheduler
from diffusion_accel.tuning.state import read_search

from .common_options import BATCH, SECONDS, AsJson, Debug, Model, Quiet, check_range, number, recommended
from .prompts import read_jobs
from .settings import DTYPES, merge
from .terminal import say

COUNT = at_least(6, 100_000)  # the search needs some, and others to test what it found
_TARGET = {"rich_help_panel": "Target (one of them)"}
_PROMPTS = {"rich_help_panel": "Prompts"}
_CALL = {"rich_help_panel": "What the plan is for"}
_SEARCH = {"rich_help_panel": "Search"}
_MACHINE = {"rich_help_panel": "Machine"}


def tune(
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="The plan to write, a .json file.")],
    model: Model = None,
    speedup: Annotated[
        float | None, typer.Option(help="The best fidelity at this speed-up. (above 1)", **_TARGET)
    ] = None,
    min_psnr: Annotated[
        float | None, typer.Option(help="The highest speed-up at this median PSNR. (5 to 80 dB)", **_TARGET)
    ] = None,
    prompts_file: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A prompt a line, 24 or more; the embedded model needs none.", **_PROMPTS),
    ] = None,
    prompts: Annotated[int, number("How many prompts to use, or images to draw.", COUNT, "--count", **_PROMPTS)] = 24,
    seed: Annotated[int, typer.Option(help="Image k uses seed + k.", **_PROMPTS)] = 0,
    steps: Annotated[
        int | None,
        number("Denoising steps.", LIMITS["steps"], show_default="20 with sticker, else 50", **_CALL),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        number(
            "Classifier-free guidance; 1 switches it off.",
            LIMITS["guidance_scale"],
            show_default=recommended("guidance_scale"),
            **_CALL,
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="ddim, dpm++, euler, unipc, … or a diffusers class.", show_default=recommended("scheduler"), **_CALL
        ),
    ] = None,
    width: Annotated[int | None, number("Pixels.", LIMITS["width"], show_default=recommended("width"), **_CALL)] = None,
    height: Annotated[
        int | None, number("Pixels.", LIMITS["height"], show_default=recommended("height"), **_CALL)
    ] = None,
    try_steps: Annotated[
        list[int] | None,
        number("A number of steps that the plan may use instead; repeatable.", LIMITS["steps"], **_SEARCH),
    ] = None,
    try_scheduler: Annotated[
        list[str] | None, typer.Option(help="A scheduler that the plan may use instead; repeatable.", **_SEARCH)
    ] = None,
    batch: Annotated[int, number("Images in a call.", BATCH, **_SEARCH)] = 8,
    budget: Annotated[float, number("Seconds for the search.", SECONDS, **_SEARCH)] = 300.0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a search that was stopped.", **_SEARCH)] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, mps, …", show_default="the best one here", **_MACHINE)
    ] = None,
    dtype: Annotated[str | None, typer.Option(help=", ".join(DTYPES) + ".", show_default="float32", **_MACHINE)] = None,
    allow_pickle: Annotated[
        bool | None, typer.Option("--allow-pickle", help="Also load pickled weights, which can run code.", **_MACHINE)
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Find out which steps a pipeline must compute: writes a plan for --reuse.

    Give either --speedup or --min-psnr. The plan is valid for this model, scheduler and number of steps.
    """
    if not output.endswith(".json"):
        raise ConfigurationError(f"--output must end in .json, got {output}")
    for name, value, bounds in (("count", prompts, COUNT), ("batch", batch, BATCH), ("budget", budget, SECONDS)):
        check_range(f"--{name}", value, bounds)
    for number_of_steps in try_steps or []:
        check_range("--try-steps", number_of_steps, LIMITS["steps"])
    check_free([output_path(output)], overwrite)
    state, begun = Path(f"{output}.search"), resume

    def how_to_go_on() -> str:
        kept = begun and Path(output) not in interrupts.finished() and any(state.parent.glob(f"{state.name}*"))
        return f"call it again with --resume to go on from here ({state})" if kept else interrupts.names()

    interrupts.explain(how_to_go_on)
    given = {"model": model, "steps": steps, "guidance_scale": guidance_scale, "scheduler": scheduler, "seed": seed}
    given |= {"width": width, "height": height, "device": device, "dtype": dtype, "allow_pickle": allow_pickle}
    settings, source = merge(given, {})
    if prompts_file is not None:
        texts = [job.prompt for job in read_jobs([], prompts_file)][:prompts]
    elif source.kind == "embedded":
        texts = embedded_prompts(prompts)
    else:
        texts = []

    for name in try_scheduler or []:
        check_scheduler(name)
    state = Path(f"{output}.search")
    if resume:
        for file in search_files(state):
            read_search(file)

    from diffusion_accel.tuning.tuner import Target
    from diffusion_accel.tuning.tuner import tune as search

    from .session import check_machine, open_for

    Target(speedup, min_psnr)
    pipe: Any = open_for(settings, source, check_machine(settings), promptless=True)
    if not texts:
        if condition_of(pipe) == PROMPT:
            raise ConfigurationError("--prompts-file is needed: a plan is tuned on the kind of prompts it is used with")
        texts = usual_texts(pipe, prompts)
    from diffusion_accel.pipelines.schedulers import set_scheduler

    own, others = pipe.scheduler, []
    for name in try_scheduler or []:
        set_scheduler(pipe, name)
        others.append(pipe.scheduler)
        pipe.scheduler = own
    begun = True
    if not resume:
        forget(state)
    options = {"guidance_scale": settings.guidance_scale, "height": settings.height, "width": settings.width}
    bar = Bar(quiet)
    try:
        plan = search(
            pipe,
            texts,
            steps=settings.steps or 50,
            speedup=speedup,
            min_psnr=min_psnr,
            seconds=budget,
            seed=seed,
            batch=batch,
            state=state,
            progress=bar,
            try_steps=tuple(try_steps or ()),
            try_schedulers=tuple(others),
            **options,
        )
    finally:
        bar.close()
    with interrupts.undivided():
        plan.save(Path(output), overwrite)
        forget(state)
    if as_json:
        typer.echo(json.dumps({"file": output, "measured": plan.measured, "search": plan.search}))
    else:
        show(output, plan)


def forget(state: Path) -> None:
    """Remove the files of a search."""
    for file in search_files(state):
        file.unlink()


def search_files(state: Path) -> list[Path]:
    """The files of a search: one for each scheduler and number of steps that it tries."""
    own = re.compile(rf"{re.escape(state.name)}(\.[0-9]+)?")
    folder = state.parent
    return sorted(f for f in folder.iterdir() if own.fullmatch(f.name)) if folder.is_dir() else []


def embedded_prompts(count: int, skip: int = 0) -> list[str]:
    """Captions of the embedded model's training images, the same ones every time, behind the `skip` first."""
    from diffusion_accel.evaluation import quality

    return quality.embedded_prompts(count, skip)


class Bar:
    """A progress bar over the time budget, with the best plan so far."""

    def __init__(self, quiet: bool) -> None:
        from tqdm import tqdm

        form = "{desc} |{bar}| {percentage:3.0f}%"
        self.bar: Any = tqdm(total=100, bar_format=form, disable=True if quiet else None, leave=False)

    def __call__(self, text: str, share: float) -> None:
        self.bar.set_description_str(printable(text), refresh=False)
        self.bar.update(max(0, round(100 * share) - self.bar.n))
        self.bar.refresh()

    def close(self) -> None:
        self.bar.close()


def show(output: str, plan: Any) -> None:
    measured, steps = plan.measured, plan.plan.steps
    words = {"full": "full", "hold": "held", "shallow": "shallow", "decoder": "decoder only"}
    counts = {m: sum(step.mode == m for step in steps) for m in words}
    parts = [f"{n} {words[m]}" for m, n in counts.items() if n]
    alone = sum(step.guidance == "reuse" for step in steps)
    scheduler = plan.conditions["scheduler"]
    say(
        f"{output}: {scheduler}, {len(steps)} steps, {', '.join(parts)}"
        + (f", {alone} without guidance" if alone else "")
    )
    say(
        f"on {measured['pictures']} prompts the search did not see: {measured['time_ratio']:.2f}x as fast "
        f"(FLOPs {measured['flop_ratio']:.2f}x), PSNR {measured['psnr_median']:.1f} dB, worst decile "
        f"{measured['psnr_worst_decile']:.1f} dB"
    )
