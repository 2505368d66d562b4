"""U-Nets and autoencoders without trained weights: what a step of them costs does not depend on the numbers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel, UNet2DModel

from diffusion_accel.errors import ConfigurationError, ModelLoadError, UnsupportedPipelineError
from diffusion_accel.io import first_line
from diffusion_accel.model_files.hub import hub_reason

from .recording import Subject

_UNETS = {cls.__name__: cls for cls in (UNet2DConditionModel, UNet2DModel)}
_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "sd15": {"cross_attention_dim": 768},
    "sdxl": {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280),
        "cross_attention_dim": 2048,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "projection_class_embeddings_input_dim": 2816,
        "transformer_layers_per_block": (1, 2, 10),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "use_linear_projection": True,
    },
}


def make_subject(
    name: str,
    location: str,
    height: int,
    width: int,
    images: int = 1,
    guidance: bool = True,
    decode: bool = True,
    dtype: torch.dtype = torch.float16,
    device: str = "meta",
) -> Subject:
    """A model and the arguments of a step for images of some size.

    Args:
        name, location, dtype, device: see `make_models`.
        height, width: of the images, multiples of what its VAE makes smaller (8, usually).
        images: images in a call.
        guidance: with both branches of classifier-free guidance.
        decode: with the VAE's decoder.

    Raises:
        ConfigurationError: the size is no such multiple.
        UnsupportedPipelineError: the model has no U-Net for images.
    """
    unet, vae, factor = make_models(name, location, dtype, device)
    if min(height, width) < factor or height % factor or width % factor:
        raise ConfigurationError(f"the height {height} and the width {width} must be multiples of {factor} pixels")
    height, width = height // factor, width // factor
    inputs = step_inputs(unet, images * (1 + guidance), height, width)
    if vae is None or not decode:
        return Subject(unet, inputs)
    shape = (images, vae.config.latent_channels, height, width)
    return Subject(unet, inputs, vae, next(vae.parameters()).new_zeros(shape))


def make_models(name: str, location: str, dtype: torch.dtype, device: str) -> tuple[Any, Any, int]:
    """The U-Net and the autoencoder of a model, and by how much the latter makes images smaller.

    Args:
        name: "sd15" or "sdxl" for their architectures; else `location` is a pipeline folder or hub id, of which only
            the configurations are read.
        dtype: of the U-Net; autoencoders are taken in 32 bits, as pipelines for large images run them.
        device: "meta", or one to compute on (with constant weights).

    Raises:
        UnsupportedPipelineError: the model has no U-Net for images.
        ModelLoadError: a configuration cannot be read.
    """
    if name in ARCHITECTURES:
        kinds: tuple[Any, Any] = (UNet2DConditionModel, AutoencoderKL)
        configs: list[Any] = [ARCHITECTURES[name], _VAE]
    else:
        index = _config(name, DiffusionPipeline, location)
        denoiser, autoencoder = (index.get(part, (None, None))[1] for part in ("unet", "vae"))
        if denoiser not in _UNETS:
            raise UnsupportedPipelineError(f"plan knows pipelines with one of {', '.join(_UNETS)}; {name} has none")
        if autoencoder not in (None, "AutoencoderKL"):
            raise UnsupportedPipelineError(f"plan knows AutoencoderKL; the vae of {name} is {autoencoder}")
        kinds = _UNETS[denoiser], AutoencoderKL if autoencoder else None
        configs = [cls and _config(name, cls, location, part) for cls, part in zip(kinds, ("unet", "vae"), strict=True)]
    unet = _make(kinds[0], configs[0], dtype, device)
    vae = _make(kinds[1], configs[1], torch.float32, device) if kinds[1] is not None else None
    factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 1
    return unet, vae, factor


def _config(name: str, cls: Any, location: str, folder: str | None = None) -> Any:
    try:
        return cls.load_config(location, subfolder=folder)
    except OSError as error:
        reason = hub_reason(name, error) or first_line(error)
        raise ModelLoadError(f"the configuration of {name} cannot be read: {reason}") from error


def _make(cls: Any, config: dict[str, Any], dtype: torch.dtype, device: str) -> Any:
    with torch.device("meta"):
        model = cls.from_config(config) if "_class_name" in config else cls(**config)
    model = model.to(dtype).eval()
    if device != "meta":
        model = model.to_empty(device=device)
        for tensor in (*model.parameters(), *model.buffers()):
            torch.nn.init.constant_(tensor, 0.01)
    return model


def step_inputs(unet: Any, rows: int, height: int, width: int, tokens: int = 77) -> dict[str, Any]:
    """The arguments of one step of a U-Net: zeros of the right shapes, on its device and in its type.

    Args:
        rows: of the batch, 2 with guidance.
        height, width: of the latents.
        tokens: of the text.
    """
    parameter, config = next(unet.parameters()), unet.config

    def zeros(*shape: int) -> Any:
        return parameter.new_zeros(shape)

    named = {"sample": zeros(rows, config.in_channels, height, width), "timestep": zeros(rows) + 500}
    if getattr(config, "cross_attention_dim", None):
        named["encoder_hidden_states"] = zeros(rows, tokens, config.cross_attention_dim)
    if getattr(config, "addition_embed_type", None) == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        named["added_cond_kwargs"] = {"text_embeds": zeros(rows, pooled), "time_ids": zeros(rows, 6)}
    return named
