"""Images with alpha on the pipelines of diffusers: in as PIL, array or tensor, out as RGBA, cut and resized rightly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rgba_cases import (
    controlnet_inpaint,
    draw,
    flux_img2img,
    img2img,
    inpaint,
    pix2pix,
    rgba,
    transparent,
    upscaled,
    xl_inpaint,
)
from zoo import (
    rand,
    sdxl,
)

from diffusion_accel import ConfigurationError
from diffusion_accel.transparency import outputs
from diffusion_accel.transparency.images import given


@pytest.mark.sampled(3)
@pytest.mark.parametrize("build", [img2img, inpaint, controlnet_inpaint, pix2pix, xl_inpaint, upscaled, flux_img2img])
def test_rgba_goes_in_in_every_kind(build: Any, tmp_path: Path) -> None:
    pipe, call = build()
    if "mask_image" in call:
        call["strength"] = 0.5
    transparent(pipe, tmp_path)
    image = rgba(8 if build is upscaled else 16)
    array = np.asarray(image, np.float32) / 255
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    expected = np.asarray(draw(pipe, call, image=image)[0]).astype(int)
    assert expected.shape == (16, 16, 4)
    kinds = [
        [image],
        array,
        np.asarray(image),
        [array],
        array[None],
        tensor,
        tensor[None],
        (tensor * 255).round().byte(),
    ]
    for kind in [*kinds, [tensor]]:
        made = draw(pipe, call, image=kind)[0]
        assert np.abs(np.asarray(made) - expected).mean() < 0.6, "equal but for 8 bits and grey of 127 or 127.5"
    other = np.asarray(draw(pipe, call, image=rgba(8 if build is upscaled else 16, seed=5))[0])
    assert np.abs(other - expected).mean() > 1, "the image matters"
    assert "preprocess" not in pipe.image_processor.__dict__


def test_alpha_that_is_not_read_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An upscaler puts the image beside the latents, without its VAE."""
    for build, side, warned in ((img2img, 16, False), (upscaled, 8, True)):
        pipe, call = build()
        transparent(pipe, tmp_path / build.__name__, strength=0.0)
        caplog.clear()
        draw(pipe, call, image=rgba(side))
        assert ("does not encode the image with its VAE" in caplog.text) is warned


def test_hidden_colours_do_not_matter(tmp_path: Path) -> None:
    pipe, call = img2img()
    transparent(pipe, tmp_path)
    pixels = np.asarray(rgba()).copy()
    first = np.asarray(draw(pipe, call, image=Image.fromarray(pixels))[0])
    pixels[pixels[..., 3] == 0] = (255, 0, 255, 0)
    assert np.array_equal(first, np.asarray(draw(pipe, call, image=Image.fromarray(pixels))[0]))


def test_latents_stay_latents_and_values_have_a_range(tmp_path: Path) -> None:
    pipe, call = img2img()
    latents = rand(1, 4, 8, 8)
    base = draw(pipe, {**call, "image": latents}, output_type="latent")
    transparent(pipe, tmp_path, strength=0.0)
    arguments = {**call, "image": latents, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    assert torch.equal(pipe(**arguments, output_type="latent").images, base)
    with pytest.raises(ConfigurationError, match=r"values in 0..1, or whole numbers in 0..255; got -1 to 1"):
        draw(pipe, call, image=np.linspace(-1, 1, 16 * 16 * 4).reshape(16, 16, 4).astype(np.float32))


def test_every_image_of_a_batch_keeps_its_own_alpha(tmp_path: Path) -> None:
    pipe, call = img2img()
    transparent(pipe, tmp_path, strength=0.0)
    images = [rgba(seed=k) for k in range(2)]
    embeds = {k: v.repeat(2, 1, 1) for k, v in call.items() if "embeds" in k}
    seeds = [torch.Generator().manual_seed(k) for k in range(2)]
    batch = draw(pipe, {**call, **embeds}, image=images, generator=seeds)
    for k, (image, together) in enumerate(zip(images, batch, strict=True)):
        alone = draw(pipe, call, image=image, generator=torch.Generator().manual_seed(k))[0]
        assert np.abs(np.asarray(alone).astype(int) - np.asarray(together)).max() <= 1


def test_a_watermark_and_captions_beside_images(tmp_path: Path) -> None:
    pipe, call = sdxl()
    transparent(pipe, tmp_path, strength=0.0)
    plain = draw(pipe, call, output_type="pt")

    class Watermark:
        def apply_watermark(self, images: torch.Tensor) -> torch.Tensor:
            return -images

    pipe.watermark = Watermark()
    marked = draw(pipe, call, output_type="pt")
    assert torch.allclose(marked[:, :3], 1 - plain[:, :3], atol=1e-6) and torch.equal(marked[:, 3], plain[:, 3])
    assert outputs.blocked((None, ["a caption"])) == set()
    assert outputs.blocked((None, [True, False])) == {0}


def test_what_is_taken_for_an_image() -> None:
    assert given(None) is None and given([]) is None and given(torch.zeros(1, 1, 4, 4)) is None
    assert given(rand(1, 4, 4, 4), latent_channels=4) is None
    with pytest.raises(ConfigurationError, match="values in 0..1"):
        given(rand(1, 4, 4, 4), latent_channels=16)
    found = given(torch.full((1, 4, 2, 2), 0.5), latent_channels=4)
    assert found is not None and not found.opaque and torch.allclose(found.flat, torch.full((1, 3, 2, 2), 0.5))
    assert given(np.zeros((2, 2, 3))).opaque
