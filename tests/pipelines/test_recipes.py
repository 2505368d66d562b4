"""Saved and loaded again, an accelerated pipeline draws the same bits; what is given wins over its recipe."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionControlNetPipeline
from laws import default
from model_folder import draw, edit_json, edit_tensors
from solvers import odd
from transparency_weights import write_weights
from zoo import controlnet_model, dit, rand

from diffusion_accel import (
    AcceleratedPipeline,
    ConfigurationError,
    ControlNetParallel,
    LatentTransparency,
    OutputError,
    PlanFamily,
    Reuse,
    TunedPlan,
    UnsupportedPipelineError,
    accelerate,
    pipelines,
    quantize_files,
)
from diffusion_accel.quant.model import RUNTIMES, runtime_report, set_runtime
from diffusion_accel.recipes.recipe import FILE, read_recipe
from diffusion_accel.registry import all_features
from diffusion_accel.reuse.conditions import conditions
from diffusion_accel.reuse.plan import Plan

STEPS = 5


def load(folder: Any, **options: Any) -> Any:
    pipe: Any = AcceleratedPipeline.from_pretrained(str(folder), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def said(caplog: Any, doing: Any) -> tuple[Any, list[str]]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="diffusion_accel"):
        made = doing()
    return made, [r.getMessage() for r in caplog.records if r.name.startswith("diffusion_accel")]


def whole_for(feature: Any, folder: Path) -> tuple[Any, Any]:
    """A pipeline that can be saved and loaded, which a feature is for, and what draws with it."""
    pipe = load(folder)
    if default(feature).supports(pipe) is None:
        return pipe, lambda pipe: draw(pipe, num_inference_steps=STEPS)
    made = StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=controlnet_model(), requires_safety_checker=False
    )
    image = rand(1, 3, 16, 16).sigmoid()
    return made, lambda pipe: draw(pipe, num_inference_steps=STEPS, image=image)


def tuned(pipe: Any, *plans: str) -> PlanFamily:
    made = []
    for number, text in enumerate(plans):
        numbers = {"time_ratio": 2.0 + number, "psnr_median": 50.0 - number, "psnr_worst_decile": 45.0 - number}
        made.append(TunedPlan(Plan.parse(text), conditions(pipe, STEPS), numbers))
    return PlanFamily.of(made, [f"p{number}" for number in range(len(made))])


PLANS = ("full hold full full full", "full hold full hold full", "full hold hold:sample=0.9;0.01 full hold")


# ---------------------------------------------------------------------- the same bits again
@pytest.mark.sampled(3)
@pytest.mark.parametrize("feature", all_features(), ids=lambda f: f.name)
def test_every_feature_comes_back(feature: Any, whole: Path, tmp_path: Path, caplog: Any) -> None:
    pipe, drawn = whole_for(feature, whole)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    plain = drawn(pipe)
    accelerate(pipe, default(feature))
    wanted = drawn(pipe)
    _, told = said(caplog, lambda: pipe.save_pretrained(tmp_path / "whole"))
    assert not told
    loaded, told = said(caplog, lambda: load(tmp_path / "whole"))
    assert not [text for text in told if "recipe" in text]
    assert [*loaded.acceleration.features] == [feature.name]
    assert torch.equal(drawn(loaded), wanted)
    moved = shutil.move(tmp_path / "whole", tmp_path / "moved")
    again = load(moved)
    assert torch.equal(drawn(again), wanted), "nothing depends on where it was"
    other: Any = DiffusionPipeline.from_pretrained(moved)
    assert not hasattr(other, "acceleration") and torch.equal(drawn(other), plain), "plain diffusers reads it as ever"
    off = load(moved, **{feature.name: False})
    assert not off.acceleration.features and torch.equal(drawn(off), plain)
    assert not load(moved, recipe=False).acceleration.features
    again.save_pretrained(tmp_path / "second")
    alone = again.acceleration.save(tmp_path / "recipe.json")
    shutil.rmtree(moved)
    assert torch.equal(drawn(load(tmp_path / "second", recipe=alone)), wanted)
    assert torch.equal(drawn(load(tmp_path / "second")), wanted)


def test_plans_come_back_with_what_is_known_of_them(whole: Path, tmp_path: Path, caplog: Any) -> None:
    pipe = load(whole)
    family = tuned(pipe, *PLANS)
    family.save(tmp_path / "family.json")
    file = str(tmp_path / "family.json")
    one = TunedPlan(Plan.parse(PLANS[2]), conditions(pipe, STEPS))
    for number, (feature, kind) in enumerate(
        (
            (Reuse(plan=file, speedup=3), "diffusion-accel plan family"),
            (Reuse(plan=f"{file}:p0"), "diffusion-accel reuse plan"),
            (Reuse(plan=family, min_psnr=49), "diffusion-accel reuse plan"),
            (Reuse(plan=one, guidance="reuse:2"), "diffusion-accel reuse plan"),
            (Reuse(plan="tuned:ddim", speedup=5, stretch=True), "diffusion-accel plan family"),
        )
    ):
        accelerate(pipe, feature)
        wanted = draw(pipe, num_inference_steps=STEPS)
        _, told = said(caplog, lambda n=number: pipe.save_pretrained(tmp_path / str(n)))
        assert not told
        loaded = load(tmp_path / str(number))
        assert torch.equal(draw(loaded, num_inference_steps=STEPS), wanted)
        here, there = feature.source, loaded.acceleration.features["reuse"].source
        assert there == here or there.conditions == here.conditions, "what it is valid for is not lost"
        kept = json.loads((tmp_path / str(number) / "acceleration.files" / "reuse-plan.json").read_text())
        assert kept["format"] == kind
    again = load(tmp_path / "0", reuse=Reuse(plan=str(tmp_path / "0/acceleration.files/reuse-plan.json"), speedup=2))
    assert str(again.acceleration.features["reuse"].source.plan) == str(family.members[0].plan)


def test_a_recipe_that_the_model_was_saved_without_is_not_its_own(whole: Path, tmp_path: Path, caplog: Any) -> None:
    pipe, folder = load(whole, reuse="hold:2"), tmp_path / "m"
    pipe.save_pretrained(folder)
    assert "recipe" not in pipe.config.get("_diffusion_accel", {}), "only what is saved says so"
    assert [*load(folder).acceleration.features] == ["reuse"]
    pipe.acceleration.remove()
    pipe.save_pretrained(folder)  # diffusers' own, which leaves the file
    loaded, told = said(caplog, lambda: load(folder))
    assert not loaded.acceleration.features and len(told) == 1 and "left from an earlier save" in told[0]
    with pytest.raises(ConfigurationError, match="left from an earlier save: .* name the file to use it all the same"):
        load(folder, recipe=True)
    assert [*load(folder, recipe=folder / FILE).acceleration.features] == ["reuse"]
    accelerate(pipe, Reuse(plan="hold:3")).save_pretrained(folder)
    assert load(folder).acceleration.features["reuse"].plan == "hold:3"
    accelerate(loaded).save_pretrained(folder)
    assert not (folder / FILE).exists()
    pipe.acceleration.save(folder)  # into the folder of a model that was there: nothing was saved since
    assert [*load(folder).acceleration.features] == ["reuse"]


def test_a_file_of_that_name_that_is_none_of_ours_stays(whole: Path, tmp_path: Path) -> None:
    pipe, folder = load(whole), tmp_path / "m"
    folder.mkdir()
    for text in ('{"of": "somebody"}', "[]", "{{"):
        (folder / FILE).write_text(text)
        pipe.save_pretrained(folder)
        with pytest.raises(OutputError, match="exists, and is no recipe; move it"):
            accelerate(load(whole), Reuse(plan="hold:2")).save_pretrained(folder)
        assert (folder / FILE).read_text() == text


def test_what_is_switched_off_stays_so(whole: Path, tmp_path: Path) -> None:
    pipe = load(whole, reuse="hold:3")
    plain = draw(load(whole), num_inference_steps=STEPS)
    pipe.acceleration.disable("reuse")
    pipe.save_pretrained(tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert not loaded.acceleration.enabled("reuse") and torch.equal(draw(loaded, num_inference_steps=STEPS), plain)
    loaded.acceleration.enable()
    assert loaded.acceleration.features == pipe.acceleration.features
    assert load(tmp_path / "m", reuse=True).acceleration.enabled("reuse"), "given, so on"
    loaded.acceleration.remove("reuse")
    loaded.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m" / FILE).exists(), "without features a folder has no recipe"


def test_a_learned_solver_comes_back(whole: Path, tmp_path: Path) -> None:
    pipe = load(whole, reuse="hold:2")
    pipe.scheduler = odd(pipe.scheduler, 4, channels=4)
    wanted = draw(pipe, num_inference_steps=4)
    pipe.save_pretrained(tmp_path / "m")
    pipe.acceleration.save(tmp_path / "r")
    assert read_recipe(tmp_path / "r").evaluations == [4]
    for made in (load(tmp_path / "m"), load(whole, recipe=tmp_path / "r")):
        assert made.scheduler.evaluations == [4] and torch.equal(draw(made, num_inference_steps=4), wanted)
    made = load(tmp_path / "m", scheduler="ddim")
    assert type(made.scheduler) is DDIMScheduler and made.acceleration.features


@pytest.mark.sampled(3)
@pytest.mark.parametrize("runtime", [name for name in RUNTIMES if name != "auto"])
def test_every_runtime_comes_back(whole: Path, tmp_path: Path, runtime: Any) -> None:
    quantize_files(whole, tmp_path / "w8", group=0)
    pipe = load(tmp_path / "w8", reuse="hold:3")
    set_runtime(pipe, runtime)
    pipe.acceleration.save(tmp_path / "r")
    assert read_recipe(tmp_path / "r").runtime == runtime
    assert runtime_report(load(whole, recipe=tmp_path / "r")) == runtime_report(pipe)


def test_a_quantized_denoiser_comes_back(whole: Path, tmp_path: Path, caplog: Any) -> None:
    quantize_files(whole, tmp_path / "w4", weight_bits=4, group=0)
    pipe = load(tmp_path / "w4", reuse="hold:3")
    set_runtime(pipe, "simulated", low_memory=True)
    wanted = draw(pipe, num_inference_steps=STEPS)
    pipe.save_pretrained(tmp_path / "m")
    pipe.acceleration.save(tmp_path / "r")
    for place, recipe in ((tmp_path / "m", None), (whole, tmp_path / "r"), (whole, tmp_path / "m")):
        made, told = said(caplog, lambda p=place, r=recipe: load(p, recipe=r))
        assert not told, told
        assert torch.equal(draw(made, num_inference_steps=STEPS), wanted)
        assert runtime_report(made) == runtime_report(pipe)
        assert not any(getattr(m, "keep_floats", False) for m in made.unet.modules())
    full = load(whole, recipe=tmp_path / "r", quantize=None)
    assert not getattr(full.unet, "is_quantized", False) and full.acceleration.features


def test_weights_beside_the_model_come_along(whole: Path, tmp_path: Path) -> None:
    beside = Path(shutil.copytree(whole, tmp_path / "m"))
    write_weights(beside / "transparency", load(whole).unet)
    pipe = load(beside, transparent=True)
    wanted = draw(pipe, output_type="np")
    pipe.save_pretrained(tmp_path / "n")
    shutil.rmtree(beside)
    loaded = load(tmp_path / "n")
    assert (draw(loaded, output_type="np") == wanted).all() and wanted.shape[-1] == 4
    assert LatentTransparency(weights="sticker").portable(pipe) == {}, "an embedded model's are called by its name"


# ---------------------------------------------------------------------- what wins
def test_what_is_given_wins(whole: Path, tmp_path: Path, caplog: Any) -> None:
    pipe = load(whole, reuse="hold:3", compiled="eager")
    pipe.save_pretrained(tmp_path / "m")
    both = pipe.acceleration.features
    made, told = said(caplog, lambda: load(tmp_path / "m", reuse="hold:2"))
    assert made.acceleration.features == {**both, "reuse": Reuse(plan="hold:2")} and not told
    assert load(tmp_path / "m", reuse=None).acceleration.features == both, "None: not given"
    made, told = said(caplog, lambda: load(tmp_path / "m", encoder_reuse=True))
    assert {*made.acceleration.features} == {"compiled", "encoder_reuse"} and len(told) == 1
    assert "reuse of the recipe" in told[0] and "cannot be combined with encoder_reuse, which was given" in told[0]
    assert load(whole, recipe=str(tmp_path / "m" / FILE)).acceleration.features == both
    assert load(tmp_path / "m", recipe=True).acceleration.features == both
    with pytest.raises(ConfigurationError, match=r"recipe: whole has no acceleration\.json"):
        load(whole, recipe=True)
    with pytest.raises(ConfigurationError, match="recipe must be a file, a folder, True or False, got 3"):
        load(whole, recipe=3)


# ---------------------------------------------------------------------- another model
def test_another_model_is_refused_or_said(whole: Path, tmp_path: Path, caplog: Any) -> None:
    pipe = load(whole, reuse="hold:3")
    pipe.acceleration.save(tmp_path / "r")
    other = Path(shutil.copytree(whole, tmp_path / "m"))
    edit_tensors(other / "vae/diffusion_pytorch_model.safetensors", lambda t: [v.mul_(1.5) for v in t.values()])
    made, told = said(caplog, lambda: load(other, recipe=tmp_path / "r"))
    assert made.acceleration.features and len(told) == 1 and "other weights of vae:" in told[0]
    edit_json(tmp_path / "r" / FILE, models={"transformer": {"class": "DiTTransformer2DModel"}})
    with pytest.raises(UnsupportedPipelineError, match=r"recipe.* was made for .*, this pipeline has UNet2DCondition"):
        load(whole, recipe=tmp_path / "r")
    net, _ = dit()
    accelerate(net, Reuse(plan="hold:2")).acceleration.save(tmp_path / "t")
    with pytest.raises(UnsupportedPipelineError, match="this pipeline has UNet2DConditionModel"):
        load(whole, recipe=tmp_path / "t")


def test_a_scheduler_that_does_not_fit_is_refused(whole: Path, tmp_path: Path) -> None:
    pipe = load(whole, reuse="hold:3")
    file = pipe.acceleration.save(tmp_path / "r")
    values = json.loads(file.read_text())["scheduler"]
    for changes, says in (
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "does not fit this model's DDIMScheduler"),
        ({"_class_name": "UNet2DModel"}, "does not fit"),
        ({"_class_name": "SchedulerMixin"}, "does not fit"),
        ({"prediction_type": "v_prediction"}, "does not fit"),
        ({"beta_schedule": "none of them"}, "cannot be used"),
    ):
        edit_json(file, scheduler={**values, **changes})
        with pytest.raises(ConfigurationError, match=says):
            load(whole, recipe=file)
        assert type(load(whole, recipe=file, scheduler="euler").scheduler).__name__ == "EulerDiscreteScheduler"


# ---------------------------------------------------------------------- conversions
def test_conversions_take_features_along(whole: Path, caplog: Any) -> None:
    pipe = load(whole, reuse="hold:3", compiled="eager")
    pipe.acceleration.disable("compiled")
    drop_in = pipelines.AcceleratedStableDiffusionImg2ImgPipeline
    for convert in (
        lambda: AcceleratedPipeline.from_pipe(pipe, task="image-to-image"),
        lambda: drop_in.from_pipe(pipe),
        lambda: type(pipe).from_pipe(pipe),
    ):
        made, told = said(caplog, convert)
        assert not told and made is not pipe and made.unet is pipe.unet
        assert made.acceleration.features == pipe.acceleration.features
        assert made.acceleration.enabled("reuse") and not made.acceleration.enabled("compiled")
    assert torch.equal(draw(made), draw(pipe))
    made, told = said(
        caplog, lambda: AcceleratedPipeline.from_pipe(pipe, task="inpainting", reuse="hold:2", compiled=False)
    )
    assert made.acceleration.features == {"reuse": Reuse(plan="hold:2")} and not told
    made, told = said(caplog, lambda: AcceleratedPipeline.from_pipe(pipe, task="inpainting", encoder_reuse=True))
    assert {*made.acceleration.features} == {"encoder_reuse", "compiled"}
    assert len(told) == 1 and "reuse of StableDiffusionPipeline is left out" in told[0]
    for wrong in ({"task": "video"}, {"task": "inpainting", "reuze": True}):
        with pytest.raises(ConfigurationError, match=r"allowed: text-to-image|did you mean reuse"):
            AcceleratedPipeline.from_pipe(pipe, **wrong)
    with pytest.raises(ConfigurationError, match="task 'inpainting': allowed: none for a named drop-in"):
        drop_in.from_pipe(AcceleratedPipeline.from_pipe(pipe), task="inpainting")


def test_what_does_not_come_along_is_said_once_with_why(whole: Path, caplog: Any) -> None:
    pipe, _ = whole_for(ControlNetParallel, whole)
    accelerate(pipe, ControlNetParallel(), Reuse(plan="hold:2"))
    made, told = said(caplog, lambda: pipelines.AcceleratedStableDiffusionPipeline.from_pipe(pipe))
    assert [*made.acceleration.features] == ["reuse"]
    reason = ControlNetParallel().supports(made)
    assert told == [f"not carried over to StableDiffusionPipeline: controlnet_parallel ({reason})"]
