"""Files of tuned plans: what survives, what is refused, where they do not hold."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zoo import ZOO, run, sd

from diffusion_accel import AccelerationError, ConfigurationError, Reuse, accelerate
from diffusion_accel.denoisers import fingerprint
from diffusion_accel.model_files.names import EMBEDDED
from diffusion_accel.reuse.conditions import conditions
from diffusion_accel.reuse.plan import Plan
from diffusion_accel.reuse.plan_family import load_shipped
from diffusion_accel.reuse.plan_file import TunedPlan

TINY = sd()[0]


def tuned(pipe: Any, tokens: str) -> TunedPlan:
    plan = Plan.parse(tokens)
    return TunedPlan(plan, conditions(pipe, len(plan)))


def test_a_plan_file_survives_and_says_where_it_does_not_hold(tmp_path: Path, caplog: Any) -> None:
    pipe, _ = sd()
    file = tmp_path / "plan.json"
    made = tuned(pipe, "full hold full hold@1")
    made.save(file)
    assert TunedPlan.load(str(file)) == made
    with pytest.raises(ConfigurationError, match="exists"):
        made.save(file)
    assert list(tmp_path.iterdir()) == [file]
    accelerate(pipe, Reuse(plan=str(file)))
    with caplog.at_level(logging.WARNING, "diffusion_accel"):
        made.check(pipe)
        assert not caplog.records
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        made.check(pipe)
        assert "another scheduler" in caplog.text
        caplog.clear()
        next(iter(pipe.unet.parameters())).data.mul_(2)
        made.check(pipe)
        assert "other weights" in caplog.text
    with pytest.raises(AccelerationError, match="tuned for UNet2DConditionModel, this pipeline has UNet2DModel"):
        accelerate(ZOO["unet2d"]()[0], Reuse(plan=str(file)))


def test_the_fingerprint_follows_the_weights_not_the_dtype() -> None:
    pipe, _ = sd()
    first = fingerprint(pipe.unet)
    assert fingerprint(pipe.unet.to(torch.bfloat16)) == first
    pipe.unet.conv_out.weight.data[0, 0, 0, 0] += 1
    assert fingerprint(pipe.unet) != first


def test_the_fingerprint_of_what_is_laid_out_or_placed_otherwise() -> None:
    """The layout in memory does not count, several dtypes are read as one, and what is elsewhere has none."""
    unet = sd()[0].unet
    first = fingerprint(unet)
    assert fingerprint(unet.to(memory_format=torch.channels_last)) == first
    unet.mid_block.to(torch.bfloat16)
    assert fingerprint(unet) == first
    unet.mid_block.to("meta")
    assert fingerprint(unet) is None


def test_the_fingerprint_is_as_it_was_once_a_lora_is_deleted() -> None:
    from peft import LoraConfig

    unet = sd()[0].unet
    first = fingerprint(unet)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False), "some")
    assert fingerprint(unet) != first
    unet.delete_adapters("some")
    assert any(".base_layer." in name for name, _ in unet.named_parameters())
    assert fingerprint(unet) == first
    unet.conv_in.weight.data[0, 0, 0, 0] += 1
    assert fingerprint(unet) != first


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a reuse plan"),
        ('{"format": "diffusion-accel reuse plan", "version": 99}', "version 99"),
        ('{"format": "diffusion-accel reuse plan", "version": 1, "plan": "full"}', "list of steps"),
        ('{"format": "diffusion-accel reuse plan", "version": 1, "plan": ["hold"], "conditions": {}}', "first step"),
        (
            '{"format": "diffusion-accel reuse plan", "version": 1, "plan": ["full"], "conditions": {}, "name": "A"}',
            "small",
        ),
    ],
)
def test_broken_plan_files_are_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=words):
        accelerate(sd()[0], Reuse(plan=str(file)))


WHOLE = {
    "format": "diffusion-accel reuse plan",
    "version": 1,
    "plan": ["full", "hold=0.9", "full", "hold@1"],
    "conditions": {
        "denoiser": "UNet2DConditionModel",
        "weights": "x",
        "scheduler": "y",
        "scheduler_config": {},
        "steps": 4,
    },
    "measured": {"psnr_median": 50.0},
    "search": {},
}


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just("hold=" + "9" * 400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(key=st.sampled_from([*WHOLE, *WHOLE["conditions"]]), value=VALUES, cut=st.none() | st.integers(0, 300))
def test_no_content_of_a_plan_file_raises_anything_else(tmp_path_factory: Any, key: str, value: Any, cut: Any) -> None:
    changed = {**WHOLE, key: value} if key in WHOLE else {**WHOLE, "conditions": {**WHOLE["conditions"], key: value}}
    file = tmp_path_factory.getbasetemp() / "mutant.json"
    file.write_text(json.dumps(changed)[:cut])
    with contextlib.suppress(AccelerationError):
        feature = Reuse(plan=str(file))
        if feature.supports(TINY) is None:
            feature.source.check(TINY)


def test_deep_and_huge_plan_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    for text in ("[" * 10**5, json.dumps({**WHOLE, "measured": {"x": 1}}).replace("1}", "9" * 5000 + "}"), "\0", "NaN"):
        file.write_text(text)
        with pytest.raises(ConfigurationError) as refused:
            Reuse(plan=str(file))
        said = str(refused.value).replace(str(file), "plan.json")  # however long the name of the folder is
        assert "\n" not in said and len(said) < 450


def test_weights_that_were_changed_in_place_are_noticed(tmp_path: Path, caplog: Any) -> None:
    """Fusing a LoRA changes the parameters' values and nothing else."""
    from peft import LoraConfig

    pipe, call = sd()
    file = tmp_path / "plan.json"
    tuned(pipe, "full hold full hold").save(file)
    accelerate(pipe, Reuse(plan=str(file)))
    run(pipe, call, steps=4)
    assert "other weights" not in caplog.text
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    pipe.unet.fuse_lora()
    pipe.unet.unload_lora()
    caplog.clear()
    run(pipe, call, steps=4)
    assert "other weights" in caplog.text and "make one with diffusion-accel tune" in caplog.text


