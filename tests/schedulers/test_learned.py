"""The learned solver as a scheduler: its steps, its files, and what it refuses."""

from __future__ import annotations

import copy
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from solvers import neutral, odd
from zoo import ddim, sd

from diffusion_accel import ConfigurationError, LearnedMultistepScheduler, UnsupportedPipelineError
from diffusion_accel.combination import Combination
from diffusion_accel.noise_level import noise_levels
from diffusion_accel.prediction import Conversion, converted
from diffusion_accel.schedulers import dpmpp_2m_coefficients
from diffusion_accel.schedulers.solver import not_learnt, read_solvers


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def sampled(scheduler: Any, count: int = 4, begin: int = 0, shape: tuple[int, ...] = (2, 4, 3, 3)) -> torch.Tensor:
    """What comes of a "model" that predicts a little of the latents it is given."""
    scheduler.set_timesteps(count)
    if begin:
        scheduler.set_begin_index(begin)
    x = noise(*shape)
    for t in scheduler.timesteps[begin:]:
        x = scheduler.step((0.3 * x).sin(), t, x).prev_sample
    return x


# ---------------------------------------------------------------------- what a step is
def test_a_step_is_its_combination_of_all_that_was() -> None:
    scheduler = odd(ddim(), 5, channels=4)
    scheduler.set_timesteps(5)
    conversion = Conversion(scheduler)
    x, clean, latents = noise(2, 4, 3, 3, dtype=torch.float64), [], []
    for i, t in enumerate(scheduler.timesteps):
        prediction = noise(2, 4, 3, 3, seed=i + 1, dtype=torch.float64)
        alpha, sigma = conversion.coefficients(float(t))
        clean.insert(0, converted("sample", "epsilon", prediction, x, alpha, sigma))
        latents.insert(0, x)
        combination = Combination.parse(scheduler.config.solvers["5"]["steps"][i])
        wanted = torch.zeros_like(x)
        for c in range(4):
            for w, y in zip(combination.predictions[c], clean, strict=False):
                wanted[:, c] += w * y[:, c]
            for w, y in zip(combination.latents[c], latents, strict=False):
                wanted[:, c] += w * y[:, c]
        output = scheduler.step(prediction, t, x)
        torch.testing.assert_close(output.prev_sample, wanted)
        torch.testing.assert_close(output.pred_original_sample, clean[0])
        assert scheduler.step_index == i + 1
        x = wanted


def test_in_half_precision_it_is_computed_in_single() -> None:
    scheduler = odd(ddim(), 4)
    scheduler.set_timesteps(4)
    x = noise(1, 4, 3, 3).bfloat16()
    whole = copy.deepcopy(scheduler)
    for t in scheduler.timesteps[:1]:
        half = scheduler.step(x.sin(), t, x).prev_sample
        single = whole.step(x.sin().float(), t, x.float()).prev_sample
        assert half.dtype == torch.bfloat16 and torch.equal(half, single.bfloat16())
        assert scheduler.step(x.sin(), t, x, return_dict=False)[0].equal(half)


def test_tokens_frames_and_a_learned_variance() -> None:
    images, tokens = noise(2, 4, 3, 3), noise(2, 4, 3, 3).flatten(2).transpose(1, 2)
    frames = images[:, :, None].expand(-1, -1, 2, -1, -1).contiguous()
    made = []
    for x in (images, tokens, frames):
        scheduler = odd(ddim(), 3, channels=4)
        scheduler.set_timesteps(3)
        variance = torch.full_like(x, 9.0)
        dim = 2 if x.dim() == 3 else 1
        for t in scheduler.timesteps:
            x = scheduler.step(torch.cat([x.cos(), variance], dim), t, x).prev_sample
        made.append(x)
    torch.testing.assert_close(made[1], made[0].flatten(2).transpose(1, 2))
    torch.testing.assert_close(made[2][:, :, 1], made[0])


def test_a_second_call_is_the_first() -> None:
    scheduler = odd(ddim(), 4, 6, channels=4)
    first = sampled(scheduler)
    sampled(scheduler, 6)
    assert torch.equal(sampled(scheduler), first)


