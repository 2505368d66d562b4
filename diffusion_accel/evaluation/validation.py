"""The validation loss of a text-to-image pipeline on real images, by timestep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.training.denoising import Process
from diffusion_accel.training.diffusion_task import Denoiser, prediction_error

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

BINS = 10


def validation_loss(pipe: DiffusionPipeline, images: torch.Tensor, captions: list[str]) -> dict[str, Any]:
    """Prediction error by timestep of a text-to-image pipeline on real images (N, 3, H, W) in -1..1.

    `BINS` equal parts of the timesteps, each with a share of the images; see `training.diffusion_task`.

    Raises:
        ConfigurationError: the pipeline is not like Stable Diffusion (one text encoder, UNet2DConditionModel, VAE).
    """
    reason = not_measurable(pipe)
    if reason:
        raise ConfigurationError(reason)
    config, tokenizer = pipe.scheduler.config, pipe.tokenizer
    schedules = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
    process = Process(config.prediction_type, schedules[config.beta_schedule])
    padding = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
    ids = torch.tensor(tokenizer(captions, **padding).input_ids)
    with torch.no_grad():
        parts = [pipe.vae.encode(part.to(pipe.device)).latent_dist.mean.float().cpu() for part in images.split(16)]
        clean = torch.cat(parts) * pipe.vae.config.scaling_factor
        return prediction_error(Denoiser(pipe.unet, pipe.text_encoder), clean, ids, process, bins=BINS)


def not_measurable(pipe: DiffusionPipeline) -> str | None:
    """Why the validation loss of this pipeline cannot be measured, or None."""
    config = getattr(pipe.scheduler, "config", {})
    name = type(pipe).__name__
    if type(getattr(pipe, "unet", None)).__name__ != "UNet2DConditionModel" or getattr(pipe, "text_encoder_2", None):
        return f"the validation loss is for pipelines with one text encoder and a UNet2DConditionModel, not {name}"
    if config.get("prediction_type") not in ("epsilon", "v_prediction"):
        return f"the validation loss needs an epsilon or v-prediction scheduler, not {type(pipe.scheduler).__name__}"
    if config.get("beta_schedule") not in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        return f"the validation loss does not know the beta schedule {config.get('beta_schedule')!r}"
    return None
