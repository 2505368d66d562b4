"""`tune`: search the reuse plan of a pipeline, or learn its solver, and write it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import diffusion_accel as api
from diffusion_accel import interrupts
from diffusion_accel.conditioning import usual_texts
from diffusion_accel.errors import ConfigurationError, OutputError
from diffusion_accel.generation.request import LIMITS, Bounds
from diffusion_accel.io import is_there, replacing
from diffusion_accel.outputs import check_free, check_writable, output_path
from diffusion_accel.pipelines.schedulers import check_scheduler, check_steps, scheduler_for
from diffusion_accel.reuse.plan_family import PlanFamily
from diffusion_accel.reuse.plan_file import TunedPlan
from diffusion_accel.schedulers.solver import FILE as SOLVER_FILE
from diffusion_accel.tuning.state import forget_search, read_search, search_files
from diffusion_accel.tuning.target import LONGEST, TOWARDS, Target

from . import processes
from .common_options import (
    AllowPickle,
    AsJson,
    Batch,
    Budget,
    Device,
    Dtype,
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
    one_of,
    recommended,
    settings_of,
)
from .plan_table import show_plans, show_solver
from .prompts import texts_of
from .terminal import Bar, say

if TYPE_CHECKING:
    from diffusion_accel import LearnedMultistepScheduler

LEAST_PROMPTS = 6  # the search needs some, and others to test what it found
SECONDS_OF_A_SEARCH = 300.0
_PANELS = {
    "Output": "output overwrite as_json quiet",
    "Target (one of them, or none)": "speedup min_psnr",
    "A learned solver": "evaluations towards",
    "Prompts": "prompts_file count seed",
    "What the plan is for": "steps guidance_scale scheduler width height",
    "Search": "try_steps try_scheduler batch budget restart",
    "Machine": "device dtype allow_pickle",
}


@in_panels(_PANELS)
def tune(
    output: Annotated[
        str,
        typer.Option("--output", "-o", metavar="FILE|FOLDER", help="A .json file, or the folder of a learned solver."),
    ],
    model: Model = None,
    speedup: Annotated[float | None, typer.Option(help="The best fidelity at this speed-up. (above 1)")] = None,
    min_psnr: Annotated[
        float | None, typer.Option(help="The highest speed-up at this median PSNR. (5 to 80 dB)")
    ] = None,
    evaluations: Annotated[
        list[int] | None,
        number("Learn a solver of so many evaluations; repeatable.", Bounds(1, LONGEST, f"1 to {LONGEST}")),
    ] = None,
    towards: Annotated[
        str | None,
        one_of(
            "What a solver is to draw: the converged image, or what the pipeline draws with --steps.",
            TOWARDS,
            show_default=TOWARDS[0],
        ),
    ] = None,
    prompts_file: PromptsFile = None,
    count: Annotated[int, count_option(LEAST_PROMPTS)] = 24,
    seed: Seed = 0,
    steps: StepsOr50 = None,
    guidance_scale: Annotated[
        list[float] | None,
        number(
            "Classifier-free guidance; repeatable: for all of these scales.",
            LIMITS["guidance_scale"],
            show_default=recommended("guidance_scale"),
        ),
    ] = None,
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
    budget: Budget = None,
    restart: Restart = False,
    overwrite: Overwrite = False,
    device: Device = None,
    dtype: Dtype = None,
    allow_pickle: AllowPickle = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Find out which steps a pipeline must compute: writes a plan for --reuse, or learns a solver for --scheduler.

    With --speedup or --min-psnr it is one plan, without both a family: plans for every speed in one file. With
    --evaluations it is a solver where -o is a folder, and a family of plans and solvers where it is a .json file. All
    are valid for this model, scheduler and number of steps. An interrupted search goes on from where it was when it is
    called again; what lies between is kept beside the output, with .search behind its name. Under torchrun or
    accelerate launch several devices share the work.
    """
    options = locals()
    wish = _wish(options)
    scales = options.pop("guidance_scale")
    interrupts.explain(wish.how_to_go_on)
    settings, source = settings_of(options | ({"guidance_scale": scales[0]} if scales else {}))
    texts = texts_of(prompts_file, count, source, LEAST_PROMPTS)
    wish.check(settings.steps or 50)
    check_steps(settings.scheduler, source, settings.steps or 50)
    for name in try_scheduler or []:
        check_scheduler(name)
    if not restart:
        for file in search_files(wish.state):
            read_search(file)

    from diffusion_accel.tuning.together import TIMEOUT, FirstFailedError, Together  # heavy: torch

    from .session import check_machine, check_texts, open_for  # heavy: torch, diffusers

    check_texts(source, texts, "a plan is tuned on the kind of prompts it is used with", LEAST_PROMPTS)
    settings = processes.share(settings, TIMEOUT)
    pipe: Any = open_for(settings, source, check_machine(settings), promptless=True)
    others = tuple(scheduler_for(pipe, name) for name in try_scheduler or [])
    together = Together.joined(pipe.device)
    wish.begun = together.first
    if restart and together.first:
        forget_search(wish.state)
    call = {
        "steps": settings.steps or 50,
        "seed": seed,
        "guidance_scale": scales if scales and len(scales) > 1 else settings.guidance_scale,
        "height": settings.height,
        "width": settings.width,
        "batch": batch,
        "together": together,
    }
    with closing(Bar(quiet or not together.first)) as bar, _said_by_the_first(FirstFailedError):
        found = _searched(wish, bar, pipe, texts or usual_texts(pipe, count), budget, call, others)
    if not together.first:
        return
    with interrupts.undivided():
        if isinstance(found, (TunedPlan, PlanFamily)):
            found.save(wish.path, overwrite)
        else:
            with replacing(wish.path) as temporary:  # as `save_pretrained` writes it
                temporary.write_text(found.to_json_string(), encoding="utf-8")
        forget_search(wish.state)
    _show(wish, output, found, as_json)


