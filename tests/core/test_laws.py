"""The laws that every feature obeys, for every registered feature, alone and in every permitted pair.

A feature joins by being registered; nothing here names one.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import re
import typing
from typing import Any

import numpy as np
import pytest
import torch
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from laws import APART, Stop, built, default, stop_at, traces
from zoo import ZOO, ddim, rand, run, sd, unet

from diffusion_accel import (
    AccelerationError,
    ConfigurationError,
    FeatureConflictError,
    UnsupportedPipelineError,
    accelerate,
)
from diffusion_accel.registry import all_features

FEATURES = all_features()
PAIRS = [
    (a, b)
    for a, b in itertools.combinations([f for f in FEATURES if f.name not in APART], 2)
    if a.name not in b.conflicts and b.name not in a.conflicts
]
SETS = [(f,) for f in FEATURES] + PAIRS
IDS = ["+".join(f.name for f in s) for s in SETS]
PAIRED = ("sd", "unet2d", "svd")  # kinds on which pairs are tried; others: test_pairs.py
STEPS = 4
each_set = pytest.mark.parametrize("features", SETS, ids=IDS)


def supported(features: tuple[Any, ...], pipe: Any) -> bool:
    return all(default(f).supports(pipe) is None for f in features)


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("kind", "features"),
    [
        pytest.param(k, s, id=f"{k}-{name}")
        for s, name in zip(SETS, IDS, strict=True)
        for k in ZOO
        if len(s) == 1 or k in PAIRED
    ],
)
def test_off_is_bit_identical_and_neutral_is_exact(kind: str, features: tuple[Any, ...]) -> None:
    pipe, call = ZOO[kind]()
    if not supported(features, pipe):
        with pytest.raises(UnsupportedPipelineError):
            accelerate(pipe, *map(default, features))
        return
    base_class, base = type(pipe), run(pipe, call, STEPS)
    accelerate(pipe, *(f.neutral() for f in features))
    assert isinstance(pipe, base_class)
    assert torch.equal(run(pipe, call, STEPS), base), "neutral setting"
    assert not traces(pipe), "hooks outlive the call"
    accelerate(pipe, *map(default, features))
    first = run(pipe, call, STEPS)
    assert torch.equal(run(pipe, call, STEPS), first), "second identical call"
    pipe.acceleration.disable()
    assert torch.equal(run(pipe, call, STEPS), base), "disabled"
    pipe.acceleration.enable()
    assert torch.equal(run(pipe, call, STEPS), first), "enabled again"
    pipe.acceleration.remove()
    assert type(pipe) is base_class and not hasattr(pipe, "acceleration")
    assert torch.equal(run(pipe, call, STEPS), base), "removed"
    assert not traces(pipe)


@pytest.mark.sampled(6)
@each_set
@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_an_exception_leaves_nothing_behind(features: tuple[Any, ...], error: type[BaseException]) -> None:
    pipe, call = built(features)
    accelerate(pipe, *map(default, features))
    first = run(pipe, call)
    with pytest.raises(error):
        run(pipe, call, callback_on_step_end=stop_at(3, error))
    assert not traces(pipe)
    assert torch.equal(run(pipe, call), first)


def fresh(features: tuple[Any, ...]) -> tuple[Any, dict[str, Any]]:
    pipe, call = built(features)
    return accelerate(pipe, *map(default, features)), call


CALLS = st.fixed_dictionaries(
    {
        "steps": st.integers(1, 7),
        "guidance_scale": st.sampled_from([1.0, 4.0]),
        "height": st.sampled_from([16, 24]),
        "num_images_per_prompt": st.sampled_from([1, 2]),
        "scheduler": st.sampled_from(["DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"]),
        "interrupt": st.booleans(),
        "enabled": st.booleans(),
    }
)


@pytest.mark.sampled(5)
@each_set
@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(calls=st.lists(CALLS, min_size=2, max_size=3))
def test_no_state_leaks_between_calls(features: tuple[Any, ...], calls: list[dict[str, Any]]) -> None:
    import diffusers

    def one(pipe: Any, call: dict[str, Any], step: dict[str, Any]) -> torch.Tensor:
        changes = dict(step)
        if "image" in call:  # of a ControlNet: as high as the picture
            changes["image"] = rand(1, 3, changes["height"], call["width"])
        pipe.scheduler = getattr(diffusers, changes.pop("scheduler")).from_config(ddim().config)
        pipe.acceleration.enable() if changes.pop("enabled") else pipe.acceleration.disable()
        if changes.pop("interrupt"):
            with pytest.raises(Stop):
                run(pipe, call, **changes, callback_on_step_end=stop_at(0, Stop))
        return run(pipe, call, **changes)

    pipe, call = fresh(features)
    for step in calls:
        reference, reference_call = fresh(features)
        assert torch.equal(one(pipe, call, step), one(reference, reference_call, {**step, "interrupt": False}))


@pytest.mark.sampled(5)
@each_set
def test_copies_are_independent(features: tuple[Any, ...]) -> None:
    pipe, call = fresh(features)
    first = run(pipe, call)
    for clone in (copy.copy(pipe), copy.deepcopy(pipe)):
        assert torch.equal(run(clone, call), first)
        clone.acceleration.disable()
        assert pipe.acceleration.enabled(features[0].name), "switching a copy must not switch the original"
        assert torch.equal(run(pipe, call), first)


@pytest.mark.sampled(5)
@each_set
def test_saving_and_loading_is_plain_diffusers(features: tuple[Any, ...], tmp_path: Any) -> None:
    from diffusers import UNet2DConditionModel, UNet2DModel
    from zoo import unet2d

    pipe, call = unet2d()
    base = run(pipe, call)
    wanted = [default(f) if default(f).supports(pipe) is None else f.neutral() for f in features]
    accelerate(pipe, *(f for f in wanted if f.supports(pipe) is None))
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe)._accelerated_base.from_pretrained(tmp_path)
    assert type(loaded).__qualname__ == "DDPMPipeline"
    assert isinstance(loaded.unet, UNet2DModel)
    assert torch.equal(run(loaded, call), base)
    sd_pipe, sd_call = fresh(features)
    first = run(sd_pipe, sd_call)
    sd_pipe.unet.save_pretrained(tmp_path / "unet")
    sd_pipe.unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert torch.equal(run(sd_pipe, sd_call), first)


@pytest.mark.sampled(4)
@each_set
def test_other_pipelines_can_be_made_from_an_accelerated_one(features: tuple[Any, ...]) -> None:
    from diffusers import (
        AutoPipelineForImage2Image,
        StableDiffusionControlNetImg2ImgPipeline,
        StableDiffusionImg2ImgPipeline,
    )

    pipe, call = fresh(features)
    other = AutoPipelineForImage2Image.from_pipe(pipe)
    controlled = {"control_image": call["image"]} if "image" in call else {}
    kind = StableDiffusionControlNetImg2ImgPipeline if controlled else StableDiffusionImg2ImgPipeline
    assert type(other) is kind
    call = {**call, **controlled}
    image = (rand(1, 3, 16, 16).clamp(-1, 1) + 1) / 2
    plain = kind(**{**other.components}, requires_safety_checker=False)
    assert torch.equal(run(other, call, image=image), run(plain, call, image=image))


@pytest.mark.sampled(5)
@each_set
def test_lora_weights_load_act_and_unload(features: tuple[Any, ...], tmp_path: Any) -> None:
    from peft import LoraConfig
    from safetensors.torch import save_file

    donor = unet()
    donor.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    from peft import get_peft_model_state_dict

    weights = {f"unet.{k}": v.contiguous() for k, v in get_peft_model_state_dict(donor).items()}
    save_file(weights, tmp_path / "lora.safetensors")
    neutral = [f.neutral() for f in features]
    plain, call = built(features)
    base = run(plain, call)
    plain.load_lora_weights(str(tmp_path / "lora.safetensors"))
    with_lora = run(plain, call)
    assert not torch.equal(base, with_lora)
    pipe, _ = built(features)
    accelerate(pipe, *neutral)
    pipe.load_lora_weights(str(tmp_path / "lora.safetensors"))
    assert torch.equal(run(pipe, call), with_lora)
    pipe.unload_lora_weights()
    assert torch.equal(run(pipe, call), base)


@pytest.mark.sampled(6)
@each_set
@pytest.mark.parametrize("order", ["offload-first", "accelerate-first"])
def test_cpu_offload_keeps_working(features: tuple[Any, ...], order: str) -> None:
    """accelerate's hooks re-install themselves at the end of each call; both orders must survive several calls."""
    import accelerate as hf_accelerate

    neutral = [f.neutral() for f in features]
    pipe, call = built(features)
    base = run(pipe, call)

    def offload() -> None:
        for model in (pipe.vae, pipe.unet):
            hf_accelerate.cpu_offload(model, execution_device="cpu")

    class Hooks:
        def offload(self) -> None: ...

        def remove(self) -> None: ...

    def reinstall(device: Any = None) -> None:  # what enable_model_cpu_offload does where there is an accelerator
        pipe.remove_all_hooks()
        offload()
        pipe._all_hooks = [Hooks()]

    pipe.enable_model_cpu_offload = reinstall
    if order == "offload-first":
        reinstall()
        accelerate(pipe, *neutral)
    else:
        accelerate(pipe, *neutral)
        reinstall()
    for _ in range(2):
        assert torch.equal(run(pipe, call), base)
    pipe.acceleration.remove()
    assert torch.equal(run(pipe, call), base)
    pipe.remove_all_hooks()
    for module in pipe.unet.modules():  # accelerate itself leaves the bound method behind as an attribute
        assert module.forward.__func__ is type(module).forward
    assert torch.equal(run(pipe, call), base)


