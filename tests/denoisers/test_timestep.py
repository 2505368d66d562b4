"""The step is found by what the denoiser is told, whatever the unit."""

from __future__ import annotations

import copy
import math
import types
from typing import Any

import pytest
import torch
import zoo
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from zoo import run

from diffusion_accel import Reuse, accelerate
from diffusion_accel.denoisers.families import UNITS, UNKNOWN, PipelineFamily
from diffusion_accel.steps import StepClock


class Told(torch.nn.Module):
    def forward(self, sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        return 0.1 * sample


# written down once more, from the pipelines: (timestep, sigma) -> what the denoiser is told
TOLD: dict[str, Any] = {
    "t": lambda t, s: t,
    "t/1000": lambda t, s: t / 1000,
    "1-t/1000": lambda t, s: (1000 - t) / 1000,
    "t*scale": lambda t, s: t * 0.001,
    "sigma": lambda t, s: s,
    "sigma/(1+sigma)": lambda t, s: s / (s + 1),
    "log(sigma)/4": lambda t, s: torch.log(s) * 0.25,
    "scm": lambda t, s: torch.sin(t) / (torch.cos(t) + torch.sin(t)),
}


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
@pytest.mark.parametrize("unit", TOLD)
def test_the_step_is_found_whatever_the_unit(unit: str, known: bool) -> None:
    """With a shift of 1 the timesteps are 1000 … 1: what is told at one step is what another step's timestep is."""
    assert TOLD.keys() == UNITS.keys()
    if not known and unit == "t*scale":
        return  # nothing says what the scale is
    for dtype in (torch.float32, torch.bfloat16):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        model = Told()
        model.config = types.SimpleNamespace(timestep_scale=0.001)
        clock = StepClock(types.SimpleNamespace(scheduler=scheduler, unet=model))
        clock.family = PipelineFamily(time=unit) if known else UNKNOWN
        clock.start([model])
        scheduler.set_timesteps(8)
        if unit == "scm":  # angles
            scheduler.timesteps = torch.linspace(math.pi / 2, 0.1, 8)
        seen, x = [], torch.ones(2, 4)
        for _ in range(2):
            scheduler._step_index = None
            for t, s in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
                told = torch.as_tensor(TOLD[unit](t, s)).expand(2).to(dtype)
                for _call in range(2):
                    model(x, told)
                    seen.append((clock.segment, clock.index, clock.call))
                if unit != "scm":
                    scheduler.step(x, t, x)
                else:
                    clock._stepped = True
        clock.stop()
        assert seen == [(again, i, c) for again in range(2) for i in range(8) for c in range(2)], dtype


def test_a_timestep_for_each_token_counts_by_the_noisiest() -> None:
    scheduler = DDIMScheduler()
    clock, model = StepClock(types.SimpleNamespace(scheduler=scheduler)), Told()
    clock.start([model])
    scheduler.set_timesteps(5)
    seen = []
    for t in scheduler.timesteps:
        model(torch.ones(1), torch.stack([0 * t, t, t]))  # the first frame is given
        seen.append(clock.index)
        scheduler.step(torch.ones(1), t, torch.ones(1))
    clock.stop()
    assert seen == list(range(5))


def test_a_copy_of_the_scheduler_steps_by_itself() -> None:
    """Pipelines of video with sound copy their scheduler in a call; what the copy does is no step of the image."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    clock = StepClock(types.SimpleNamespace(scheduler=scheduler))
    clock.start([])
    scheduler.set_timesteps(4)
    other = copy.deepcopy(scheduler)
    for t in scheduler.timesteps:
        for one in (scheduler, other):
            one.step(torch.ones(1), t, torch.ones(1))
    clock.stop()
    assert clock.steps == 4 and scheduler.step_index == other.step_index == 4


def test_aura_flow_is_told_thousandths() -> None:
    pipe, call = zoo.aura_flow(shift=1.0)
    accelerate(pipe, Reuse(plan="hold:2"))
    run(pipe, call, steps=6)
    counted = pipe.acceleration.report().counters["reuse"]
    assert (counted["full_steps"], counted["hold_steps"]) == (3, 3)
