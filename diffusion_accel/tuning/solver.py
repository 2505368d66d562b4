"""Learning a solver: at which timesteps to evaluate, and what to make of the evaluations, for a model and its use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DPMSolverMultistepScheduler

from diffusion_accel.arguments import public
from diffusion_accel.errors import ConfigurationError, UnsupportedPipelineError
from diffusion_accel.io import shown
from diffusion_accel.measure.fidelity import psnr
from diffusion_accel.measure.request import MOST_STEPS, usual_steps, whole
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.prediction import Conversion
from diffusion_accel.progress import Progress, silent
from diffusion_accel.reuse.conditions import conditions
from diffusion_accel.schedulers.learned import LearnedMultistepScheduler
from diffusion_accel.schedulers.measured import describe
from diffusion_accel.schedulers.solver import LEAST_STEP, Solver, not_learnt

from .budget import Budget
from .by_rollouts import FEW, untraceable
from .jumps import Jumps, Trajectory
from .measure import not_reusing, scheduling
from .polish import polished
from .recording import record
from .replay import Recording, Replay
from .request import checked, parts
from .result import fidelity_of
from .state import Scores
from .target import LONGEST, TOWARDS
from .timesteps import Nodes, NodeSearch, residuals
from .together import ALONE, Tasks, Together
from .tuner import USUAL_STEPS

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MANY_STEPS = 200  # of the solver that stands for the converged image
CANDIDATES = 64  # timesteps of these that may be chosen; the last ones all, the others evenly
LAST = 20
POLISHED = 0.4  # of the time, for moving the combinations together


@public
def tune_solver(
    pipe: DiffusionPipeline,
    prompts: str | Sequence[str],
    evaluations: int | Sequence[int],
    *,
    towards: str = "converged",
    steps: int | None = None,
    start: LearnedMultistepScheduler | None = None,
    seed: int = 0,
    guidance_scale: float | Sequence[float] | None = None,
    height: int | None = None,
    width: int | None = None,
    seconds: float = 300.0,
    batch: int = 8,
    state: str | Path | None = None,
    progress: Progress = silent,
    together: Together = ALONE,
    **options: Any,
) -> LearnedMultistepScheduler:
    """Learn a solver of few evaluations for a model: its timesteps, and the combinations between them.

        pipe.scheduler = tune_solver(pipe, prompts, [6, 8])
        pipe("red apple", num_inference_steps=8)

    The timesteps are searched by a dynamic programme and by rollouts, the combinations are fitted on the way
    (`tuning.jumps`) and then moved together by gradients (`tuning.polish`). Most of the prompts calibrate; the others
    measure the result, which is in the configuration's `made_for`.

    Args:
        pipe: a loaded pipeline; its scheduler says what the model was trained with.
        prompts: at least 6; 24 or more are recommended. For an unconditional pipeline they only count the images.
        evaluations: of the denoiser for each image, one number or several, each 1 to 50.
        towards: "converged": what 200 steps of DPM-Solver++ draw (of the pipeline's own scheduler where that does not
            fit); "baseline": what the pipeline draws as it is, with `steps` steps.
        steps: of the baseline; None: the pipeline's own default.
        start: a learned solver of as many evaluations, of this model or one like it. Its timesteps are kept (the
            nearest that can be chosen) and nothing is searched; the combinations are made anew and have all the time.
        seed: image k starts from the noise of seed + k.
        guidance_scale, height, width: of the calls; None: the pipeline's own default. Several guidance scales are
            divided among the images, so that one solver holds for all of them.
        seconds: time budget of the search, without what is drawn before and after it.
        batch: images in a call.
        state: file that keeps every rollout, so that an interrupted search goes on; None: none.
        progress: told what is being done.
        together: the processes of a job that all call this alike; see `tune`.
        options: further arguments of the pipeline's call.

    Returns:
        The scheduler, for the pipeline and for others with the same model; `save_pretrained` writes it,
        `PlanFamily.with_solvers` puts it beside plans.

    Raises:
        ConfigurationError: a setting is impossible.
        UnsupportedPipelineError: the denoiser cannot be repeated without the pipeline, or its scheduler draws noise.
    """
    named = {"guidance_scale": guidance_scale, "height": height, "width": width}
    prompts, options = checked(tune_solver, pipe, prompts, named, options, seed, batch, seconds)
    sizes = _sizes(evaluations, towards)
    given = _given(start, sizes)
    steps = whole("steps", usual_steps(pipe) or USUAL_STEPS if steps is None else steps, 2, MOST_STEPS)
    if towards == "baseline" and sizes[-1] > steps:
        raise ConfigurationError(f"towards the baseline of {steps} steps at most {steps} evaluations, got {sizes[-1]}")
    goal, many = _goal(pipe, towards, steps)
    calibration, heldout = parts(Sampler(pipe, prompts, many, seed, batch, options), together)
    with torch.inference_mode(), not_reusing(pipe), scheduling(pipe, goal):
        progress("where the samples should be", 0.0)
        chosen = _chosen(many) if towards == TOWARDS[0] else _every
        recording, _ = record(calibration, chosen)
        wanted = heldout.images() if heldout.prompts else None
    texts = together.in_order(calibration.prompts)
    own = untraceable(recording) or ("its scheduler draws noise" if recording.draws_noise else "")
    if reason := next(filter(None, together.everyone(own)), ""):
        raise UnsupportedPipelineError(f"a solver cannot be learnt for {type(pipe).__name__}: {reason}")

    def about() -> dict[str, Any]:
        call = {**calibration.arguments, "seed": seed, "towards": towards, "goal": type(goal).__name__}
        valid = conditions(pipe, many) | {"call": call}
        return {"conditions": valid, "prompts": texts, "method": "solver"}

    with torch.inference_mode(), not_reusing(pipe):
        scores = Scores(None if state is None else Path(state), about)
        solvers = _search(recording, sizes, Budget(seconds), progress, scores, together, given)
        made = LearnedMultistepScheduler.like(pipe.scheduler, solvers, _record(pipe, options, {}))
        progress("held-out prompts", 1.0)
        measured = {}
        with scheduling(pipe, made):
            for n in sizes:
                values = [] if wanted is None else psnr(wanted, replace(heldout, steps=n).images()).tolist()
                measured[str(n)] = fidelity_of(together.in_order(values))
    numbers = {"towards": towards, "reference": f"{type(goal).__name__}, {many} steps", "measured": measured}
    return LearnedMultistepScheduler.like(pipe.scheduler, solvers, _record(pipe, options, numbers))


def _search(
    recording: Recording,
    sizes: Sequence[int],
    budget: Budget,
    progress: Progress,
    scores: Scores,
    together: Together,
    given: dict[int, Sequence[float]],
) -> dict[int, Solver]:
    """For each number of evaluations its timesteps, searched if they are not given, and combinations for all images."""
    replay, trajectory = Replay(recording), Trajectory.of(recording, Conversion(recording.scheduler))
    trajectory = trajectory.part(distinct(trajectory.times))
    images = sum(together.everyone(recording.images))
    jumps = Jumps(replay, trajectory, together.among(min(images, max(FEW, images // 2))), together=together)
    every = range(recording.images)
    known = {size: _nearest(trajectory.times, given[size]) for size in sizes if given}
    left = None if known else residuals(trajectory, every, torch.ones(len(jumps.weights)), together)
    found: dict[int, Solver] = {}

    def fit(nodes: Sequence[int]) -> None:
        whole = Jumps(replay, trajectory, every, together=together)
        time = Budget((1.0 if known else POLISHED) * budget.seconds / len(sizes))
        steps = polished(whole, whole.run(nodes), lambda: 1 - time.used()).combinations
        times = tuple(trajectory.times[n] for n in nodes)
        found[len(nodes)] = Solver(times, tuple(steps), whole.from_the_middle(nodes))

    def roll(nodes: Sequence[int]) -> list[float]:
        return together.in_order(jumps.run(nodes).decibels.tolist())

    tasks = Tasks(together, {"rollout": roll, "fit": fit})
    if not together.first:
        tasks.follow()
        return found

    def run(nodes: Nodes) -> list[float]:
        return scores.of(f"rollout {','.join(map(str, nodes))}", lambda: tasks.do("rollout", list(nodes)))

    def search() -> None:
        new = [] if left is None else _nodes(NodeSearch(run, left), sizes, budget, progress)
        for nodes in [*known.values(), *new]:
            progress(f"{len(nodes)} evaluations, all jumps together", budget.used(), max(0.0, budget.left()))
            tasks.do("fit", list(nodes))

    tasks.lead(search)
    tasks.end(None)
    return found


def _nodes(search: NodeSearch, sizes: Sequence[int], budget: Budget, progress: Progress) -> list[Nodes]:
    """The best nodes for each number of evaluations, in the part of the time that polishing leaves."""
    whole = Budget((1 - POLISHED) * budget.left())

    def share(part: float) -> Callable[[], bool]:
        own = Budget(part * whole.left())
        return lambda: own.left() > 0

    def tell(size: int) -> None:
        text = f"{len(search.known)} rollouts, {size} evaluations, {search.decibels(size):.1f} dB"
        progress(text, whole.used(), max(0.0, whole.left()))

    return search.every(sizes, share, tell)


def _given(start: object, sizes: Sequence[int]) -> dict[int, Sequence[float]]:
    """The timesteps of a solver for each number of evaluations; none without a solver."""
    if start is None:
        return {}
    if not isinstance(start, LearnedMultistepScheduler):
        raise ConfigurationError(f"start must be a LearnedMultistepScheduler, got {shown(start)}")
    for size in sizes:
        if reason := not_learnt(start.evaluations, size):
            raise ConfigurationError(f"start: {reason}")
    return {size: start.config.solvers[str(size)]["timesteps"] for size in sizes}


def _nearest(times: Sequence[float], wanted: Sequence[float]) -> Nodes:
    """The nodes next to timesteps, each another one, the first of which is 0."""
    nodes = [0]
    for n, time in enumerate(wanted[1:], 1):
        free = range(nodes[-1] + 1, len(times) - (len(wanted) - 1 - n))
        nodes.append(min(free, key=lambda i: abs(times[i] - time)))
    return tuple(nodes)


def distinct(times: Sequence[float]) -> list[int]:
    """Where timesteps are that a solver may have together: of those that are evaluated twice (Heun) the second time,
    when the latents are what the scheduler makes of the first."""
    return [i for i, t in enumerate(times) if i + 1 == len(times) or t - times[i + 1] >= LEAST_STEP]


def _sizes(evaluations: Any, towards: str) -> list[int]:
    """The numbers of evaluations, increasing. Raises `ConfigurationError` for what cannot be learnt."""
    if towards not in TOWARDS:
        raise ConfigurationError(f"towards must be one of {', '.join(TOWARDS)}, got {shown(towards)}")
    several = evaluations if isinstance(evaluations, (list, tuple)) else [evaluations]
    if not several:
        raise ConfigurationError("evaluations must be a number or several, got none")
    return sorted({whole("evaluations", n, 1, LONGEST) for n in several})


def _goal(pipe: DiffusionPipeline, towards: str, steps: int) -> tuple[Any, int]:
    """The scheduler that draws what is wanted, and its number of steps."""
    if towards == "baseline":
        return pipe.scheduler, steps
    fitting = {kind.__name__ for kind in pipe.scheduler.compatibles}
    if "DPMSolverMultistepScheduler" in fitting and not Conversion(pipe.scheduler).flow:
        return DPMSolverMultistepScheduler.from_config(pipe.scheduler.config), MANY_STEPS
    return pipe.scheduler, MANY_STEPS


def _chosen(many: int) -> Any:
    """Which steps of a long trajectory are candidates: the last ones, and of the others one of so many."""
    every = max(1, round((many - LAST) / (CANDIDATES - LAST)))
    return lambda i: i >= many - LAST or i % every == 0


def _every(_: int) -> bool:
    return True


def _record(pipe: DiffusionPipeline, options: dict[str, Any], numbers: dict[str, Any]) -> dict[str, Any]:
    """What a solver was made for."""
    made: dict[str, Any] = dict(describe(pipe))
    if (scale := options.get("guidance_scale")) is not None:
        several = scale if isinstance(scale, (list, tuple)) else [scale]
        made["guidance_scale"] = [min(several), max(several)]
    if "height" in options and "width" in options:
        made["height_width"] = [[options["height"], options["width"]]]
    return made | numbers