@dataclass
class _Wish:
    """What is to be made.

    Attributes:
        target: of plans.
        evaluations: of solvers; empty: none.
        towards: what they are to draw.
        alone: only a solver, no plans.
        try_steps: fewer steps that a plan may use.
        path: the file to write.
        state: the file that keeps the search.
        begun: whether what is in `state` is of use.
    """

    target: Target
    evaluations: list[int]
    towards: str
    alone: bool
    try_steps: tuple[int, ...]
    path: Path
    state: Path
    begun: bool

    def check(self, steps: int) -> None:
        """Refuse a number of steps from which it cannot be made."""
        least = 2 if self.alone else 4
        if steps < least:
            raise ConfigurationError(f"--steps must be at least {least}, got {steps}")
        if self.towards == "baseline" and max(self.evaluations) > steps:
            raise ConfigurationError(
                f"--towards baseline takes its timesteps from the baseline's {steps} steps, so --evaluations must be "
                f"at most that, got {max(self.evaluations)}"
            )

    def how_to_go_on(self) -> str:
        """What an interrupt says."""
        kept = self.begun and self.path not in interrupts.finished() and bool(search_files(self.state))
        return interrupts.how_to_go_on(self.state, kept)


def _wish(options: dict[str, Any]) -> _Wish:
    """What the options ask for. Raises `ConfigurationError` or `OutputError` for what cannot be made."""
    output, sizes = options["output"], options["evaluations"] or []
    target = Target(options["speedup"], options["min_psnr"])
    path, alone = output_path(output), bool(sizes) and not output.endswith(".json")
    if sizes and not target.is_family:
        raise ConfigurationError(
            "--evaluations cannot be combined with --speedup or --min-psnr: these ask for one plan of the pipeline's "
            "own scheduler, --evaluations for a solver; call it once for each, or leave them out for a family of both"
        )
    if options["towards"] is not None and not sizes:
        raise ConfigurationError("--towards needs --evaluations: it says what a learned solver is to draw")
    if target.is_family and (options["try_steps"] or options["try_scheduler"]):
        raise ConfigurationError(
            "--try-steps and --try-scheduler need --speedup or --min-psnr: only the search of one plan tries others"
        )
    if alone:
        if is_there(path, "file"):
            raise OutputError(f"{path} is a file; a solver needs a folder, plans and solvers together a .json file")
        path = path / SOLVER_FILE
        check_writable(path.parent)
    elif not output.endswith(".json"):
        raise ConfigurationError(f"--output must end in .json, got {output}")
    check_free([path], options["overwrite"])
    state = Path(f"{Path(output)}.search")
    tried = tuple(options["try_steps"] or ())
    return _Wish(target, sizes, options["towards"] or TOWARDS[0], alone, tried, path, state, not options["restart"])


