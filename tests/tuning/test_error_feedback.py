"""Plans whose steps make up for the errors before them: what the pipeline draws with them is what was rolled out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from transformer_pipelines import FAMILIES

from diffusion_accel import Reuse, accelerate
from diffusion_accel.prediction import Conversion
from diffusion_accel.reuse.plan import FULL, Plan, Step
from diffusion_accel.tuning.error_feedback import Rollout
from diffusion_accel.tuning.jumps import Trajectory
from diffusion_accel.tuning.measure import reusing
from diffusion_accel.tuning.recording import record
from diffusion_accel.tuning.replay import Replay

from .test_replay import Calls

STEPS, IMAGES = 7, 4


def with_scheduler(scheduler: Any, built: Callable[[], zoo.Built] = zoo.sd, **changes: Any) -> zoo.Built:
    pipe, call = built()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **changes)
    return pipe, call


def rolled(built: zoo.Built, nodes: Callable[[int], tuple[int, ...]]) -> tuple[Calls, Plan, torch.Tensor, torch.Tensor]:
    """The sampler, the plan, its rollout and what the pipeline draws with it."""
    sampler: Any = Calls(built, sizes=(IMAGES,), steps=STEPS)
    with torch.inference_mode():
        recording, _ = record(sampler)
        assert recording.reason == ""
        trajectory = Trajectory.of(recording, Conversion(recording.scheduler))
        apart = recording.branches is not None
        rollout = Rollout(Replay(recording), recording, trajectory, range(IMAGES), apart=apart)
        plan = rollout.plan(nodes(len(recording)))
        with reusing(sampler.pipe, plan):
            drawn = last_of(sampler)
    return sampler, plan, rollout.sample, drawn


def last_of(sampler: Any) -> torch.Tensor:
    """What the scheduler's last step leads to: some pipelines decode it, or give it out in another form."""
    made, scheduler = [], sampler.pipe.scheduler
    step = scheduler.step

    @functools.wraps(step)
    def noted(*args: Any, **kwargs: Any) -> Any:
        output = step(*args, **kwargs)
        made.append(output[0] if isinstance(output, tuple) else output.prev_sample)
        return output

    scheduler.step = noted
    sampler.call(0, IMAGES)
    del scheduler.step
    return made[-1][:IMAGES].float()  # DiT steps with both branches


def same(rollout: torch.Tensor, drawn: torch.Tensor, within: float = 1e-4) -> None:
    """To 1e-4 of the latents' size; weights are written down with six digits."""
    assert float((rollout - drawn).abs().max()) < within * max(1.0, float(rollout.abs().max()))


def some(total: int) -> tuple[int, ...]:
    return (0, 1, 3, total - 2)


def some_of_one_branch(total: int) -> tuple[int, ...]:
    return (0, ~1, 3, ~(total - 2))


CASES: dict[str, Callable[[], zoo.Built]] = {
    "ddim": zoo.sd,
    "dpm": lambda: with_scheduler(DPMSolverMultistepScheduler),
    "unipc": lambda: with_scheduler(UniPCMultistepScheduler),
    "euler": lambda: with_scheduler(EulerDiscreteScheduler),
    "heun": lambda: with_scheduler(HeunDiscreteScheduler),
    "ancestral": lambda: with_scheduler(EulerAncestralDiscreteScheduler),
    "ddim with noise": lambda: (lambda p, c: (p, {**c, "eta": 0.5}))(*zoo.sd()),
    "v": lambda: with_scheduler(DDIMScheduler, prediction_type="v_prediction"),
    "flow heun": lambda: with_scheduler(FlowMatchHeunDiscreteScheduler, zoo.sd3),
    **{name: build for name, build in FAMILIES.items() if name != "wan 2.2"},
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", CASES)
def test_the_pipeline_draws_what_was_rolled_out(name: str) -> None:
    _, plan, rollout, drawn = rolled(CASES[name](), some)
    same(rollout, drawn)
    assert sum(step.mode == "full" for step in plan.steps) == 4
    assert sum(step.fit is not None for step in plan.steps) >= len(plan) // 2, "most steps are fitted"
    held = [step for step in plan.steps if step.mode == "hold"]
    assert all(step.space == "sample" for step in held)
    if name == "cogvideox":
        assert all(step.fit is None or step.fit.channels == 1 for step in plan.steps)
    assert Plan.parse(str(plan)) == plan


HALF = ("ddim", "flow heun", "flux", "dit", "z-image", "qwen-image", "hunyuan dit", "cogvideox")


@pytest.mark.parametrize("name", HALF)
def test_steps_with_one_branch_are_what_was_rolled_out(name: str) -> None:
    """Whatever calls there are for the branches: the last difference stands for the other one, and fits weigh it."""
    sampler, plan, rollout, drawn = rolled(CASES[name](), some_of_one_branch)
    same(rollout, drawn)
    full = [step for step in plan.steps if step.mode == "full"]
    assert [step.guidance for step in full] == ["both", "reuse", "both", "reuse"]
    accelerate(sampler.pipe, Reuse(plan=plan))
    with torch.inference_mode():
        sampler.call(0, IMAGES)
    assert sampler.pipe.acceleration.report().counters["reuse"]["unguided_steps"] == 2


@pytest.mark.parametrize("name", ["ddim", "dpm"])
def test_a_plan_is_nearer_than_one_that_only_holds(name: str) -> None:
    built = CASES[name]()
    sampler, plan, _, drawn = rolled(built, some)
    plain = Plan(tuple(FULL if step.mode == "full" else Step("hold", space="sample") for step in plan.steps))
    with torch.inference_mode():
        wanted = sampler.call(0, IMAGES)
        with reusing(sampler.pipe, plain):
            held = sampler.call(0, IMAGES)
    assert float((drawn - wanted).pow(2).mean()) < 0.5 * float((held - wanted).pow(2).mean())


def test_with_all_steps_computed_nothing_is_changed() -> None:
    """A fit of a step that lands on the next is the prediction itself: what is full stays near the baseline."""
    sampler, plan, rollout, drawn = rolled(zoo.sd(), lambda total: tuple(range(total)))
    with torch.inference_mode():
        baseline = sampler.call(0, IMAGES)
    assert all(step.mode == "full" for step in plan.steps)
    torch.testing.assert_close(drawn, baseline, rtol=1e-4, atol=1e-4)
    same(rollout, drawn)


def test_steps_that_are_not_affine_are_not_fitted() -> None:
    """Clipping and thresholding: no weights are derived from probes that say nothing."""
    for changes in (
        {"clip_sample": True, "clip_sample_range": 0.3},
        {"thresholding": True, "sample_max_value": 1.0, "clip_sample": False},
    ):
        pipe, call = zoo.sd()
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **changes)
        _, plan, rollout, drawn = rolled((pipe, call), some)
        assert all(step.fit is None for step in plan.steps[:-2]), str(plan)
        same(rollout, drawn, within=3e-4)  # thresholds divide by a quantile of few values: rounding grows
