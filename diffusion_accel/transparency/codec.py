"""RGBA images to adjusted latents and back, around a frozen VAE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from diffusion_accel.errors import ConfigurationError

from .modules import LatentTransparencyDecoder, LatentTransparencyEncoder
from .rgba import on_grey, padded_rgb
from .views import decode_views

REFINE_RATE = 0.06  # of the first step, in latents


def offset_of(encoder: LatentTransparencyEncoder, rgb: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """What the encoder adds to the latents, in units of the VAE's deviation: straight colours and alpha in 0..1.

    Returns (N, C, H/8, W/8) in the dtype of the encoder.
    """
    given = torch.cat([alpha, padded_rgb(rgb.float(), alpha.float())], 1)
    return encoder(given.to(encoder.device, encoder.dtype))


def encode_rgba(vae: Any, encoder: LatentTransparencyEncoder, rgb: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Straight colours (N, 3, H, W) and alpha (N, 1, H, W) in 0..1 -> unscaled latents (N, C, H/8, W/8).

    The VAE's mean of the image over mid-grey, plus its deviation times the encoder's offset; nothing is random
    (LayerDiffuse, section 3.1). Multiply by the VAE's scaling factor before giving it to a denoiser.

    Raises:
        ConfigurationError: the sides are not multiples of the VAE's factor.
    """
    height, width = rgb.shape[-2:]
    if height % encoder.factor or width % encoder.factor:
        raise ConfigurationError(f"sides must be multiples of {encoder.factor} pixels, got {width}x{height}")
    known = vae.encode(on_grey(rgb, alpha).to(vae.device, vae.dtype)).latent_dist
    return known.mean + known.std * offset_of(encoder, rgb, alpha).to(known.mean)


def refine_latents(
    decode: Callable[[torch.Tensor], torch.Tensor],
    decoder: LatentTransparencyDecoder,
    latents: torch.Tensor,
    rgb: torch.Tensor,
    alpha: torch.Tensor,
    steps: int,
) -> torch.Tensor:
    """The latents of images, moved so that they are read better: `steps` steps of Adam, 0 moves nothing.

    An encoder answers at once and for all images alike; better latents of a given image exist, and going down the
    error of what is read (one view) finds them. The error of each image is the sum of three mean squares: of 0.7
    times the VAE's image against the one over grey, of twice alpha, and of the colours where they are seen. A step
    costs a pass forth and back through both decoders.

    Args:
        decode: the VAE's decoding of unscaled latents, to -1..1.
        latents: unscaled, (N, C, H/8, W/8).
        rgb, alpha: straight colours (N, 3, H, W) and alpha (N, 1, H, W) in 0..1.
    """
    z = latents.detach().float().clone().requires_grad_()
    rgb, alpha = rgb.to(z), alpha.to(z)
    target = on_grey(rgb, alpha)
    adam = torch.optim.Adam([z], betas=(0.9, 0.99))
    for step in range(steps):
        adam.param_groups[0]["lr"] = REFINE_RATE * (1 - step / steps)
        with torch.enable_grad():
            asked = z.to(latents.dtype)
            decoded = decode(asked)
            made_rgb, made_alpha = decode_rgba(decoder, decoded, asked, views=1)
            errors = (0.7 * (decoded.float() - target), 2 * (made_alpha - alpha), (made_rgb - rgb) * alpha)
            total = torch.stack([error.square().flatten(1).mean(1) for error in errors]).sum()
        (z.grad,) = torch.autograd.grad(total, z)  # the networks' weights get none
        adam.step()
    return z.detach().to(latents)


def decode_rgba(
    decoder: LatentTransparencyDecoder, decoded: torch.Tensor, latents: torch.Tensor, views: int = 8
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the VAE made of unscaled `latents` (N, C, H/8, W/8), in -1..1 -> straight colours and alpha in 0..1.

    Sides that the decoder cannot halve often enough are continued by their last row and column, equally on both sides
    as far as whole latents allow, and cut again.
    """
    pixels = (decoded / 2 + 0.5).clamp(0, 1).to(decoder.device, decoder.dtype)
    latents = latents.to(decoder.device, decoder.dtype)
    height, width = pixels.shape[-2:]
    factor, multiple = decoder.factor, max(decoder.multiple, decoder.factor)
    if (latents.shape[-2] * factor, latents.shape[-1] * factor) != (height, width):
        raise ConfigurationError(
            f"latents of {latents.shape[-1]}x{latents.shape[-2]} do not belong to an image of {width}x{height} pixels"
        )
    left, right = _margins(latents.shape[-1], multiple // factor)
    top, bottom = _margins(latents.shape[-2], multiple // factor)
    around = (left, right, top, bottom)
    if any(around):
        latents = F.pad(latents, around, mode="replicate")
        pixels = F.pad(pixels, tuple(side * factor for side in around), mode="replicate")
    # one image at a time: views are a batch already, and a full-size decoder needs the memory
    made = torch.cat(
        [decode_views(decoder, pixel[None], latent[None], views) for pixel, latent in zip(pixels, latents, strict=True)]
    )
    y, x = top * factor, left * factor
    made = made[..., y : y + height, x : x + width]
    return made[:, 1:].float(), made[:, :1].float()


def _margins(side: int, multiple: int) -> tuple[int, int]:
    """Latents to add before and behind `side` of them, so that the sum is a multiple."""
    missing = -side % multiple
    return missing // 2, missing - missing // 2
