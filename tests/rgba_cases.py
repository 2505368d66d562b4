"""Images with alpha, and pipelines that take them, for the tests of transparency."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    EulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLInpaintPipeline,
)
from PIL import Image, ImageDraw
from transparency_weights import write_weights
from zoo import (
    _sd,
    controlnet_model,
    flux,
    rand,
    sdxl,
    text,
    unet,
    upscale,
)

from diffusion_accel import LatentTransparency, accelerate

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


def disc(side: int) -> Image.Image:
    """A white disc on transparent black."""
    image = Image.new("RGBA", (side, side))
    ImageDraw.Draw(image).ellipse((side // 8, side // 8, side - side // 8, side - side // 8), fill=(255,) * 4)
    return image
