"""Known solvers written in as coefficients are diffusers' own schedulers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given
from hypothesis import strategies as st
from solvers import neutral
from zoo import run, sd, sd3

from diffusion_accel.schedulers import ddim_coefficients, dpmpp_2m_coefficients
from diffusion_accel.schedulers.learned import LearnedMultistepScheduler

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KINDS = ("epsilon", "v_prediction", "sample")


def both(base: Any, mine: Any, count: int, dtype: torch.dtype = torch.float64) -> float:
    """How far the latents of two schedulers get apart on the same predictions, as a share of their size."""
    generator = torch.Generator().manual_seed(0)
    base.set_timesteps(count)
    mine.set_timesteps(count)
    assert base.timesteps.tolist() == mine.timesteps.tolist()
    x = y = torch.randn(2, 4, 6, 5, dtype=dtype, generator=generator)
    apart = 0.0
    for t, own in zip(base.timesteps, mine.timesteps, strict=True):
        prediction = torch.randn(x.shape, dtype=dtype, generator=generator)
        x = base.step(prediction, t, x).prev_sample
        y = mine.step(prediction, own, y).prev_sample
        assert y.dtype == dtype
        apart = max(apart, float((x - y).abs().max() / (1 + x.abs().max())))
    return apart


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_ddim(kind: str, dtype: torch.dtype, most: float) -> None:
    for to_one in (True, False):
        base = DDIMScheduler(**BETAS, prediction_type=kind, clip_sample=False, set_alpha_to_one=to_one, steps_offset=1)
        first = float(base.alphas_cumprod[0])
        final = (1.0, 0.0) if to_one else (first**0.5, (1 - first) ** 0.5)
        assert both(base, neutral(base, 7, final=final), 7, dtype) < most


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 8, 20])
def test_dpm_solver(kind: str, count: int) -> None:
    base = DPMSolverMultistepScheduler(**BETAS, prediction_type=kind)
    assert both(base, neutral(base, count, by=dpmpp_2m_coefficients), count) < 1e-6
    assert both(base, neutral(base, count, by=dpmpp_2m_coefficients), count, torch.float32) < 1e-5


@pytest.mark.parametrize(("count", "lower"), [(8, True), (8, False), (16, True)])
def test_dpm_solver_that_ends_in_a_little_noise(count: int, lower: bool) -> None:
    base = DPMSolverMultistepScheduler(**BETAS, final_sigmas_type="sigma_min", lower_order_final=lower)
    first = float(base.alphas_cumprod[0])
    final = first**0.5, (1 - first) ** 0.5
    mine = neutral(base, count, by=dpmpp_2m_coefficients, final=final, lower_order_final=lower)
    assert both(base, mine, count) < 1e-6


def test_schedules_without_signal_at_the_end() -> None:
    changes: dict[str, Any] = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    base = DPMSolverMultistepScheduler(**BETAS, **changes, prediction_type="v_prediction")
    assert both(base, neutral(base, 8, by=dpmpp_2m_coefficients), 8) < 1e-6


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_of_a_flow(shift: float) -> None:
    base = FlowMatchEulerDiscreteScheduler(shift=shift)
    mine = neutral(base, 6)
    assert mine.config.flow and mine.config.prediction_type == "flow"
    assert both(base, mine, 6, torch.float32) < 1e-5


def test_2m_of_a_flow() -> None:
    base = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=2.0)
    dpm: Any = DPMSolverMultistepScheduler.from_config(base.config)
    dpm.set_timesteps(6)
    sigmas = [float(s) for s in dpm.sigmas[:-1]]
    times = [1000 * s for s in sigmas]
    steps = [str(c) for c in dpmpp_2m_coefficients([1 - s for s in sigmas], sigmas)]
    mine = LearnedMultistepScheduler(flow=True, solvers={"6": {"timesteps": times, "steps": steps}})
    mine.set_timesteps(6)
    x = y = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    for t, own in zip(dpm.timesteps, mine.timesteps, strict=True):
        prediction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        x, y = dpm.step(prediction, t, x).prev_sample, mine.step(prediction, own, y).prev_sample
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@given(
    st.lists(st.floats(0.01, 0.999), min_size=1, max_size=20, unique=True).filter(
        lambda found: all(a - b > 1e-3 for a, b in itertools.pairwise(sorted(found, reverse=True)))
    ),
    st.booleans(),
)
def test_latents_of_one_image_stay_on_its_way(sigmas: list[float], flow: bool) -> None:
    """Where the model always means the same image, every solver goes to the next noise level of it exactly."""
    sigmas = sorted(sigmas, reverse=True)
    alphas = [1 - s if flow else (1 - s**2) ** 0.5 for s in sigmas]
    for by in (ddim_coefficients, dpmpp_2m_coefficients):
        here, there = zip(alphas, sigmas, strict=True), [*zip(alphas[1:], sigmas[1:], strict=True), (1.0, 0.0)]
        for step, (a, s), (b, r) in zip(by(alphas, sigmas), here, there, strict=True):
            image, noise = sum(step.predictions[0]), step.latents[0][0]
            assert image + noise * a == pytest.approx(b, abs=1e-8) and noise * s == pytest.approx(r, abs=1e-8)


@pytest.mark.parametrize(
    ("scheduler", "by"), [(DDIMScheduler, ddim_coefficients), (DPMSolverMultistepScheduler, dpmpp_2m_coefficients)]
)
def test_in_a_pipeline(scheduler: Any, by: Any) -> None:
    pipe, call = sd()
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    wanted = run(pipe, call, 5)
    pipe.scheduler = neutral(pipe.scheduler, 5, by=by)
    torch.testing.assert_close(run(pipe, call, 5), wanted, rtol=1e-4, atol=1e-4)


def test_in_a_pipeline_of_flow_matching() -> None:
    pipe, call = sd3()
    wanted = run(pipe, call, 4)
    pipe.scheduler = neutral(pipe.scheduler, 4)
    torch.testing.assert_close(run(pipe, call, 4), wanted, rtol=1e-4, atol=1e-4)