@pytest.fixture(scope="module")
def sticker() -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(EMBEDDED["sticker"].path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_warning_names_the_plans_that_fit(sticker: Any, caplog: Any) -> None:
    sticker.scheduler = DDIMScheduler.from_config(sticker.scheduler.config)
    TunedPlan.load("tuned:balanced").check(sticker)
    assert "another scheduler ('DPMSolverMultistepScheduler', here 'DDIMScheduler')" in caplog.text
    assert "plans for what is here: tuned:ddim (1, quality, 3, balanced, fast, 6)" in caplog.text
    caplog.clear()
    TunedPlan.load("tuned:ddim-balanced").check(sticker)
    assert not caplog.text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"guidance_scale": 3.0, "eta": 0.0}, None),
        ({"guidance_scale": 4.5}, None),
        ({"guidance_scale": 7.0, "true_cfg_scale": 3.0}, None),
        ({"guidance_scale": 1.0, "eta": 0}, None),
        ({"guidance_scale": 5}, "guidance_scale 3 (here 5)"),
        ({"guidance_scale": 3.0, "eta": 0.5}, "eta 0.0 (here 0.5)"),
        ({"true_cfg_scale": 5.0}, "true_cfg_scale 3 (here 5)"),
    ],
)
def test_the_warning_says_which_argument_of_a_call_was_not_measured(
    sticker: Any, caplog: Any, arguments: dict[str, float], said: str | None
) -> None:
    sticker.scheduler = DDIMScheduler.from_config(sticker.scheduler.config)
    for plan in (TunedPlan.load("tuned:ddim-balanced"), load_shipped()["ddim"]):
        caplog.clear()
        plan.check(sticker, arguments)
        assert (said in caplog.text) if said else not caplog.text


def test_guidance_that_is_distilled_is_compared_by_its_own_argument(
    sticker: Any, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sticker.scheduler = DDIMScheduler.from_config(sticker.scheduler.config)
    monkeypatch.setattr(sticker.unet, "_internal_dict", {**sticker.unet.config, "guidance_embeds": True})
    TunedPlan.load("tuned:ddim-balanced").check(sticker, {"guidance_scale": 7.0, "true_cfg_scale": 1.0})
    assert "guidance_scale 3 (here 7)" in caplog.text


def test_a_call_is_warned(sticker: Any, caplog: Any) -> None:
    sticker.scheduler = DDIMScheduler.from_config(sticker.scheduler.config)
    accelerate(sticker, Reuse(plan="tuned:ddim-balanced"))
    try:
        sticker("red apple", num_inference_steps=50, guidance_scale=3.0, eta=0.3, output_type="latent")
    finally:
        sticker.acceleration.remove()
    assert "eta 0.0 (here 0.3)" in caplog.text
