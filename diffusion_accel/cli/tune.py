"""`tune`: search the reuse plan of a pipeline and write it as a file."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import diffusion_accel as api
from diffusion_accel import interrupts
from diffusion_accel.conditioning import PROMPT, condition_of, usual_texts
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.generation.request import LIMITS
from diffusion_accel.outputs import check_free, output_path
from diffusion_accel.pipelines.schedulers import check_scheduler, scheduler_for
from diffusion_accel.reuse.plan_family import PlanFamily
from diffusion_accel.tuning.state import forget_search, read_search, search_files
from diffusion_accel.tuning.target import Target

from .common_options import (
    AllowPickle,
    AsJson,
    Batch,
    Budget,
    Device,
    Dtype,
    GuidanceScale,
    Model,
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
    number,
    settings_of,
)
from .plan_table import show_plans
from .prompts import texts_of
from .terminal import Bar, say

if TYPE_CHECKING:
    from diffusion_accel import TunedPlan

_PANELS = {
    "Target (one of them, or none)": "speedup min_psnr",
    "Prompts": "prompts_file count seed",
    "What the plan is for": "steps guidance_scale scheduler width height",
    "Search": "try_steps try_scheduler batch budget restart",
    "Machine": "device dtype allow_pickle",
}


@in_panels(_PANELS)
def tune(
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="The plan to write, a .json file.")],
    model: Model = None,
    speedup: Annotated[float | None, typer.Option(help="The best fidelity at this speed-up. (above 1)")] = None,
    min_psnr: Annotated[
        float | None, typer.Option(help="The highest speed-up at this median PSNR. (5 to 80 dB)")
    ] = None,
    prompts_file: PromptsFile = None,
    count: Annotated[int, count_option(6)] = 24,  # the search needs some, and others to test what it found
    seed: Seed = 0,
    steps: StepsOr50 = None,
    guidance_scale: GuidanceScale = None,
    scheduler: Scheduler = None,
    width: Pixels = None,
    height: Pixels = None,
    try_steps: Annotated[
        list[int] | None,
        number("A number of steps that the plan may use instead; repeatable.", LIMITS["steps"]),
    ] = None,
    try_scheduler: Annotated[
        list[str] | None, typer.Option(help="A scheduler that the plan may use instead; repeatable.")
    ] = None,
    batch: Batch = 8,
    budget: Budget = 300.0,
    restart: Restart = False,
    overwrite: Overwrite = False,
    device: Device = None,
    dtype: Dtype = None,
    allow_pickle: AllowPickle = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Find out which steps a pipeline must compute: writes a plan for --reuse.

    With --speedup or --min-psnr it is one plan, without both a family: plans for every speed in one file. It is valid
    for this model, scheduler and number of steps. An interrupted search goes on from where it was when it is called
    again; what lies between is kept in FILE.search.
    """
    options = locals()
    if not output.endswith(".json"):
        raise ConfigurationError(f"--output must end in .json, got {output}")
    check_free([output_path(output)], overwrite)
    state, begun = Path(f"{output}.search"), not restart

    def how_to_go_on() -> str:
        kept = begun and Path(output) not in interrupts.finished() and any(state.parent.glob(f"{state.name}*"))
        return f"call it again to go on from here ({state})" if kept else interrupts.names()

    interrupts.explain(how_to_go_on)
    settings, source = settings_of(options)
    texts = texts_of(prompts_file, count, source)
    for name in try_scheduler or []:
        check_scheduler(name)
    Target(speedup, min_psnr)
    if not restart:
        for file in search_files(state):
            read_search(file)

    from .session import check_machine, open_for  # heavy: torch, diffusers

    pipe: Any = open_for(settings, source, check_machine(settings), promptless=True)
    if not texts and condition_of(pipe) == PROMPT:
        raise ConfigurationError("--prompts-file is needed: a plan is tuned on the kind of prompts it is used with")
    others = tuple(scheduler_for(pipe, name) for name in try_scheduler or [])
    begun = True
    if restart:
        forget_search(state)
    with closing(Bar(quiet)) as bar:
        plan = api.tune(
            pipe,
            texts or usual_texts(pipe, count),
            steps=settings.steps or 50,
            seed=seed,
            guidance_scale=settings.guidance_scale,
            height=settings.height,
            width=settings.width,
            speedup=speedup,
            min_psnr=min_psnr,
            seconds=budget,
            batch=batch,
            state=state,
            progress=bar,
            try_steps=tuple(try_steps or ()),
            try_schedulers=others,
        )
    with interrupts.undivided():
        plan.save(Path(output), overwrite)
        forget_search(state)
    if isinstance(plan, PlanFamily):
        show_plans(output, as_json)
    elif as_json:
        typer.echo(json.dumps({"file": output, "measured": plan.measured, "search": plan.search}))
    else:
        show(output, plan)


def show(output: str, plan: TunedPlan) -> None:
    """What was found, in two lines, and what was not searched though it could be."""
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
    if "true guidance" in (why := plan.search.get("guidance_reuse", "")):
        say(why)