def test_a_jump_begins_anew() -> None:
    scheduler = odd(ddim(), 4)
    wanted = sampled(copy.deepcopy(scheduler))
    scheduler.set_timesteps(4)
    x = noise(2, 4, 3, 3)
    for t in scheduler.timesteps[:3]:
        x = scheduler.step((0.3 * x).sin(), t, x).prev_sample
    x = noise(2, 4, 3, 3)  # without set_timesteps, from the first timestep on
    for t in scheduler.timesteps.tolist():
        x = scheduler.step((0.3 * x).sin(), t, x).prev_sample
    assert torch.equal(x, wanted)
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:  # timesteps that say nothing: counted
        x = scheduler.step(x, torch.full((2,), float(t)), x).prev_sample
    with pytest.raises(ConfigurationError, match="all 4 steps are made: set_timesteps begins anew"):
        scheduler.step(x, torch.full((2,), 5.0), x)


def test_timesteps_are_known_as_they_were_learnt() -> None:
    """In double precision as in the file, where the tensor has single; where they say nothing, by `begin_index`."""
    scheduler = odd(ddim(), 7)
    learnt = scheduler.config.solvers["7"]["timesteps"]
    scheduler.set_timesteps(7)
    assert any(t not in scheduler.timesteps.tolist() for t in learnt), "some are rounded"
    x = noise(1, 4, 2, 2)
    for i in (4, 2, 6, 0):
        scheduler.step(x, learnt[i], x)
        assert scheduler.step_index == i + 1
    scheduler.set_timesteps(7)
    scheduler.set_begin_index(3)
    assert scheduler.begin_index == 3
    scheduler.step(x, torch.tensor([5.0, 5.0]), x)
    assert scheduler.step_index == 4
    for begin in (8, -1):
        with pytest.raises(ConfigurationError, match="begin_index must be from 0 to 7"):
            scheduler.set_begin_index(begin)


def test_starting_in_the_middle_is_neutral_until_enough_is_known() -> None:
    scheduler = odd(ddim(), 6)
    scheduler.set_timesteps(6)
    times = scheduler.timesteps.tolist()
    alphas, sigmas = scheduler.alphas_and_sigmas(times)
    known = dpmpp_2m_coefficients(alphas, sigmas)
    first = sigmas[3] / sigmas[2]
    steps = [Combination(((alphas[3] - first * alphas[2],),), ((first,),)), known[3]]
    steps += [Combination.parse(text) for text in scheduler.config.solvers["6"]["steps"][4:]]
    x, clean, latents = noise(1, 4, 2, 2), [], []
    for combination, a, s in zip(steps, alphas[2:], sigmas[2:], strict=True):
        prediction = (0.3 * x).sin()
        clean.insert(0, (x - s * prediction) / a)
        latents.insert(0, x)
        x = combination.apply(clean, latents)
    torch.testing.assert_close(sampled(scheduler, 6, begin=2, shape=(1, 4, 2, 2)), x)


def test_a_start_of_its_own_is_used() -> None:
    half, quarter = "0.5;0.25", "0.5,0.1;0.25"
    scheduler = odd(ddim(), 6, start={"2": [half], "3": ["0;1", quarter]})
    scheduler.set_timesteps(6)
    x = noise(1, 4, 2, 2)
    t = scheduler.timesteps
    one = scheduler.step(x, t[2], x)
    torch.testing.assert_close(one.prev_sample, 0.5 * one.pred_original_sample + 0.25 * x)
    two = scheduler.step(x, t[3], one.prev_sample)
    wanted = 0.5 * two.pred_original_sample + 0.1 * one.pred_original_sample + 0.25 * one.prev_sample
    torch.testing.assert_close(two.prev_sample, wanted)
    assert torch.equal(scheduler.step(x, t[3], x).prev_sample, x), "the start for one evaluation"


