"""The learned solver in pipelines of every kind, with what else may act on a call, and in pipeline folders."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, StableDiffusionInpaintPipeline
from model_folder import write_folder
from solvers import neutral, odd
from zoo import ZOO, _sd, dit, flux, img2img, inpaint, run, sd, text, unet

from diffusion_accel import (
    AcceleratedPipeline,
    ConfigurationError,
    EncoderReuse,
    LatentTransparency,
    LearnedMultistepScheduler,
    PatchParallel,
    Reuse,
    accelerate,
    load_pipeline,
)
from diffusion_accel.schedulers import dpmpp_2m_coefficients
from diffusion_accel.schedulers.measured import describe, unmeasured
from diffusion_accel.schedulers.solver import read_solvers

STEPS = 5


def by_hand(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    """What the solver's definition says of a text-to-image call with guidance."""
    scheduler = pipe.scheduler
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 8, 8, generator=generator)
    embeds = torch.cat([call["negative_prompt_embeds"], call["prompt_embeds"]])
    solver = read_solvers(scheduler.config.solvers, 1000)[STEPS]
    alphas, sigmas = scheduler.alphas_and_sigmas(solver.timesteps)
    clean, latents = [], []
    with torch.no_grad():
        for t, step, a, s in zip(solver.timesteps, solver.steps, alphas, sigmas, strict=True):
            without, with_it = pipe.unet(torch.cat([x, x]), torch.tensor(t), embeds).sample.chunk(2)
            prediction = without + call["guidance_scale"] * (with_it - without)
            clean.insert(0, (x - s * prediction) / a)
            latents.insert(0, x)
            x = step.apply(clean, latents)
    return x


def test_an_image_is_what_the_definition_says() -> None:
    pipe, call = sd()
    pipe.scheduler = odd(pipe.scheduler, STEPS, channels=4)
    found = run(pipe, call, STEPS)
    torch.testing.assert_close(found, by_hand(pipe, call), rtol=1e-3, atol=1e-3)
    assert torch.equal(run(pipe, call, STEPS), found), "a second call"


@pytest.mark.parametrize("kind", ["sdxl", "controlnet", "ip_adapter", "unet3d", "dit", "animatediff"])
def test_pipelines_take_it(kind: str) -> None:
    pipe, call = {**ZOO, "dit": dit}[kind]()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    wanted = run(pipe, call, STEPS)
    pipe.scheduler = neutral(pipe.scheduler, STEPS)
    torch.testing.assert_close(run(pipe, call, STEPS), wanted, rtol=1e-3, atol=1e-3)
    pipe.scheduler = odd(pipe.scheduler, STEPS)
    assert run(pipe, call, STEPS).isfinite().all()


def test_flux_leaves_the_sigmas_to_it() -> None:
    pipe, call = flux()
    pipe.scheduler = neutral(pipe.scheduler, 4)
    first = run(pipe, call, 4)
    assert (
        first.isfinite().all() and pipe.scheduler.timesteps.tolist() == pipe.scheduler.config.solvers["4"]["timesteps"]
    )
    with pytest.raises(ConfigurationError, match="learnt for 4 evaluations"):
        run(pipe, call, 5)


@pytest.mark.parametrize("strength", [0.3, 0.7, 1.0])
def test_an_image_to_start_from(strength: float) -> None:
    pipe, call = img2img()
    pipe.scheduler = base = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    wanted = run(pipe, call, 6, strength=strength)
    pipe.scheduler = neutral(base, 6, by=dpmpp_2m_coefficients)
    torch.testing.assert_close(run(pipe, call, 6, strength=strength), wanted, rtol=1e-3, atol=1e-3)
    pipe.scheduler = odd(base, 6, channels=4)
    first = run(pipe, call, 6, strength=strength)
    assert first.isfinite().all() and torch.equal(run(pipe, call, 6, strength=strength), first)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("count", [1, 5, 11])
