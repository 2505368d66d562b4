"""The noise levels of every scheduler, and what acts by them."""

from __future__ import annotations

import itertools
from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from zoo import ddim, run, sd

from diffusion_accel import Reuse, UnsupportedPipelineError, accelerate
from diffusion_accel.noise_level import noise_levels, share_of, unknown_noise_levels
from diffusion_accel.prediction import Conversion

SCHEDULERS = sorted(
    {
        cls
        for name in dir(diffusers)
        if name.endswith("Scheduler") and isinstance(cls := getattr(diffusers, name), type)
        if issubclass(cls, SchedulerMixin) and getattr(cls, "_backends", None) is None
    },
    key=lambda c: c.__name__,
)
NOT_NOISE = {  # tokens, or steps without a level of noise
    "AmusedScheduler",
    "BlockRefinementScheduler",
    "DiscreteDDIMScheduler",
    "EntropyBoundScheduler",
    "RFD4ProteinaScheduler",
}


@pytest.mark.parametrize("cls", SCHEDULERS, ids=lambda c: c.__name__)
def test_noise_levels_of_every_scheduler(cls: Any) -> None:
    if cls.__name__ in NOT_NOISE:
        assert "not known" in str(unknown_noise_levels(cls.__new__(cls)))
        return
    name = cls.__name__.removesuffix("Scheduler")
    needed = {"VQDiffusion": {"num_vec_classes": 8}, "Helios": {"stages": 1}, "HeliosDMD": {"stages": 1}}
    steps = {"VQDiffusion": 100, "SCM": 2}.get(name, 10)
    scheduler = cls(**needed.get(name, {}))
    scheduler.set_timesteps(steps)
    if cls.__name__ == "ScoreSdeVeScheduler":
        scheduler.set_sigmas(10)
    levels = noise_levels(scheduler)
    assert len(levels) == len(scheduler.timesteps) and all(0 <= level <= 1 for level in levels)
    order = levels[::-1] if "Inverse" in cls.__name__ else levels
    falling = all(later <= level + 1e-6 for level, later in itertools.pairwise(order))
    assert falling and order[0] > 0.85 and order[-1] < 0.65, levels


def test_equal_noise_is_an_equal_level_whatever_the_timestep_is() -> None:
    sigmas = [10.0, 3.0, 1.0, 0.3, 0.05]
    table = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    discrete = diffusers.EulerDiscreteScheduler(**table)
    discrete.set_timesteps(sigmas=[*sigmas, 0.0])
    continuous = diffusers.EulerDiscreteScheduler(**table, timestep_type="continuous", prediction_type="v_prediction")
    continuous.set_timesteps(5)
    edm = diffusers.EDMEulerScheduler()
    edm.set_timesteps(5)
    uneven = diffusers.EulerDiscreteScheduler(**table, interpolation_type="log_linear")
    uneven.set_timesteps(5)
    for other in (continuous, edm, uneven):
        other.sigmas = torch.tensor([*sigmas, 0.0])
        other.timesteps = 0.25 * other.sigmas[:-1].log()
    known = noise_levels(discrete)
    assert known == pytest.approx([t / 1000 for t in discrete.timesteps.tolist()])
    assert noise_levels(continuous) == pytest.approx(known, abs=2e-3)
    assert noise_levels(edm) == pytest.approx(known, abs=2e-3)
    assert noise_levels(uneven) == pytest.approx(known, abs=2e-3)
    for scheduler in (discrete, continuous, uneven):  # and what a prediction means follows from it
        for t, sigma in zip(scheduler.timesteps.tolist(), sigmas, strict=True):
            a, s = Conversion(scheduler).coefficients(t)
            assert s / a == pytest.approx(sigma, rel=2e-2)
    shifted = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    shifted.set_timesteps(sigmas=[1.0, 0.5, 0.1], timesteps=[1000.0, 500.0, 100.0], mu=1.0)  # as CogView 4 does
    assert noise_levels(shifted) == pytest.approx(shifted.sigmas[:-1].tolist())
    inverted = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    inverted.set_timesteps(4)
    plain = FlowMatchEulerDiscreteScheduler()
    plain.set_timesteps(4)
    assert noise_levels(inverted) == pytest.approx(noise_levels(plain), abs=1e-6)


def test_guidance_over_an_interval_acts_by_noise() -> None:
    """The same steps for the same noise: EDM's timesteps are logarithms, of which none is within 0.2 … 0.8."""
    pipe, call = sd()
    unguided = {}
    for scheduler in (ddim(), diffusers.EDMEulerScheduler(), diffusers.DPMSolverMultistepScheduler()):
        pipe.scheduler = scheduler
        accelerate(pipe, Reuse(plan="full", guidance="interval:0.2-0.8"))
        run(pipe, call, steps=8)
        unguided[type(scheduler).__name__] = pipe.acceleration.report().counters["reuse"].get("unguided_steps")
    edm = [0.2 <= share_of(float(s)) <= 0.8 for s in pipe_sigmas(8)]
    assert unguided == {"DDIMScheduler": 3, "EDMEulerScheduler": 8 - sum(edm), "DPMSolverMultistepScheduler": 3}
    assert 0 < sum(edm) < 8
    pipe.acceleration.remove()
    pipe.scheduler = type("Odd", (SchedulerMixin,), {"config": {}})()
    with pytest.raises(UnsupportedPipelineError, match="noise levels of Odd"):
        accelerate(pipe, Reuse(plan="full", guidance="interval:0.2-0.8"))


def pipe_sigmas(steps: int) -> Any:
    scheduler = diffusers.EDMEulerScheduler()
    scheduler.set_timesteps(steps)
    return scheduler.sigmas[:-1]