def _searched(
    wish: _Wish,
    bar: Bar,
    pipe: Any,
    texts: Sequence[str],
    budget: float | None,
    call: dict[str, Any],
    others: tuple[Any, ...],
) -> TunedPlan | PlanFamily | LearnedMultistepScheduler:
    """The plan, the family or the solver; of a family with solvers each has half of the time. Whoever names a time gets
    it whole; otherwise the search of a family ends with its work, too."""
    both = bool(wish.evaluations) and not wish.alone
    share = 0.5 if both else 1.0
    seconds = share * (SECONDS_OF_A_SEARCH if budget is None else budget)
    solver = None
    if wish.evaluations:
        solver = api.tune_solver(
            pipe,
            texts,
            wish.evaluations,
            towards=wish.towards,
            seconds=seconds,
            state=Path(f"{wish.state}.1") if both else wish.state,
            progress=lambda what, done=0.0, left=None: bar(what, share * done, left),
            **call,
        )
        if wish.alone:
            return solver
    plan = api.tune(
        pipe,
        texts,
        speedup=wish.target.speedup,
        min_psnr=wish.target.min_psnr,
        seconds=seconds,
        images=None if budget is None else math.inf,
        state=wish.state,
        progress=lambda what, done=0.0, left=None: bar(what, 1 - share + share * done, left),
        try_steps=wish.try_steps,
        try_schedulers=others,
        **call,
    )
    return plan.with_solvers(solver) if isinstance(plan, PlanFamily) and solver is not None else plan


def _show(wish: _Wish, output: str, found: TunedPlan | PlanFamily | LearnedMultistepScheduler, as_json: bool) -> None:
    if isinstance(found, PlanFamily):
        show_plans(output, as_json)
    elif not isinstance(found, TunedPlan):
        show_solver(wish.path.parent, as_json)
    elif as_json:
        typer.echo(json.dumps({"file": output, "measured": found.measured, "search": found.search}))
    else:
        show(output, found)


@contextmanager
def _said_by_the_first(kind: type[Exception]) -> Iterator[None]:
    """Ends this process without a word where the first process of the job says why."""
    try:
        yield
    except kind as error:
        raise typer.Exit(1) from error


def show(output: str, plan: TunedPlan) -> None:
    """What was found, in two lines."""
    measured, steps = plan.measured, plan.plan.steps
    words = {"full": "full", "hold": "held", "shallow": "shallow", "decoder": "decoder only"}
    counts = {m: sum(step.mode == m for step in steps) for m in words}
    parts = [f"{n} {words[m]}" for m, n in counts.items() if n]
    alone = sum(step.guidance == "reuse" for step in steps)
    scheduler = plan.conditions["scheduler"]
    say(
        f"{output}: {scheduler}, {len(steps)} steps, {', '.join(parts)}"
        + (f", {alone} of them with one branch of guidance" if alone else "")
    )
    say(
        f"on {measured['pictures']} prompts the search did not see: {measured['time_ratio']:.2f}x as fast "
        f"(FLOPs {measured['flop_ratio']:.2f}x), PSNR {measured['psnr_median']:.1f} dB, worst decile "
        f"{measured['psnr_worst_decile']:.1f} dB"
    )
