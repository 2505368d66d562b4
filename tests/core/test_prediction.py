"""What a prediction means: noise, clean sample, velocity."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from zoo import ddim

from diffusion_accel.prediction import Conversion

KINDS = ("epsilon", "v_prediction", "sample")


@pytest.mark.parametrize("kind", [*KINDS, "flow"])
@pytest.mark.parametrize("space", ["epsilon", "sample"])
def test_noise_and_clean_sample_are_what_the_schedule_says(kind: str, space: str) -> None:
    x0, noise = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    if kind == "flow":
        scheduler: Any = FlowMatchEulerDiscreteScheduler()
        x = 0.7 * x0 + 0.3 * noise
        prediction, time = noise - x0, 300.0
    else:
        scheduler, time = ddim(prediction_type=kind), 300.0
        x = scheduler.add_noise(x0, noise, torch.tensor([300]))
        velocity = scheduler.get_velocity(x0, noise, torch.tensor([300]))
        prediction = {"epsilon": noise, "v_prediction": velocity, "sample": x0}[kind]
    conversion = Conversion(scheduler)
    assert conversion.possible
    there = conversion.to(space, prediction, x, time)
    assert torch.allclose(there, noise if space == "epsilon" else x0, atol=1e-4)
    assert torch.allclose(conversion.back(space, there, x, time), prediction, atol=1e-4)
    doubled = torch.cat([prediction, noise], 1)  # a learned variance stays as it is
    assert torch.equal(conversion.to(space, doubled, x, time)[:, 4:], noise)
    wide = torch.cat([x, noise], 1)  # a mask beside the latents does not matter
    assert torch.equal(conversion.to(space, prediction, wide, time), there)


@pytest.mark.parametrize("kind", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_flow_matching_with_a_scheduler_of_both_kinds(kind: Any) -> None:
    """Wan's and Sana's: the clean sample is what the scheduler itself makes of a prediction."""
    scheduler = kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    scheduler.set_timesteps(6)
    conversion = Conversion(scheduler)
    assert conversion.possible and conversion.flow and not Conversion(kind(use_flow_sigmas=True)).flow
    x, v = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    for step, time in enumerate(scheduler.timesteps):
        scheduler._step_index = step
        clean = scheduler.convert_model_output(v, sample=x)
        assert torch.allclose(conversion.to("sample", v, x, float(time)), clean, atol=1e-5)
        assert torch.allclose(conversion.back("sample", clean, x, float(time)), v, atol=1e-4)
        opposite = Conversion(scheduler, negated=True)
        assert torch.equal(opposite.to("sample", -v, x, float(time)), conversion.to("sample", v, x, float(time)))
        assert torch.allclose(opposite.back("sample", clean, x, float(time)), -v, atol=1e-4)


def test_slopes_are_those_of_the_conversion() -> None:
    conversion = Conversion(ddim(prediction_type="v_prediction"))
    x, v = torch.randn(2, 1, 4, 3, 3, dtype=torch.float64).unbind(0)
    for space, t in itertools.product(("epsilon", "sample"), (10.0, 500.0, 990.0)):
        change = conversion.to(space, v + 1, x, t) - conversion.to(space, v, x, t)
        assert torch.allclose(change, torch.full_like(change, conversion.slope(space, t)), atol=1e-6)
