"""Heun's method for flow matching: diffusers' own as the oracle, its order, and what pipelines ask of a scheduler."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FluxPipeline
from reuse_tools import counting
from zoo import flux_guided, run

from diffusion_accel import ConfigurationError
from diffusion_accel.pipelines.schedulers import set_scheduler
from diffusion_accel.schedulers import FlowMatchHeunScheduler


def solved(scheduler: Any, velocity: Any, start: torch.Tensor) -> torch.Tensor:
    sample = start
    for timestep in scheduler.timesteps:
        sample = scheduler.step(velocity(sample, float(timestep) / 1000), timestep, sample, return_dict=False)[0]
    return sample


def test_at_the_same_levels_it_is_that_of_diffusers() -> None:
    theirs, ours = FlowMatchHeunDiscreteScheduler(shift=3.0), FlowMatchHeunScheduler(shift=3.0)
    theirs.set_timesteps(7)
    levels = [theirs.sigmas[0], *theirs.sigmas[1:-1:2]]
    ours.set_timesteps(sigmas=[float(s / (3 - 2 * s)) for s in levels])  # before the shift
    torch.testing.assert_close(ours.timesteps, theirs.timesteps)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas)
    start = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))

    def velocity(x: torch.Tensor, t: float) -> torch.Tensor:
        return torch.sin(3 * x) + t

    torch.testing.assert_close(solved(ours, velocity, start), solved(theirs, velocity, start))


def test_it_is_of_second_order() -> None:
    """dx/dσ = x from 1 to 0.1, whose solution is known: half the step, a quarter of the error."""
    errors = []
    for steps in (8, 16, 32):
        scheduler = FlowMatchHeunScheduler()
        scheduler.set_timesteps(sigmas=torch.linspace(1, 0.1, steps + 1).double().tolist())
        x = torch.ones(1)
        for timestep in scheduler.timesteps[:-1]:  # the last one leads to 0
            x = scheduler.step(x, timestep, x, return_dict=False)[0]
        errors.append(abs(float(x) - math.exp(-0.9)))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.15) and errors[1] / errors[2] == pytest.approx(4, rel=0.15)


def test_names_mean_flow_matching_on_its_models() -> None:
    pipe, call = flux_guided()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    plain = run(pipe, call, 5)
    set_scheduler(pipe, "heun")
    assert type(pipe.scheduler) is FlowMatchHeunScheduler and pipe.scheduler.config.shift == 2.0
    with counting(pipe.transformer) as transformer:
        first = run(pipe, call, 5)
    assert transformer.calls == 2 * (2 * 5 - 1) and not torch.equal(first, plain)
    assert torch.equal(run(pipe, call, 5), first)
    set_scheduler(pipe, "euler")
    assert torch.equal(run(pipe, call, 5), plain)
    set_scheduler(pipe, "heun,karras")
    assert pipe.scheduler.config.use_karras_sigmas
    with pytest.raises(ConfigurationError, match="'ddim' does not fit .* fitting: euler, heun"):
        set_scheduler(pipe, "ddim")


def test_a_folder_keeps_it(tmp_path: Any) -> None:
    pipe, call = flux_guided()
    set_scheduler(pipe, "heun")
    pipe.save_pretrained(tmp_path)
    absent = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    loaded = FluxPipeline.from_pretrained(tmp_path, **absent)
    assert type(loaded.scheduler) is FlowMatchHeunScheduler
    torch.testing.assert_close(run(loaded, call, 3), run(pipe, call, 3))