# ---------------------------------------------------------------------- noise
@pytest.mark.parametrize("base", [ddim(), FlowMatchEulerDiscreteScheduler()], ids=["ddim", "flow"])
def test_noise_is_added_as_the_model_was_trained(base: Any) -> None:
    scheduler = LearnedMultistepScheduler.like(base)
    x0, e = noise(2, 4, 3, 3), noise(2, 4, 3, 3, seed=1)
    for times in (torch.tensor([10.0, 700.0]), torch.tensor([500]), torch.tensor([123.75])):
        found = [Conversion(base).coefficients(float(t)) for t in times.expand(2)]
        wanted = torch.stack([a * x0[i] + s * e[i] for i, (a, s) in enumerate(found)])
        torch.testing.assert_close(scheduler.add_noise(x0, e, times), wanted, rtol=1e-4, atol=1e-4)
        assert torch.equal(scheduler.scale_noise(x0, times, e), scheduler.add_noise(x0, e, times))
        velocity = scheduler.get_velocity(x0, e, times)
        x = scheduler.add_noise(x0, e, times)
        back = [
            converted("sample", Conversion(base).kind if scheduler.config.flow else "v_prediction", v, x[i], a, s)
            for i, (v, (a, s)) in enumerate(zip(velocity, found, strict=True))
        ]
        torch.testing.assert_close(torch.stack(back), x0, rtol=1e-3, atol=1e-3)


def test_it_is_known_to_what_asks_for_levels_and_spaces() -> None:
    scheduler = odd(ddim(prediction_type="v_prediction"), 4)
    scheduler.set_timesteps(4)
    assert noise_levels(scheduler) == [t / 1000 for t in scheduler.timesteps.tolist()]
    conversion = Conversion(scheduler)
    assert conversion.possible and conversion.kind == "v_prediction" and not conversion.flow
    flow = neutral(FlowMatchEulerDiscreteScheduler(shift=3.0), 4)
    flow.set_timesteps(4)
    assert noise_levels(flow) == pytest.approx([t / 1000 for t in flow.timesteps.tolist()])
    assert Conversion(flow).possible and Conversion(flow).kind == "flow"
    for t, (a, s) in zip(
        flow.timesteps.tolist(), map(Conversion(flow).coefficients, flow.timesteps.tolist()), strict=True
    ):
        assert (a, s) == (pytest.approx(max(1e-4, 1 - t / 1000)), pytest.approx(t / 1000))


# ---------------------------------------------------------------------- files
@pytest.mark.parametrize("base", [ddim(prediction_type="v_prediction"), FlowMatchEulerDiscreteScheduler()])
def test_saved_and_loaded_it_is_the_same(base: Any, tmp_path: Path) -> None:
    scheduler = neutral(base, 4) if isinstance(base, FlowMatchEulerDiscreteScheduler) else odd(base, 4, 6, channels=4)
    scheduler.register_to_config(made_for={"denoiser": "UNet2DConditionModel", "guidance_scale": [1.0, 5.0]})
    scheduler.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert values["_class_name"] == "LearnedMultistepScheduler"
    loaded: Any = LearnedMultistepScheduler.from_pretrained(tmp_path)
    assert loaded.evaluations == scheduler.evaluations and loaded.config.made_for == scheduler.config.made_for
    assert loaded.config.solvers == scheduler.config.solvers
    assert torch.equal(sampled(loaded), sampled(scheduler))
    again = LearnedMultistepScheduler.from_config(loaded.config)
    assert torch.equal(sampled(again), sampled(scheduler)) and again.config.flow == scheduler.config.flow


def test_other_schedulers_are_made_from_its_configuration() -> None:
    base = ddim(prediction_type="v_prediction", beta_end=0.012)
    for cls in (DDIMScheduler, EulerDiscreteScheduler):
        made: Any = cls.from_config(odd(base, 4).config)
        assert torch.equal(made.alphas_cumprod, base.alphas_cumprod)
        assert (made.config.prediction_type, made.config.steps_offset) == ("v_prediction", 1)
    assert DDIMScheduler in odd(base, 4).compatibles
    assert not neutral(FlowMatchEulerDiscreteScheduler(), 4).compatibles


def test_like_takes_the_noise_schedule_of_others() -> None:
    video = CogVideoXDDIMScheduler()
    assert LearnedMultistepScheduler.like(EulerDiscreteScheduler(beta_end=0.012)).config.beta_end == 0.012
    for other, says in ((EDMEulerScheduler(), "EDMEulerScheduler"), (video, "noise schedule")):
        with pytest.raises(UnsupportedPipelineError, match=says):
            LearnedMultistepScheduler.like(other)


