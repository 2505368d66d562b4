"""A call in the pipeline's own terms."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import pytest
import zoo
from diffusers import DiffusionPipeline

from diffusion_accel.conditioning import check_prompts_do, missing_arguments, own_arguments
from diffusion_accel.errors import UnsupportedPipelineError


@pytest.fixture
def flux() -> DiffusionPipeline:
    pipe, _ = zoo.flux()
    pipe.tokenizer_2 = SimpleNamespace(model_max_length=32)
    pipe.vae.register_to_config(sample_size=32)  # what diffusers writes where nobody says anything
    return pipe


def test_guidance_is_true_guidance_where_the_model_is_not_distilled(flux: DiffusionPipeline) -> None:
    assert own_arguments(flux, {"guidance_scale": 3.0, "height": 16}) == {
        "true_cfg_scale": 3.0, "negative_prompt": "", "height": 16, "max_sequence_length": 32,
    }  # fmt: skip
    assert own_arguments(flux, {"guidance_scale": 1.0}) == {"true_cfg_scale": 1.0, "max_sequence_length": 32}
    assert own_arguments(flux, {"guidance_scale": 2.0, "negative_prompt": "blue"})["negative_prompt"] == "blue"
    flux.transformer.register_to_config(guidance_embeds=True)
    assert own_arguments(flux, {"guidance_scale": 3.0})["guidance_scale"] == 3.0


def test_texts_are_no_longer_than_the_tokenizer_reads(flux: DiffusionPipeline) -> None:
    assert own_arguments(flux, {"max_sequence_length": 64}) == {"max_sequence_length": 64}
    flux.tokenizer_2.model_max_length = 1024
    assert own_arguments(flux, {}) == {}


def test_other_pipelines_are_called_as_they_were() -> None:
    for make in (zoo.sd, zoo.sd3, zoo.cogview4):
        pipe, _ = make()
        assert own_arguments(pipe, {"guidance_scale": 3.0}) == {"guidance_scale": 3.0}


def test_the_size_is_the_trained_one_where_the_pipeline_has_a_constant(flux: DiffusionPipeline) -> None:
    flux.vae.register_to_config(sample_size=96)
    more = {"max_sequence_length": 32}
    assert own_arguments(flux, {}) == {"width": 96, "height": 96, **more}
    assert own_arguments(flux, {"width": 64, "height": None}) == {"width": 64, "height": 96, **more}
    assert own_arguments(flux, {"image": object()}).keys() == {"image", *more}
    flux.vae.register_to_config(sample_size=flux.default_sample_size * flux.vae_scale_factor)
    assert own_arguments(flux, {}) == more


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (diffusers.StableDiffusionControlNetPipeline, "image"),
        (diffusers.StableDiffusionControlNetImg2ImgPipeline, "control_image"),
        (diffusers.StableDiffusionXLControlNetUnionPipeline, "control_image"),
        (diffusers.FluxControlNetPipeline, "control_image"),
        (diffusers.AnimateDiffControlNetPipeline, "conditioning_frames"),
        (diffusers.StableDiffusionAdapterPipeline, "image"),
    ],
)
def test_a_controlnet_is_given_an_image(cls: type, name: str) -> None:
    """Their calls say None where one leaves it out, and fail."""
    assert missing_arguments(cls, ()) == [name] and not missing_arguments(cls, (name,))
    with pytest.raises(UnsupportedPipelineError, match=f"{cls.__name__} needs {name}, and here it is called with prom"):
        check_prompts_do(cls)


def test_what_needs_prompts_alone() -> None:
    for cls in (diffusers.StableDiffusionPipeline, diffusers.AnimateDiffPipeline, diffusers.FluxPipeline):
        check_prompts_do(cls)
