"""The step clock by itself: positions, segments, repeated calls, and what it changes (nothing)."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler
from zoo import run, sd

from diffusion_accel import Reuse, accelerate
from diffusion_accel.steps import StepClock


class Denoiser(torch.nn.Module):
    def forward(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        return 0.1 * sample


def walk(scheduler: Any, steps: int, start: int = 0, calls: int = 1, pass_as: Any = None) -> list[tuple[int, ...]]:
    """(index, call, total, segment) at each denoiser call of a plain sampling loop."""
    pipeline = types.SimpleNamespace(scheduler=scheduler)
    clock, model, seen = StepClock(pipeline), Denoiser(), []
    clock.start([model])
    try:
        scheduler.set_timesteps(steps)
        if start and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
        x = torch.ones(1, 1, 2, 2)
        for t in scheduler.timesteps[start:]:
            for _ in range(calls):
                out = model(x, pass_as(t) if pass_as else t)
                seen.append((clock.index, clock.call, clock.total, clock.segment))
            x = scheduler.step(out, t, x).prev_sample
    finally:
        clock.stop()
    assert "step" not in scheduler.__dict__ and "forward" not in model.__dict__
    return seen


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler])
@pytest.mark.parametrize("pass_as", [None, lambda t: t.clone(), lambda t: t.expand(3), lambda t: float(t)])
def test_every_position_once_in_order(scheduler: Any, pass_as: Any) -> None:
    instance = scheduler()
    seen = walk(instance, 6, pass_as=pass_as)
    total = len(instance.timesteps)
    assert seen == [(i, 0, total, 0) for i in range(total)]


def test_in_inference_mode() -> None:
    with torch.inference_mode():
        assert walk(DDIMScheduler(), 3) == [(i, 0, 3, 0) for i in range(3)]


def test_several_calls_at_one_step() -> None:
    seen = walk(HeunDiscreteScheduler(), 3, calls=2)
    assert [(i, c) for i, c, _, _ in seen] == [(i, c) for i in range(5) for c in range(2)]


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_a_late_start_counts_from_zero(scheduler: Any) -> None:
    assert walk(scheduler(), 10, start=6, pass_as=float) == [(i, 0, 4, 0) for i in range(4)]


def test_a_second_pass_is_a_new_segment() -> None:
    scheduler = DDIMScheduler()
    pipeline = types.SimpleNamespace(scheduler=scheduler)
    clock, model, seen = StepClock(pipeline), Denoiser(), []
    clock.start([model])
    scheduler.set_timesteps(3)
    for again in range(3):
        if again == 2:
            scheduler.set_timesteps(2)
        x = torch.ones(1, 1, 2, 2)
        for t in scheduler.timesteps:
            out = model(x, t)
            seen.append((clock.segment, clock.index, clock.total))
            x = scheduler.step(out, t, x).prev_sample
    clock.stop()
    assert seen == [(0, 0, 3), (0, 1, 3), (0, 2, 3), (1, 0, 3), (1, 1, 3), (1, 2, 3), (2, 0, 2), (2, 1, 2)]
    assert clock.steps == 8


def test_a_pipeline_that_announces_fewer_steps_is_believed() -> None:
    scheduler = DDIMScheduler()
    pipeline = types.SimpleNamespace(scheduler=scheduler, _num_timesteps=4)
    clock, model = StepClock(pipeline), Denoiser()
    clock.start([model])
    scheduler.set_timesteps(10)
    model(torch.ones(1), scheduler.timesteps[0])
    clock.stop()
    assert clock.total == 4 and clock.timesteps == [float(t) for t in scheduler.timesteps[:4]]
    assert clock.upcoming(2).tolist() == scheduler.timesteps[:2].tolist()


def test_observers_see_and_change_samples() -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    clock = StepClock(types.SimpleNamespace(scheduler=scheduler))
    scheduler.set_timesteps(4)
    x, out, t = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), scheduler.timesteps[0]
    plain = scheduler.step(out, t, x).prev_sample
    clock.on_step(before=lambda inputs: inputs.update(sample=2 * inputs["sample"]), after=lambda sample: sample + 1)
    clock.start([])
    for result in (scheduler.step(out, t, x).prev_sample, scheduler.step(out, t, sample=x, return_dict=False)[0]):
        assert torch.allclose(result, 2 * plain + 1)
    clock.stop()
    assert torch.equal(scheduler.step(out, t, x).prev_sample, plain)


def test_inference_mode_is_followed() -> None:
    """Its tensors count no changes."""
    pipe, call = sd()
    accelerate(pipe, Reuse(plan="steps:full decoder full hold"))
    with torch.inference_mode():
        inside = run(pipe, call, steps=4)
    assert torch.equal(run(pipe, call, steps=4), inside)


def test_timesteps_made_under_inference_mode_and_changed_in_place() -> None:
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert walk(DDIMScheduler(), 3) == [(i, 0, 3, 0) for i in range(3)]
    scheduler = DDIMScheduler()
    clock, model = StepClock(types.SimpleNamespace(scheduler=scheduler)), Denoiser()
    clock.start([model])
    scheduler.set_timesteps(4)
    model(torch.ones(1), scheduler.timesteps[0])
    scheduler.timesteps -= 1
    model(torch.ones(1), scheduler.timesteps[0])
    clock.stop()
    assert clock.timesteps == [float(t) for t in scheduler.timesteps]