def test_what_does_not_fit_is_said() -> None:
    scheduler = odd(ddim(), 4)
    assert scheduler.unfit_for(EulerDiscreteScheduler()) is None
    assert "predicts epsilon, DDIMScheduler is for v_prediction" in str(
        scheduler.unfit_for(ddim(prediction_type="v_prediction"))
    )
    assert "noise schedule" in str(scheduler.unfit_for(ddim(beta_end=0.012)))
    assert "predicts epsilon" in str(scheduler.unfit_for(FlowMatchEulerDiscreteScheduler()))
    assert "1000 training timesteps" in str(scheduler.unfit_for(DDIMScheduler(num_train_timesteps=500)))


@pytest.mark.slow
def test_importing_the_package_alone_makes_it_known_to_diffusers() -> None:
    code = (
        "import sys, diffusion_accel; assert not {'torch', 'diffusers'} & set(sys.modules)\n"
        "from diffusers.pipelines.pipeline_loading_utils import get_class_obj_and_candidates, ALL_IMPORTABLE_CLASSES\n"
        "from diffusers import pipelines\n"
        "cls, known = get_class_obj_and_candidates('diffusion_accel.schedulers', 'LearnedMultistepScheduler',\n"
        "    ALL_IMPORTABLE_CLASSES, pipelines, False)\n"
        "from diffusers.pipelines.pipeline_loading_utils import _get_custom_components_and_folders as of_the_hub\n"
        "of_the_hub('owner/model', {'scheduler': ['diffusion_accel.schedulers', cls.__name__]}, set())\n"
        "assert issubclass(cls, known['SchedulerMixin']); print(cls.__module__, cls.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "diffusion_accel.schedulers LearnedMultistepScheduler\n", done.stderr


# ---------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (7, "learnt for 5, 6, 8, 10 and 12 evaluations; the nearest to 7 is 6 or 8"),
        (50, "the nearest to 50 is 12"),
        (True, "evaluations, got True"),
        (None, "evaluations, got None"),
    ],
)
def test_other_numbers_are_refused_with_the_nearest(wanted: Any, says: str) -> None:
    assert says in str(not_learnt([5, 6, 8, 10, 12], wanted))
    assert not_learnt([5, 8], 8) is None
    assert "holds no solver" in str(not_learnt([], 8))


def test_set_timesteps_refuses_what_was_not_learnt() -> None:
    scheduler = odd(ddim(), 4, 6)
    with pytest.raises(ValueError, match="learnt for 4 and 6 evaluations; the nearest to 5 is 4 or 6"):
        scheduler.set_timesteps(5)
    with pytest.raises(ConfigurationError, match="timesteps of its own"):
        scheduler.set_timesteps(timesteps=[3, 2, 1])
    with pytest.raises(ConfigurationError, match="timesteps of its own"):
        scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.4, 0.1])
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0.25, 4).tolist(), mu=1.15)
    assert scheduler.num_inference_steps == 4 and len(scheduler) == 1000
    fresh = LearnedMultistepScheduler()
    x = noise(1, 4, 2, 2)
    with pytest.raises(ConfigurationError, match="set_timesteps must be called"):
        fresh.step(x, 3, x)
    with pytest.raises(ConfigurationError, match="holds no solver"):
        fresh.set_timesteps(4)
    assert fresh.scale_model_input(x, 3) is x and fresh.init_noise_sigma == 1 and fresh.order == 1


def test_numbers_of_channels_that_do_not_fit_are_refused() -> None:
    scheduler = odd(ddim(), 4, channels=3)
    scheduler.set_timesteps(4)
    x = noise(1, 4, 2, 2)
    with pytest.raises(ConfigurationError, match="latents of 3 channels, these have 4"):
        scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(ConfigurationError, match="shape of the latents"):
        scheduler.step(noise(1, 5, 2, 2), scheduler.timesteps[0], x)


GOOD: dict[str, Any] = {"timesteps": [900.0, 300.0], "steps": ["1;0.1", "1,0.1;0.1"]}


