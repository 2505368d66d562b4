"""Images in the middle of their drawing: what the latents of a step would be without their noise, decoded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from diffusion_accel.diffusers_compat import unpacked_latents
from diffusion_accel.prediction import Conversion, model_input

if TYPE_CHECKING:
    from PIL import Image

MOST = 16


@dataclass(frozen=True)
class Partial:
    """Images of a request before they are finished.

    Attributes:
        index: which of the partial images that were asked for, 0, 1, …
        step, steps: after how many steps of how many it was made.
        images: as those of the end, with alpha where the request is transparent.
    """

    index: int
    step: int
    steps: int
    images: list[Image.Image]


def impossible(scheduler: Any, pipe: Any) -> str | None:
    """Why a pipeline with this scheduler shows nothing before the end, as far as that can be seen; None if it does."""
    if scheduler is None or not Conversion(scheduler).possible:
        return f"what {type(scheduler).__name__} is given does not say what the image will be"
    if not hasattr(getattr(pipe, "vae", None), "decode") or not hasattr(pipe, "image_processor"):
        return "it has no VAE and image processor that make an image of latents"
    return None


def steps_of(count: int, steps: int) -> list[int]:
    """Behind which steps so many partial images are made: evenly, none at the start, none at the end."""
    return sorted({round(steps * (k + 1) / (count + 1)) for k in range(count)} & set(range(1, steps)))


def clean(scheduler: Any, named: dict[str, Any]) -> torch.Tensor:
    """What the prediction says of the latents without noise.

    Args:
        scheduler: before its step.
        named: the arguments of the step: `model_output`, `timestep`, `sample` (B, C, H, W) or (B, S, C).
    """
    x = model_input(scheduler, named["sample"], named["timestep"])
    value = Conversion(scheduler).to("sample", named["model_output"], x, float(named["timestep"]))
    return value if value.dim() != 4 else value[:, : named["sample"].shape[1]]


def decoded(
    pipe: Any, latents: torch.Tensor, height: int | None, width: int | None, decode: Callable[[torch.Tensor], Any]
) -> list[Image.Image]:
    """Latents as the pipeline's images.

    Args:
        pipe: an accelerated pipeline whose call runs.
        latents: as its scheduler has them.
        height, width: of the images in pixels, for latents that are packed; None: the pipeline's usual ones.
        decode: of the VAE: latents -> (B, 3, H, W) in -1 to 1.
    """
    z = latents if latents.dim() == 4 else unpacked_latents(pipe, latents, height, width)
    config = pipe.vae.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    scaling, shift = getattr(config, "scaling_factor", None) or 1.0, getattr(config, "shift_factor", None) or 0.0
    if mean is not None and std is not None:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(z) for values in (mean, std))
        z = z * std / scaling + mean
    else:
        z = z / scaling + shift
    made = decode(z)
    images = pipe.image_processor.postprocess(made, output_type="pil")
    return pipe.acceleration.preview(images, z, made)
