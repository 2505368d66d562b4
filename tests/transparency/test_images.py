"""Images with alpha on the pipelines of diffusers: in as PIL, array or tensor, out as RGBA, cut and resized rightly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionLDM3DPipeline,
    StableDiffusionXLInpaintPipeline,
    TextToVideoZeroPipeline,
)
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageDraw
from transparency_weights import write_weights
from zoo import (
    DIM,
    TOKENS,
    _sd,
    animatediff,
    controlnet_model,
    ddim,
    flux,
    rand,
    sdxl,
    seeded,
    text,
    unet,
    upscale,
    vae,
)

from diffusion_accel import ConfigurationError, LatentTransparency, UnsupportedPipelineError, accelerate
from diffusion_accel.transparency import attachment, outputs
from diffusion_accel.transparency.images import given, overlaid, rgba_tensor
from diffusion_accel.transparency.rgba import composite, on_grey, resized

Case = tuple[Any, dict[str, Any]]


def rgba(side: int = 16, seed: int = 0) -> Image.Image:
    """Random colours everywhere, also where alpha is 0: a clear top, a soft middle, an opaque bottom."""
    pixels = (rand(side, side, 4, seed=seed).sigmoid() * 255).to(torch.uint8).numpy()
    pixels[: side // 4, :, 3], pixels[side // 2 :, :, 3] = 0, 255
    return Image.fromarray(pixels)


def mask(side: int = 16) -> Image.Image:
    image = Image.new("L", (side, side))
    image.paste(255, (side // 4, side // 4, 3 * side // 4, 3 * side // 4))
    return image


def draw(pipe: Any, call: dict[str, Any], **changes: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "pil"}
    return pipe(**{**arguments, **{k: v for k, v in call.items() if k != "output_type"}, **changes}).images


def transparent(pipe: Any, folder: Path, **settings: Any) -> Any:
    """`pipe` with tiny weights, adapted where the adapter of a small U-Net fits."""
    weights = write_weights(folder, unet())
    if getattr(pipe, "unet", None) is None:
        (folder / "adapter.safetensors").unlink()
    return accelerate(pipe, LatentTransparency(weights=weights, views=1, **settings))


# ------------------------------------------------------------------------------------------- kinds of pipelines
def img2img() -> Case:
    return _sd(StableDiffusionImg2ImgPipeline, unet()), {**text(), "strength": 0.7}


def inpaint(channels: int = 9, **changes: Any) -> Case:
    call = {**text(), "mask_image": mask(), "height": 16, "width": 16}
    return _sd(StableDiffusionInpaintPipeline, unet(in_channels=channels)), {**call, **changes}


def controlnet_inpaint() -> Case:
    pipe = _sd(StableDiffusionControlNetInpaintPipeline, unet(), controlnet=controlnet_model())
    return pipe, {**text(), "control_image": rand(1, 3, 16, 16), "mask_image": mask()}


def pix2pix() -> Case:
    return _sd(StableDiffusionInstructPix2PixPipeline, unet(in_channels=8)), text()


def xl_inpaint() -> Case:
    known, call = sdxl()
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet")
    parts = {name: getattr(known, name) for name in names}
    pipe = StableDiffusionXLInpaintPipeline(**parts, scheduler=EulerDiscreteScheduler(), add_watermarker=False)
    return pipe, {**call, "mask_image": mask(), "strength": 0.9}


def upscaled() -> Case:
    pipe, call = upscale()
    call.pop("image")
    return pipe, call


def flux_img2img() -> Case:
    known, call = flux()
    known.vae.register_to_config(shift_factor=0.1)
    parts = {k: v for k, v in known.components.items() if k not in ("image_encoder", "feature_extractor")}
    return FluxImg2ImgPipeline(**parts), {**call, "strength": 0.5}


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


# ------------------------------------------------------------------------------------------- inpainting
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


# ------------------------------------------------------------------------------------------- resizing
def disc(side: int) -> Image.Image:
    """A white disc on transparent black."""
    image = Image.new("RGBA", (side, side))
    ImageDraw.Draw(image).ellipse((side // 8, side // 8, side - side // 8, side - side // 8), fill=(255,) * 4)
    return image


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


# ------------------------------------------------------------------------------------------- what cannot work
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