@pytest.mark.sampled(5)
@each_set
def test_attention_slicing_and_dtype_changes_keep_working(features: tuple[Any, ...]) -> None:
    neutral = [f.neutral() for f in features]
    plain, call = built(features)
    plain.enable_attention_slicing(1)
    sliced = run(plain, call)
    plain.disable_attention_slicing()
    plain.to(torch.float64)
    double = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    wide = run(plain, double)
    pipe, _ = built(features)
    accelerate(pipe, *neutral)
    pipe.enable_attention_slicing(1)
    assert torch.equal(run(pipe, call), sliced)
    pipe.disable_attention_slicing()
    pipe.to(torch.float64)
    assert torch.equal(run(pipe, double), wide)


@each_set
def test_a_refusal_changes_nothing(features: tuple[Any, ...]) -> None:
    from diffusers import DDIMPipeline, DiTPipeline, DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=4, num_layers=1, sample_size=4
    )
    pipe = DiTPipeline(transformer=model, vae=sd()[0].vae, scheduler=ddim())
    refused = [feature.name for feature in features if default(feature).supports(pipe) is not None]
    for feature in features:
        if feature.name in refused:
            with pytest.raises(UnsupportedPipelineError, match="|".join(refused)):
                accelerate(pipe, *map(default, features))
            with pytest.raises(UnsupportedPipelineError, match=feature.name):
                accelerate(pipe, default(feature))
            assert type(pipe) is DiTPipeline and not hasattr(pipe, "acceleration") and not traces(pipe)
    with pytest.raises(AccelerationError, match="loaded diffusers pipeline"):
        accelerate(DDIMPipeline, *features)


