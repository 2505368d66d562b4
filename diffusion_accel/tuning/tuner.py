"""The tuner: searches the plan of a speed-up or of a fidelity for one pipeline, scheduler and number of steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffusion_accel.arguments import public
from diffusion_accel.errors import ConfigurationError, UnsupportedPipelineError
from diffusion_accel.io import shown
from diffusion_accel.measure.request import MOST_STEPS, usual_steps, whole
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.progress import Progress, silent
from diffusion_accel.reuse.plan_family import PlanFamily
from diffusion_accel.reuse.plan_file import TunedPlan
from diffusion_accel.reuse.reuse import Reuse

from .budget import Budget
from .by_rollouts import RolloutTuner, untraceable
from .by_trials import search_by_trials
from .measure import Reference, not_reusing
from .recording import record
from .request import checked, parts
from .target import Target
from .together import ALONE, Together

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

IMAGES_EACH = 4  # images of the baseline for each prompt: the work for a family
USUAL_STEPS = 50  # of a pipeline that names no number of its own


@public
def tune(
    pipe: DiffusionPipeline,
    prompts: str | Sequence[str],
    *,
    steps: int | None = None,
    seed: int = 0,
    guidance_scale: float | Sequence[float] | None = None,
    height: int | None = None,
    width: int | None = None,
    speedup: float | None = None,
    min_psnr: float | None = None,
    seconds: float = 600.0,
    images: float | None = None,
    batch: int = 8,
    state: str | Path | None = None,
    progress: Progress = silent,
    try_steps: tuple[int, ...] = (),
    try_schedulers: tuple[Any, ...] = (),
    computed_steps: tuple[int, ...] = (),
    together: Together = ALONE,
    **options: Any,
) -> TunedPlan | PlanFamily:
    """Search the reuse plan of a pipeline: the best fidelity at a speed-up, or the highest speed-up at a fidelity; or,
    without a target, plans for every speed as one family.

        plan = tune(pipe, prompts, steps=50, speedup=2.0)
        plan.save(Path("fast.json"))
        accelerate(pipe, Reuse(plan=plan))
        tune(pipe, prompts, steps=50).save(Path("every.json"))  # then Reuse(plan="every.json", speedup=2)

    The fidelity is the PSNR to the images of the same pipeline without reuse. Most of the prompts calibrate, the
    others measure the result: a third of them, or 9 of 20 and more, which is what a floor needs. For an unconditional
    pipeline prompts only count the images.

    Where the denoiser can be repeated without the pipeline (`tuning.recording`), plans are searched by rollouts and
    every step is fitted (`tuning.by_rollouts`); elsewhere, and with other numbers of steps or schedulers to try, plans
    are run in the pipeline (`tuning.by_trials`).

    Args:
        pipe: a loaded pipeline, with the scheduler that will be used.
        prompts: at least 6; 24 or more are recommended.
        steps: denoising steps of the calls that the plan is for, at least 4; None: the pipeline's own default.
        seed: image k starts from the noise of seed + k.
        guidance_scale, height, width: of those calls; None: the pipeline's own default. Several guidance scales are
            divided among the images, so that one plan holds for all of them.
        speedup, min_psnr: the target, one of them or none; see `Target`.
        seconds: time budget of the search, without measuring before and after it.
        images: so much work, in images drawn by the baseline, measuring included, after which the search ends, too;
            None: for a family 4 for each prompt, else no end. What is measured once is measured also beyond it. A
            search by trials ends by `seconds` only.
        batch: images in a call.
        state: file that keeps every plan that was tried, so that an interrupted search goes on; None: none.
        progress: told how many plans were tried and what the best one does.
        try_steps, try_schedulers: fewer steps and other schedulers that the plan may use to come near the baseline; the
            time budget is shared among all combinations. The plan's conditions say which were chosen.
        computed_steps: of a family: how many steps its plans compute; empty: chosen by the number of steps.
        together: `tuning.together.Together.joined(pipe.device)` in every process of a job that calls this alike: each
            does its share of the images, the first one decides, and all return the same.
        options: further arguments of the pipeline's call.

    Returns:
        The plan, or the family, with its conditions and measurements; `save` writes it. In `search`, "method" is how it
        was found, "work" what that took, in images of the baseline, and "guidance_reuse" whether plans that leave a
        branch of guidance out at some steps were among those searched, and else why not.

    Raises:
        ConfigurationError: a setting is impossible, or no plan reaches the target.
        UnsupportedPipelineError: the pipeline's steps cannot be left out.
    """
    named = {"guidance_scale": guidance_scale, "height": height, "width": width}
    prompts, options = checked(tune, pipe, prompts, named, options, seed, batch, seconds)
    steps = whole("steps", usual_steps(pipe) or USUAL_STEPS if steps is None else steps, 1, MOST_STEPS)
    if steps < 4:
        raise ConfigurationError(f"tuning needs at least 4 steps, got {steps}")
    target = Target(speedup, min_psnr)
    if reason := Reuse().supports(pipe):
        raise UnsupportedPipelineError(f"reuse cannot be used on {type(pipe).__name__}: {reason}")
    if images is not None and (type(images) not in (int, float) or not images > 0):
        raise ConfigurationError(f"images must be a number above 0, got {shown(images)}")
    if not isinstance(try_steps, tuple | list):
        raise ConfigurationError(f"try_steps must be a list of numbers of steps, got {shown(try_steps)}")
    for number in try_steps:
        whole("try_steps", number, 1, MOST_STEPS)
    for number in computed_steps:
        whole("computed_steps", number, 1, steps)
    mine = parts(Sampler(pipe, prompts, steps, seed, batch, options), together)
    file = None if state is None else Path(state)
    variants = [(n, s) for s in (pipe.scheduler, *try_schedulers) for n in dict.fromkeys((steps, *try_steps))]
    with torch.inference_mode(), not_reusing(pipe):
        reason = "other steps or schedulers are tried"
        if len(variants) == 1:
            progress("baseline", 0.0)
            recording, drawn = record(mine[0])
            reasons = together.everyone(untraceable(recording) or "")
            reference, reason = Reference(*mine, pipe.scheduler, drawn), next(filter(None, reasons), "")
        elif together.size == 1:
            reference = Reference.measure(*mine)
        if not reason:
            most = IMAGES_EACH * len(prompts) if images is None and target.is_family else images
            tuner = RolloutTuner(reference, recording, Budget(seconds), progress, file, together, most)
            return _by_rollouts(tuner, target, computed_steps)
        if together.size > 1:
            raise ConfigurationError(f"several processes cannot share this search: {reason}; start one process")
        if target.is_family:
            raise ConfigurationError(
                f"give a speed-up or a lowest PSNR: plans for every speed are not searched: {reason}"
            )
        return search_by_trials(reference, variants, target, seconds, file, progress)


def _by_rollouts(tuner: RolloutTuner, target: Target, computed_steps: Sequence[int]) -> TunedPlan | PlanFamily:
    if not tuner.together.first:
        return (PlanFamily if target.is_family else TunedPlan).from_dict(tuner.tasks.follow())
    made: TunedPlan | PlanFamily = tuner.tasks.lead(lambda: _searched(tuner, target, computed_steps))
    tuner.tasks.end(made.to_dict())
    return made


def _searched(tuner: RolloutTuner, target: Target, computed_steps: Sequence[int]) -> TunedPlan | PlanFamily:
    if target.is_family:
        return tuner.family(tuner.every(computed_steps))
    found = tuner.fastest(target.min_psnr or 0.0) if target.speedup is None else tuner.one(target.speedup)
    return tuner.tuned([found], target)[0]
