"""What latent transparency cannot work with is refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionLDM3DPipeline,
    TextToVideoZeroPipeline,
)
from rgba_cases import Case, draw, img2img, rgba, transparent
from transparency_weights import write_weights
from zoo import (
    animatediff,
    ddim,
    seeded,
    unet,
    vae,
)

from diffusion_accel import (
    ConfigurationError,
    LatentTransparency,
    PatchParallel,
    UnsupportedPipelineError,
    accelerate,
)


def with_vae(model: Any) -> Case:
    pipe, call = img2img()
    pipe.register_modules(vae=model)
    return pipe, call


def text_to_video_zero() -> Case:
    parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipe = TextToVideoZeroPipeline(
        vae=vae(), unet=unet(), scheduler=DDIMScheduler(), requires_safety_checker=False, **parts
    )
    return pipe, {}


def ldm3d() -> Case:
    parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"))
    pipe = StableDiffusionLDM3DPipeline(
        vae=vae(), unet=unet(), scheduler=ddim(), requires_safety_checker=False, **parts
    )
    return pipe, {}


def tiny_vae() -> Case:
    widths = {f"{part}_block_out_channels": (8, 8) for part in ("encoder", "decoder")}
    return with_vae(AutoencoderTiny(**widths, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (animatediff, "it returns frames; latent transparency is for pipelines that return images"),
        (text_to_video_zero, "its images are frames of a video"),
        (ldm3d, "it returns depth, .*rgb; latent transparency is for pipelines that return images"),
        (tiny_vae, "its VAE is AutoencoderTiny, .*give the pipeline the AutoencoderKL"),
    ],
)
def test_what_cannot_return_rgba_is_refused(build: Any, words: str, tmp_path: Path) -> None:
    pipe, _ = build()
    with pytest.raises(UnsupportedPipelineError, match=words):
        transparent(pipe, tmp_path)
    assert not hasattr(pipe, "acceleration")


def test_a_vae_that_is_replaced_later_is_refused_too(tmp_path: Path) -> None:
    pipe, call = img2img()
    transparent(pipe, tmp_path)
    ours, three = pipe.vae, {"block_out_channels": (8,) * 3, "norm_num_groups": 4}
    three |= {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    for other, words in (
        (tiny_vae()[0].vae, "any more: its VAE is AutoencoderTiny"),
        (vae(8), "any more: its weights are for latents of 4 channels and 1/2 .* it has now has 8 and 1/2"),
        (AutoencoderKL(**three), "it has now has 4 and 1/4"),
    ):
        pipe.vae = other
        with pytest.raises(ConfigurationError, match=words):
            draw(pipe, call, image=rgba())
    pipe.vae = ours
    assert draw(pipe, call, image=rgba())[0].mode == "RGBA"


def test_an_asymmetric_autoencoder_works(tmp_path: Path) -> None:
    down = {"down_block_types": ("DownEncoderBlock2D",) * 2, "down_block_out_channels": (8, 8)}
    up = {"up_block_types": ("UpDecoderBlock2D",) * 2, "up_block_out_channels": (8, 8)}
    pipe, call = with_vae(seeded(lambda: AsymmetricAutoencoderKL(**down, **up, norm_num_groups=4, sample_size=16)))
    transparent(pipe, tmp_path)
    assert draw(pipe, call, image=rgba())[0].mode == "RGBA"


def test_an_image_with_alpha_needs_an_encoder(tmp_path: Path) -> None:
    pipe, call = img2img()
    weights = write_weights(tmp_path, unet())
    (tmp_path / "encoder" / "config.json").unlink()
    accelerate(pipe, LatentTransparency(weights=weights, views=1))
    with pytest.raises(ConfigurationError, match="image has transparent parts, and these weights have no encoder"):
        draw(pipe, call, image=rgba())
    opaque = rgba()
    opaque.putalpha(255)
    assert draw(pipe, call, image=opaque)[0].mode == "RGBA"


def test_layers_drawn_by_each_other_are_for_one_process() -> None:
    """What is given is put beside the latents of a whole image, of which a process has a part."""
    given = LatentTransparency(variant="fg2bg", foreground="a.png")
    assert LatentTransparency().clash(PatchParallel()) is None
    for one in (given, LatentTransparency(variant="joint")):
        assert "use variant=fg" in str(one.clash(PatchParallel()))