@pytest.mark.parametrize("feature", FEATURES, ids=lambda f: f.name)
def test_configuration_survives_json_and_text(feature: Any) -> None:
    import dataclasses
    import json

    plain = feature()
    assert feature.from_dict(json.loads(json.dumps(plain.to_dict()))) == plain
    assert feature.parse("") == plain
    with pytest.raises(AccelerationError, match="unknown key"):
        feature.parse("nonsense=1")
    with pytest.raises(AccelerationError, match="settings must be a table"):
        feature.from_dict([1])
    with pytest.raises(AccelerationError, match="takes settings by name"):
        feature("nonsense")
    with pytest.raises(AccelerationError, match="allowed" if feature.shorthand else "key=value"):
        feature.parse("nonsense")
    with pytest.raises(dataclasses.FrozenInstanceError):
        plain.name = "other"
    for field in dataclasses.fields(feature):
        assert field.metadata["doc"], f"{field.name} has no documentation"
        assert field.default is not dataclasses.MISSING
    assert feature.summary and feature.paper


@pytest.mark.parametrize("pair", list(itertools.combinations(FEATURES, 2)), ids=lambda p: f"{p[0].name}-{p[1].name}")
def test_conflicts_are_symmetric_and_known(pair: tuple[Any, Any]) -> None:
    a, b = pair
    assert (a.name in b.conflicts) == (b.name in a.conflicts)
    if a.name in b.conflicts:
        assert a.conflicts[b.name] == b.conflicts[a.name]
        with pytest.raises(FeatureConflictError, match=f"{b.name}: {re.escape(a.conflicts[b.name])}; remove one"):
            accelerate(zoo.controlnet()[0], a(), b())


# ---------------------------------------------------------------------- settings
FIELDS = [pytest.param(f, field, id=f"{f.name}.{field.name}") for f in FEATURES for field in dataclasses.fields(f)]
ODD: dict[str, Any] = {
    "none": None, "a text": "0.3", "bytes": b"1", "a list": [1, "x"], "deep": [[1]], "a dict": {}, "true": True,
    "an object": object(),
    "nan": math.nan, "inf": math.inf, "-inf": -math.inf, "1e999": float("1e999"), "huge": 10**400, "endless": 10**6000,
    "-1": -1, "0": 0, "0.5": 0.5, "of numpy": np.float32(np.inf),
}  # fmt: skip


@pytest.mark.parametrize(("feature", "field"), FIELDS)
def test_no_setting_takes_what_it_cannot_mean(feature: Any, field: Any) -> None:
    """A value of another type, or a number beyond its limits, is refused by the constructor in one line."""
    hint = typing.get_type_hints(feature)[field.name]
    kinds = {typing.get_origin(k) or k for k in (typing.get_args(hint) or (hint,))}
    if kinds & {int, float, tuple} - {bool}:
        low, high = field.metadata["within"]
        assert math.isfinite(low) and math.isfinite(high)
        for number in (low - 1, high + 1):
            whole = int(number)
            with pytest.raises(ConfigurationError, match=field.name):
                feature(**{field.name: (whole,) if tuple in kinds else whole})
    for value in ODD.values():
        try:
            made = getattr(feature(**{field.name: value}), field.name)
        except ConfigurationError as error:
            assert "\n" not in str(error) and len(str(error)) < 1000
        else:
            kept = tuple if isinstance(made, tuple) else type(made)
            assert kept in kinds or (made is None and type(None) in kinds)
            assert not isinstance(made, float) or math.isfinite(made)
            assert not isinstance(value, bool) or made is value