def test_with_any_strength_it_begins_at_a_timestep_of_its_own(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call = img2img()
    pipe.scheduler = scheduler = odd(pipe.scheduler, count)
    told: list[float] = []
    pipe.unet.register_forward_pre_hook(lambda _, args, named: told.append(float(args[1])), with_kwargs=True)
    noised: list[torch.Tensor] = []
    plain = scheduler.add_noise
    monkeypatch.setattr(scheduler, "add_noise", lambda *given: (noised.append(given[2]), plain(*given))[1])
    scheduler.set_timesteps(count)
    times = scheduler.timesteps.tolist()
    strengths = [n / 20 for n in range(1, 21)] + [scheduler.strength_at(float(t)) for t in range(0, 1000, 90)]
    for strength in [s for s in strengths if int(count * s) >= 1]:
        told.clear()
        noised.clear()
        run(pipe, call, count, strength=strength)
        assert told == times[count - int(count * strength) :] and noised[0].unique().tolist() == told[:1]
    for asked in range(0, 1000, 90):
        begins = times[count - int(count * scheduler.strength_at(asked))]
        assert abs(begins - asked) == min(abs(time - asked) for time in times)


@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting(channels: int) -> None:
    pipe, call = inpaint()
    if channels == 4:  # the known part is put back at every step
        pipe = _sd(StableDiffusionInpaintPipeline, unet())
    base = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.scheduler = base
    wanted = run(pipe, call, STEPS, strength=1.0)
    pipe.scheduler = neutral(base, STEPS)
    torch.testing.assert_close(run(pipe, call, STEPS, strength=1.0), wanted, rtol=1e-3, atol=1e-3)
    pipe.scheduler = odd(base, STEPS, channels=4)
    assert run(pipe, call, STEPS, strength=0.7).isfinite().all()


# ---------------------------------------------------------------------- with features
@pytest.mark.parametrize(
    "feature",
    [
        Reuse(plan="deepcache:2"),
        Reuse(plan="hold:2@1"),
        Reuse(plan="hold:2", guidance="interval:0.2-0.8"),
        EncoderReuse(schedule="uniform:2", batch_decoder=False),
        PatchParallel(),
    ],
    ids=str,
)
def test_features_act_on_top(feature: Any) -> None:
    pipe, call = sd()
    pipe.scheduler = odd(pipe.scheduler, STEPS, channels=4)
    plain = run(pipe, call, STEPS)
    accelerate(pipe, feature.neutral())
    assert torch.equal(run(pipe, call, STEPS), plain)
    accelerate(pipe, feature)
    found = run(pipe, call, STEPS)
    report = pipe.acceleration.report()
    assert found.isfinite().all() and report.steps == STEPS
    if isinstance(feature, Reuse):
        assert not torch.equal(found, plain) and torch.equal(run(pipe, call, STEPS), found)
    pipe.acceleration.remove()
    assert torch.equal(run(pipe, call, STEPS), plain)


def test_shallow_steps_on_top_are_at_the_steps_of_the_solver() -> None:
    pipe, call = sd()
    pipe.scheduler = odd(pipe.scheduler, 6)
    accelerate(pipe, Reuse(plan="deepcache:2"))
    run(pipe, call, 6)
    counters = pipe.acceleration.report().counters["reuse"]
    assert (counters["full_steps"], counters["shallow_steps"]) == (3, 3)


# ---------------------------------------------------------------------- folders
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder that was saved with a learned solver, and its image."""
    plain = write_folder(tmp_path_factory.mktemp("plain") / "m")
    pipe = load_pipeline(str(plain))
    pipe.scheduler = odd(pipe.scheduler, STEPS, 8, channels=4)
    target = tmp_path_factory.mktemp("learned") / "m"
    pipe.save_pretrained(target)
    torch.save(drawn(pipe), target.parent / "drawn.pt")
    return target


def drawn(pipe: Any, steps: int = STEPS) -> torch.Tensor:
    return run(pipe, {"prompt": "red apple", "height": 16, "width": 16, "output_type": "latent"}, steps)


def test_a_saved_folder_is_loaded_by_everything_and_draws_the_same(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusion_accel.schedulers", "LearnedMultistepScheduler"]
    wanted = torch.load(folder.parent / "drawn.pt")
    for load in (DiffusionPipeline.from_pretrained, load_pipeline, AcceleratedPipeline.from_pretrained):
        pipe: Any = load(str(folder))
        assert isinstance(pipe.scheduler, LearnedMultistepScheduler)
        assert torch.equal(drawn(pipe), wanted), load
    with pytest.raises(ConfigurationError, match="learnt for 5 and 8 evaluations; the nearest to 50 is 8"):
        drawn(pipe, 50)


def test_a_damaged_solver_in_a_folder_is_one_line(folder: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(str(folder))
    pipe.save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "scheduler" / "scheduler_config.json"
    values = json.loads(file.read_text())
    values["solvers"]["5"]["timesteps"][1] = 999.0
    file.write_text(json.dumps(values))
    with pytest.raises(ConfigurationError, match="the solver for 5 evaluations: timesteps must fall") as error:
        load_pipeline(str(tmp_path / "m"))
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------- what it was measured for
def test_calls_unlike_those_it_was_measured_for_are_said(caplog: pytest.LogCaptureFixture) -> None:
    pipe, call = sd()
    made_for = {**describe(pipe), "guidance_scale": [1.0, 6.0], "height_width": [[16, 16]], "strength": [0.3, 1]}
    pipe.scheduler = LearnedMultistepScheduler.like(pipe.scheduler, odd(pipe.scheduler, 4).config.solvers, made_for)
    assert unmeasured(pipe, {"guidance_scale": 5.0, "height": 16, "width": 16, "strength": 0.5}) is None
    assert unmeasured(pipe, {"guidance_scale": None, "height": None}) is None
    for arguments, says in (
        ({"guidance_scale": 9.0}, "guidance_scale 9 (from 1 to 6 it was)"),
        ({"height": 64, "width": 16}, "16x64 pixels"),
        ({"strength": 0.1, "guidance_scale": 0}, "guidance_scale 0 (from 1 to 6 it was), nor with strength 0.1"),
    ):
        assert says in str(unmeasured(pipe, arguments))
    accelerate(pipe, Reuse(plan="hold:2"))
    with caplog.at_level(logging.WARNING, "diffusion_accel"):
        run(pipe, call, 4)
        assert not caplog.records
        run(pipe, {**call, "guidance_scale": 9.0}, 4)
        assert [r.message for r in caplog.records] == [
            "the learned solver was not measured with guidance_scale 9 (from 1 to 6 it was)"
        ]
    pipe.unet.conv_in.weight.data += 1
    assert "these weights" in str(unmeasured(pipe, text()))
    other, _ = dit()
    other.scheduler = pipe.scheduler
    assert "a DiTTransformer2DModel (it was made for UNet2DConditionModel)" in str(unmeasured(other, {}))
    pipe.scheduler.register_to_config(made_for={"guidance_scale": "much", "height_width": [3], "weights": 5})
    assert unmeasured(pipe, {"guidance_scale": 5.0}) is None
    pipe.scheduler = odd(pipe.scheduler, 4)
    assert unmeasured(pipe, {"guidance_scale": 90.0}) is None


@pytest.mark.parametrize("distilled", [False, True])
def test_of_two_scales_the_one_that_guides_is_compared(distilled: bool) -> None:
    pipe, _ = flux()
    pipe.transformer.register_to_config(guidance_embeds=distilled)
    made_for = {**describe(pipe), "guidance_scale": [3.0, 3.0]}
    pipe.scheduler = LearnedMultistepScheduler.like(pipe.scheduler, odd(pipe.scheduler, 4).config.solvers, made_for)
    guides, other = ("guidance_scale", "true_cfg_scale") if distilled else ("true_cfg_scale", "guidance_scale")
    assert unmeasured(pipe, {guides: 3.0, other: 1.5}) is None
    assert f"{guides} 4 (from 3 to 3 it was)" in str(unmeasured(pipe, {guides: 4.0, other: 3.0}))


def test_transparency_takes_it() -> None:
    pipe: Any = load_pipeline("sticker")
    base = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    call = {"prompt": "red apple, 3d style", "height": 96, "width": 96, "guidance_scale": 3.0, "output_type": "np"}
    accelerate(pipe, LatentTransparency(views=1))
    pipe.scheduler = base
    wanted = run(pipe, call, 3)
    pipe.scheduler = neutral(base, 3, by=dpmpp_2m_coefficients)
    found = run(pipe, call, 3)
    assert found.shape[-1] == 4
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)