@pytest.mark.parametrize(
    ("solvers", "says"),
    [
        ([], "solvers must be a table"),
        ({"two": GOOD}, "a number of evaluations"),
        ({"0": GOOD}, "from 1 to 1000"),
        ({"3": GOOD}, "the solver for 3 evaluations: timesteps must be 3 numbers"),
        ({"2": {**GOOD, "timesteps": [300, 900]}}, "must fall"),
        ({"2": {**GOOD, "timesteps": [300, 300]}}, "must fall"),
        ({"2": {**GOOD, "timesteps": [1000, 300]}}, "from 0 to 999"),
        ({"2": {**GOOD, "timesteps": [300, -1]}}, "from 0 to 999"),
        ({"2": {**GOOD, "timesteps": [float("nan"), 1]}}, "2 numbers"),
        ({"2": {**GOOD, "steps": ["1;0.1"]}}, "steps must be 2 combinations"),
        ({"2": {**GOOD, "steps": ["1;0.1", 3]}}, "a combination is a text"),
        ({"2": {**GOOD, "steps": ["1;0.1", "x"]}}, "a combination is numbers"),
        ({"2": {**GOOD, "steps": ["1,2;0.1", "1;0.1"]}}, "step 0 needs 2 evaluations, and 1 are made"),
        ({"2": {**GOOD, "steps": ["1;0.1,1", "1;0.1"]}}, "step 0 needs 2 evaluations"),
        ({"2": {**GOOD, "more": 1}}, "may have start"),
        ({"2": {"timesteps": [1.0, 0.0]}}, "timesteps and steps"),
        ({"2": {**GOOD, "start": []}, "3": GOOD}, "the solver for 3"),
        ({"2": {**GOOD, "start": [1]}}, "start must be a table"),
        ({"2": {**GOOD, "start": {"0": ["1;1"]}}}, "number of a step must be from 1 to 1"),
        ({"2": {**GOOD, "start": {"1": ["1,1;1"]}}}, "start 1: entry 1 needs more"),
        ({"2": {**GOOD, "start": {"1": ["1;1", "1;1"]}}}, "start 1: entry 2 needs more"),
        ({"2": {**GOOD, "steps": ["1;0|1;0", "1;0|1;0|1;0"]}}, "as many channels"),
    ],
)
def test_solvers_that_cannot_be_are_refused(solvers: Any, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        read_solvers(solvers, 1000)
    if isinstance(solvers, dict):
        with pytest.raises(ConfigurationError):
            LearnedMultistepScheduler(solvers=solvers)


def test_a_flow_has_limits_of_its_own() -> None:
    assert read_solvers({"2": {**GOOD, "timesteps": [1000, 1]}}, 1000, flow=True)
    with pytest.raises(ConfigurationError, match="from above 0 to 1000"):
        read_solvers({"2": {**GOOD, "timesteps": [1000, 0]}}, 1000, flow=True)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"num_train_timesteps": 0}, "num_train_timesteps"),
        ({"num_train_timesteps": "many"}, "num_train_timesteps"),
        ({"flow": 1}, "flow must be true or false"),
        ({"made_for": []}, "made_for must be a table"),
        ({"prediction_type": "noise"}, "prediction_type must be epsilon, v_prediction, sample, or flow"),
        ({"prediction_type": "flow"}, "or flow with flow=True"),
        ({"prediction_type": "epsilon", "flow": True}, "prediction_type must be flow, with flow, got 'epsilon'"),
        ({"beta_schedule": "steep"}, "beta_schedule 'steep'"),
        ({"beta_end": 1.0}, "beta_start and beta_end must be numbers"),
        ({"beta_start": "0"}, "beta_start and beta_end must be numbers"),
        ({"trained_betas": [0.1]}, r"trained_betas \(1000 of them\)"),
    ],
)
def test_configurations_that_cannot_be_are_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        LearnedMultistepScheduler(**values)


# ---------------------------------------------------------------------- the page
PAGE = Path(__file__).parents[2] / "docs" / "learned-solver.md"


def test_the_examples_of_the_page_hold() -> None:
    blocks = dict(re.findall(r"```(json|python)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
    values = {k: v for k, v in json.loads(blocks["json"]).items() if k != "_class_name"}
    assert LearnedMultistepScheduler(**values).evaluations == [2]
    names: dict[str, Any] = {"pipe": sd()[0]}
    exec(blocks["python"], names)  # the last one
    scheduler = names["pipe"].scheduler
    assert scheduler.evaluations == [4] and sampled(scheduler).isfinite().all()
    table = PAGE.read_text(encoding="utf-8").partition("| key | meaning |")[2]
    keys = {*inspect.signature(LearnedMultistepScheduler).parameters}
    assert keys <= {*re.findall(r"`(\w+)`", table)}
