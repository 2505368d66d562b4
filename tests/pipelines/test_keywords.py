"""Keywords of loading: a mistyped one is refused with the nearest that there is, what is diffusers' own passes."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

import diffusion_accel
from diffusion_accel import (
    AcceleratedPipeline,
    ConfigurationError,
)
from diffusion_accel.model_files.names import EMBEDDED
from diffusion_accel.pipelines import keywords
from diffusion_accel.pipelines.accelerated import make_feature
from diffusion_accel.pipelines.loading import load_pipeline

STICKER = EMBEDDED["sticker"].path


@pytest.fixture(scope="module")
def sticker() -> Any:
    pipe = load_pipeline("sticker")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"encoder_reuse": True}, "without encoder_reuse: use AcceleratedPipeline.from_pretrained"),
        ({"dtype": "float16"}, "dtype must be a floating-point type such as torch.float16, got 'float16'"),
        ({"torch_dtype": torch.int8}, "dtype must be a floating-point type"),
        ({"quantize": 3}, "quantize must be a folder or package:kind"),
        ({"pipeline_class": "StableDiffusionPipeline"}, "pipeline_class must be a pipeline class of diffusers"),
        ({"pipeline_class": str}, "pipeline_class must be a pipeline class of diffusers"),
        ({"controlnet": 3}, "controlnet must be a folder, a hub id or loaded ones, got 3"),
        ({"controlnet": []}, r"controlnet must be a list of folders and hub ids, or of loaded ones, got \[\]"),
        (
            {"controlnet": ["net", torch.nn.Identity()]},
            "controlnet must be a list of folders and hub ids, or of loaded",
        ),
        ({"controlnet": torch.nn.Identity()}, "StableDiffusionPipeline has no ControlNet: give its folder or hub id"),
        ({"allow_pickle": "no"}, "allow_pickle must be True or False, got 'no'"),
        ({"low_memory": 1}, "low_memory must be True or False, got 1"),
        ({"task": 3}, "unknown task 3; allowed: text-to-image"),
    ],
)
def test_what_would_be_ignored_is_refused_before_anything_is_loaded(
    options: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigurationError, match=says):
        load_pipeline("sticker", **options)


def test_what_is_no_pipeline_is_not_converted() -> None:
    with pytest.raises(
        ConfigurationError, match="from_pipe takes a loaded pipeline, got 'sticker'; use from_pretrained"
    ):
        diffusion_accel.pipelines.AcceleratedStableDiffusionPipeline.from_pipe("sticker")


@pytest.mark.parametrize(
    ("method", "keywords", "says"),
    [
        ("from_pretrained", {"encoder_resue": True}, "did you mean encoder_reuse"),
        ("from_pretrained", {"torch_dtpe": torch.bfloat16}, "did you mean torch_dtype"),
        ("from_pretrained", {"low_memroy": True}, "did you mean low_memory"),
        (
            "from_pretrained",
            {"zzz": 1, "reuse": "hold:2"},
            "the features are: compiled, controlnet_parallel, encoder_reuse",
        ),
        ("from_single_file", {"reus": "hold:2"}, "did you mean reuse"),
    ],
)
def test_unknown_keywords_are_refused_before_anything_is_loaded(
    method: str, keywords: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigurationError, match=says):
        getattr(AcceleratedPipeline, method)("sticker", **keywords)


def test_unknown_keywords_of_conversions(sticker: Any) -> None:
    with pytest.raises(ConfigurationError, match="did you mean encoder_reuse"):
        AcceleratedPipeline.from_pipe(sticker, encoder_resue=True)
    with pytest.raises(ConfigurationError, match="did you mean torch_dtype"):
        diffusion_accel.pipelines.AcceleratedStableDiffusionImg2ImgPipeline.from_pipe(sticker, torch_dtyp=1)
    with pytest.raises(ConfigurationError, match="unknown feature 'reus'; the features are"):
        make_feature("reus", True)
    with pytest.raises(ConfigurationError, match="^reuse: unknown key 'plam'"):  # as it is said in Python: no flag
        make_feature("reuse", {"plam": "hold:2"})


def test_keywords_of_diffusers_pass(sticker: Any) -> None:
    pipe = AcceleratedPipeline.from_pretrained(
        "sticker", vae=sticker.vae, safety_checker=None, torch_dtype=torch.bfloat16, variant=None, use_safetensors=True
    )
    assert pipe.vae is sticker.vae and pipe.unet.dtype == torch.bfloat16
    for known, functions in (
        (keywords.PRETRAINED, (DiffusionPipeline.from_pretrained, DiffusionPipeline.download)),
        (keywords.SINGLE_FILE, (StableDiffusionPipeline.from_single_file,)),
        (keywords.CONVERSION, (DiffusionPipeline.from_pipe,)),
    ):
        taken = {n for f in functions for n in re.findall(r'kwargs\.pop\("(\w+)"', inspect.getsource(f))}
        assert taken <= known | {"custom_pipeline"}, "diffusers takes a keyword that would be refused"
