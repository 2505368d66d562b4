"""Forecasts on pipelines: exact where nothing is left out, and equal to the reuse engine where both say the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import EDMEulerScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler
from reuse_tools import counters, counting
from zoo import ZOO, cogview4, flux_guided, run

from diffusion_accel import Reuse, UnsupportedPipelineError, accelerate
from diffusion_accel.bench.entries import Entry
from diffusion_accel.bench.forecasting import Forecast
from diffusion_accel.bench.runner import Job, Runner

BUILT = {**ZOO, "flux_guided": flux_guided, "cogview4": cogview4}  # these call their transformer for each branch
SOME = (
    "sd",
    "sd_without_guidance",
    "controlnet",
    "inpaint",
    "deepfloyd_if",
    "unet2d",
    "animatediff",
    *sorted(BUILT.keys() - ZOO),
)
RULES = ("taylor@2,3", "hermite,3", "foca,3", "spectrum", "dmd,2", "sada", "sada-lagrange", "easycache,0.3")


def forecast(pipe: Any, call: dict[str, Any], rule: str, steps: int = 7) -> torch.Tensor:
    accelerate(pipe, Forecast(rule=rule))
    try:
        return run(pipe, call, steps)
    finally:
        pipe.acceleration.remove()


def reused(pipe: Any, call: dict[str, Any], plan: str, steps: int = 7) -> torch.Tensor:
    accelerate(pipe, Reuse(plan=plan))
    try:
        return run(pipe, call, steps)
    finally:
        pipe.acceleration.remove()


@pytest.mark.parametrize("name", SOME)
def test_every_step_computed_is_plain_diffusers(name: str) -> None:
    pipe, call = BUILT[name]()
    assert torch.equal(forecast(pipe, call, str(Forecast.neutral().rule)), run(pipe, call, 7))


@pytest.mark.parametrize("name", SOME)
def test_holding_is_what_the_reuse_engine_does(name: str) -> None:
    pipe, call = BUILT[name]()
    torch.testing.assert_close(forecast(pipe, call, "hold,3"), reused(pipe, call, "hold:3@0"))


@pytest.mark.parametrize("scheduler", [None, EulerDiscreteScheduler, UniPCMultistepScheduler])
@pytest.mark.parametrize("space", ["sample", "epsilon"])
def test_spaces_are_those_of_the_reuse_engine(scheduler: Any, space: str) -> None:
    pipe, call = ZOO["sd"]()
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, prediction_type="v_prediction")
    expected = reused(pipe, call, f"hold:3,{space}@0")
    torch.testing.assert_close(forecast(pipe, call, f"hold,3,{space}"), expected, rtol=1e-4, atol=1e-5)


def test_a_straight_line_is_the_same_in_steps_and_in_even_timesteps() -> None:
    pipe, call = ZOO["sd"]()
    expected = reused(pipe, call, "hold:2@1", 10)
    torch.testing.assert_close(forecast(pipe, call, "taylor@1,2", 10), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("rule", RULES)
def test_left_out_steps_do_not_call_the_denoiser_and_nothing_stays(rule: str) -> None:
    pipe, call = ZOO["controlnet"]()
    plain = run(pipe, call, 12)
    accelerate(pipe, Forecast(rule=rule))
    with counting(pipe.unet) as unet, counting(pipe.controlnet) as controlnet:
        first = run(pipe, call, 12)
    counted = counters(pipe, "forecast")
    assert counted["full_steps"] + counted["reused_steps"] == 12
    assert 0 < counted["reused_steps"] and unet.calls == controlnet.calls == counted["full_steps"]
    assert first.isfinite().all() and not torch.equal(first, plain)
    assert torch.equal(run(pipe, call, 12), first), "a second call begins anew"
    pipe.acceleration.remove()
    assert torch.equal(run(pipe, call, 12), plain)


@pytest.mark.parametrize("rule", [*RULES, "hermite,3,sample", "hold,3,epsilon"])
def test_transformers_of_flow_matching_with_a_call_for_each_branch(rule: str) -> None:
    pipe, call = flux_guided()
    plain = run(pipe, call, 12)
    with counting(pipe.transformer) as transformer:
        accelerate(pipe, Forecast(rule=rule))
        first = run(pipe, call, 12)
    counted = counters(pipe, "forecast")
    assert 0 < counted["full_steps"] < 12 and transformer.calls == 2 * counted["full_steps"]
    assert first.isfinite().all() and not torch.equal(first, plain)
    assert torch.equal(run(pipe, call, 12), first), "a second call begins anew"


def test_img2img_runs_a_part_of_the_steps() -> None:
    pipe, call = ZOO["img2img"]()
    assert torch.equal(forecast(pipe, call, "hold,1"), run(pipe, call, 7))
    torch.testing.assert_close(forecast(pipe, call, "hold,2"), reused(pipe, call, "hold:2@0"))


@pytest.mark.parametrize("rule", ["sada", "hold,3,sample"])
def test_what_cannot_be_forecast_is_refused(rule: str) -> None:
    pipe, _ = ZOO["sd"]()
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(UnsupportedPipelineError, match="with EDMEulerScheduler a prediction cannot be turned into"):
        accelerate(pipe, Forecast(rule=rule))
    pipe.scheduler = HeunDiscreteScheduler()
    accelerate(pipe, Forecast(rule="hold,3"))
    with pytest.raises(UnsupportedPipelineError, match="HeunDiscreteScheduler repeats timesteps"):
        accelerate(pipe, Forecast(rule="sada"))


def test_rules_that_decide_while_they_run_decide_for_each_image() -> None:
    pipe, _ = ZOO["unet2d"]()
    pipe.set_progress_bar_config(disable=True)
    entry, job = Entry.parse("forecast:easycache,5"), Job("tiny", ("", ""), 10, "ddim", seed=0, batch=2)
    together, alone = Runner(job, pipe), Runner(replace(job, prompts=("",), seed=1), pipe)
    torch.testing.assert_close(alone.images(entry), together.images(entry)[1:], rtol=1e-4, atol=1e-4)
    with together.active(entry) as sampler:
        assert sampler.batch == 1
    with together.active(Entry.parse("forecast:hold,3")) as sampler:
        assert sampler.batch == 2
    both = [Runner(replace(job, prompts=("",), seed=seed), pipe).facts(entry)["flops"] for seed in (0, 1)]
    assert together.facts(entry)["flops"] == sum(both) / 2 < together.facts(Entry("baseline"))["flops"]
    assert together.seconds(entry) > 0
