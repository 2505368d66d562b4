"""The low-rank update of the UNet: latents as the encoder changes them, and the task that learns to draw them."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from diffusion_accel.training.arrays import load_tensors
from diffusion_accel.training.diffusion_task import Denoiser, DenoisingTask, Objective
from diffusion_accel.training.files import require
from diffusion_accel.training.state import load_average
from diffusion_accel.transparency.files import ADAPTER
from diffusion_accel.transparency.rgba import padded_rgb
from diffusion_accel.transparency.weights import read_weights
from sticker import data
from sticker.low_rank import add_low_rank, set_low_rank
from sticker.tasks import Captioned

from .images import rgba_of, with_margin
from .pair import STAGES, Pair, load_pair

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionPipeline


@torch.no_grad()
def adjusted_latents(work: Path, vae: AutoencoderKL, start: Path | None = None, batch: int = 64) -> torch.Tensor:
    """The latents of the chosen images as the trained encoder changes them, in the order of `latents.safetensors`.

    The images have a margin, so that the denoiser learns to keep it.
    """
    stored = load_tensors(require(work / "latents.safetensors", "latents"), "indices", "listed")
    images, listed = data.load_images(work), int(stored["listed"])
    pair = Pair(vae)
    load_pair(work, pair, STAGES[:3], start)
    made = []
    for part in stored["indices"][:listed].split(batch):
        rgb, alpha = with_margin(*rgba_of(images, part.numpy()))
        mean, offset = pair.encode(rgb, alpha, padded_rgb(rgb, alpha))
        made.append(mean + offset)
    return torch.cat(made)


def trained_denoiser(work: Path, pipeline: StableDiffusionPipeline, rank: int) -> Denoiser:
    """Text encoder and UNet with the trained update."""
    denoiser = Denoiser(copy.deepcopy(pipeline.unet).float(), pipeline.text_encoder.float())
    add_low_rank(denoiser.core, rank)
    load_average(work / "transparency" / "unet", denoiser, "unet")
    return denoiser


def unet_task(
    work: Path, pipeline: StableDiffusionPipeline, rank: int, objective: Objective, start: Path | None = None
) -> DenoisingTask:
    """Trains the low-rank update on the concept list with changed latents; text encoder and base weights stay.

    It begins at zero, or with the adapter in the folder `start`.
    """
    latents = load_tensors(require(work / "transparency" / "latents.safetensors", "latents"), "latents")["latents"]
    captioned = replace(Captioned.load(work).listed(), latents=latents)
    torch.manual_seed(0)
    denoiser = Denoiser(pipeline.unet.float(), pipeline.text_encoder.float().requires_grad_(False))
    add_low_rank(denoiser.core, rank)
    if start is not None:
        set_low_rank(denoiser.core, read_weights(start / ADAPTER))
    return DenoisingTask(denoiser, captioned, objective)
