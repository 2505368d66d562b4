"""RGBA where a mask leaves parts of an image as they are, and where sizes differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from rgba_cases import controlnet_inpaint, disc, draw, inpaint, rgba, transparent, xl_inpaint
from zoo import (
    DIM,
    TOKENS,
    ddim,
    rand,
    seeded,
    text,
    vae,
)

from diffusion_accel.transparency import attachment
from diffusion_accel.transparency.images import overlaid, rgba_tensor
from diffusion_accel.transparency.rgba import composite, on_grey, resized


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the encoder is given: colours and alpha, call by call."""
    seen, original = [], attachment.offset_of

    def offset(encoder: Any, rgb: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
        seen.append((rgb, alpha))
        return original(encoder, rgb, alpha)

    monkeypatch.setattr(attachment, "offset_of", offset)
    return seen


@pytest.mark.parametrize("build", [lambda: inpaint(4), controlnet_inpaint, xl_inpaint])
def test_a_crop_is_put_back_into_the_whole_image(build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call = build()
    transparent(pipe, tmp_path)
    image, hole = rgba(64), Image.new("L", (64, 64))
    hole.paste(255, (20, 20, 44, 44))
    seen = watched(monkeypatch)
    changes = {"mask_image": hole, "image": image, "height": 16, "width": 16, "padding_mask_crop": 4}
    if "control_image" in call:
        changes["control_image"] = image.convert("RGB")
    made = draw(pipe, call, **changes)[0]
    assert made.mode == "RGBA" and made.size == (64, 64)
    before, after = (rgba_tensor(one)[0] for one in (image, made))
    outside = torch.from_numpy(np.asarray(hole)) == 0
    assert torch.equal(after[3, outside], before[3, outside])
    shown = [composite(one[:3], one[3:], 0.0)[:, outside] for one in (before, after)]
    assert (shown[0] - shown[1]).abs().max() < 1.01 / 255
    assert (after[3, ~outside] - before[3, ~outside]).abs().mean() > 0.05
    box = (16, 16, 48, 48)
    alpha = image.getchannel("A").crop(box).resize((16, 16), Image.Resampling.LANCZOS)
    expected = torch.from_numpy(np.asarray(alpha, np.float32) / 255)
    assert (seen[0][1][0, 0] - expected).abs().max() < 1.01 / 255, "alpha is cut and resized as the image is"


def test_overlaying_agrees_with_diffusers_for_opaque_images() -> None:
    whole, drawn = (Image.fromarray((rand(n, n, 3, seed=n).sigmoid() * 255).byte().numpy()) for n in (40, 16))
    soft = Image.fromarray((rand(40, 40).sigmoid() * 255).byte().numpy())
    for box, piece in (((12, 8, 28, 24), drawn), (None, whole.rotate(90))):
        hole = soft if box is None else Image.composite(soft, Image.new("L", soft.size), _inside(box, soft.size))
        wanted = VaeImageProcessor().apply_overlay(hole, whole, piece, box)
        made = overlaid(rgba_tensor(piece)[0], hole, rgba_tensor(whole)[0], box)
        assert (made[:3] - rgba_tensor(wanted)[0, :3]).abs().max() < 2.51 / 255
        assert (made[3] == 1).all()


def _inside(box: tuple[int, int, int, int], size: tuple[int, int]) -> Image.Image:
    image = Image.new("L", size)
    image.paste(255, box)
    return image


def test_what_a_mask_hides_cannot_be_seen_through_alpha(tmp_path: Path) -> None:
    """Of a U-Net that is given the masked image too: with everything drawn anew only what is outside may matter."""
    pipe, call = inpaint(9, strength=1.0)
    transparent(pipe, tmp_path, strength=0.0, refine=2)
    images = [rgba(), rgba()]
    images[1].paste((10, 200, 30, 90), (4, 4, 12, 12))
    first, second = (np.asarray(draw(pipe, call, image=image)[0]) for image in images)
    assert np.array_equal(first, second)
    images[1].paste((10, 200, 30, 90), (0, 12, 4, 16))
    assert not np.array_equal(first, np.asarray(draw(pipe, call, image=images[1])[0]))


def test_layers_are_composited_before_they_are_resized() -> None:
    image = disc(512)
    rgba_large = rgba_tensor(image)
    over_grey = composite(rgba_large[:, :3], rgba_large[:, 3:], 0.5)[0].permute(1, 2, 0).numpy()
    channels = [Image.fromarray(over_grey[..., c]).resize((96, 96), Image.Resampling.BILINEAR) for c in range(3)]
    expected = torch.from_numpy(np.stack([np.asarray(one) for one in channels]))
    small = resized(rgba_large, 96, 96)
    made = on_grey(small[:, :3], small[:, 3:])[0] / 2 + 0.5
    assert (made - expected).abs().max() < 2e-3
    assert (small[0, :3, small[0, 3] > 0] > 0.999).all(), "all that is seen is white"
    apart = torch.nn.functional.interpolate(rgba_large, (96, 96), mode="bilinear", antialias=True)
    assert ((on_grey(apart[:, :3], apart[:, 3:])[0] / 2 + 0.5) - expected).abs().max() > 0.1, "what this is about"
    assert torch.equal(resized(rgba_large, 512, 512), rgba_large)


def test_a_given_image_is_laid_over_grey_before_it_is_resized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call = inpaint(4)
    transparent(pipe, tmp_path)
    seen = watched(monkeypatch)
    draw(pipe, call, image=disc(96))
    rgb, alpha = seen[0]
    assert alpha.shape == (1, 1, 16, 16) and 0 < alpha.mean() < 1
    shown = alpha.expand_as(rgb) > 0.02
    assert rgb[shown].min() > 0.9, "white up to the rim, but for 8 bits"


def test_pipelines_that_draw_at_another_size_return_the_one_that_was_asked_for(tmp_path: Path) -> None:
    transformer = seeded(
        lambda: PixArtTransformer2DModel(
            num_layers=1, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, sample_size=32,
            cross_attention_dim=16, caption_channels=DIM, norm_num_groups=4, use_additional_conditions=False,
        )
    )  # fmt: skip
    pipe = PixArtSigmaPipeline(tokenizer=None, text_encoder=None, vae=vae(), transformer=transformer, scheduler=ddim())
    seen = dict.fromkeys(("prompt_attention_mask", "negative_prompt_attention_mask"), torch.ones(1, TOKENS))
    call = {**text(), **seen, "negative_prompt": None, "height": 64, "width": 40, "num_inference_steps": 1}
    transparent(pipe, tmp_path)
    made = draw(pipe, call, output_type="np")
    assert made.shape == (1, 64, 40, 4)
