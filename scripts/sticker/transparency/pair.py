"""Encoder and decoder around the frozen VAE, and the code of alpha that the encoder begins with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from diffusion_accel.training.files import UsageError
from diffusion_accel.training.state import STATE, load_average
from diffusion_accel.transparency.modules import LatentTransparencyDecoder, LatentTransparencyEncoder
from diffusion_accel.transparency.rgba import on_grey
from diffusion_accel.transparency.weights import load_part
from sticker.latents import PATCH

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

ENCODER: dict[str, Any] = {
    "block_out_channels": (16, 32, 64, 128),
    "offset_scale": 15.0,
    "recommended_refinement": 16,
}
DECODER: dict[str, Any] = {
    "block_out_channels": (16, 16, 32, 64, 96),
    "attention_levels": 2,
    "layers_per_block": 1,
    "recommended_views": 1,
}

STAGES = ("encoder", "decoder", "joint", "refine")  # that train the pair; each begins with what the one before left
COMPONENTS = 6  # of the 8x8 patches of alpha, in the code that the encoder begins with
SHARPEN = 0.22  # alpha below this is clear, alpha above 1 - this is opaque, in what is exported
AMPLITUDE = 0.17  # of the code, in latents, which have unit RMS


class Pair(nn.Module):
    """Encoder and decoder, with the frozen VAE between them (whose weights are not part of the state)."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        channels = {"latent_channels": vae.config.latent_channels}
        self.encoder = LatentTransparencyEncoder(**ENCODER, **channels)
        self.decoder = LatentTransparencyDecoder(**DECODER, **channels).to(memory_format=torch.channels_last)
        self._vae = [vae.requires_grad_(False).eval().to(memory_format=torch.channels_last)]

    @property
    def vae(self) -> AutoencoderKL:
        """The frozen VAE."""
        return self._vae[0]

    def encode(self, rgb: torch.Tensor, alpha: torch.Tensor, padded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The VAE's latents of the image over grey, and what the encoder adds to them."""
        with torch.no_grad():
            known = self.vae.encode(on_grey(rgb, alpha)).latent_dist
        return known.mean, known.std * self.encoder(torch.cat([alpha, padded], 1))

    def forward(
        self, rgb: torch.Tensor, alpha: torch.Tensor, padded: torch.Tensor, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """-> (the VAE's RGB in -1..1, what the encoder adds, and, given latent noise, [alpha, colours] as read)."""
        mean, offset = self.encode(rgb, alpha, padded)
        z = mean + offset if noise is None else mean + offset + noise
        with torch.set_grad_enabled(torch.is_grad_enabled() and offset.requires_grad):
            decoded = self.vae.decode(z.contiguous(memory_format=torch.channels_last)).sample
        made = None if noise is None else self.decoder((decoded / 2 + 0.5).clamp(0, 1), z)
        return decoded, offset, made


def load_pair(work: Path, pair: Pair, stages: tuple[str, ...], start: Path | None = None) -> None:
    """Load what the last of `stages` that has run has left, else the weights in the folder `start`.

    Raises:
        UsageError: none has run and there is no `start`, or its networks have other sizes.
    """
    done = [stage for stage in stages if (work / "transparency" / stage / STATE).is_file()]
    if done or start is None:
        stage = (done or list(stages[:1]))[-1]
        load_average(work / "transparency" / stage, pair, stage)
        return
    for name, part in pair.named_children():
        try:
            part.load_state_dict(load_part(start / name, type(part)).state_dict())
        except RuntimeError as error:
            raise UsageError(f"the {name} in {start} has other sizes than the one that is trained here") from error
    soften(pair.decoder)


@torch.no_grad()
def sharpen(decoder: LatentTransparencyDecoder) -> None:
    """Fold (alpha - low) / (high - low) into the last layer: an edge that is uncertain becomes narrower."""
    decoder.conv_out.weight[0] /= 1 - 2 * SHARPEN
    decoder.conv_out.bias[0] = (decoder.conv_out.bias[0] - SHARPEN) / (1 - 2 * SHARPEN)


@torch.no_grad()
def soften(decoder: LatentTransparencyDecoder) -> None:
    """Undo `sharpen`: what was exported is trained on, and exported again."""
    decoder.conv_out.weight[0] *= 1 - 2 * SHARPEN
    decoder.conv_out.bias[0] = decoder.conv_out.bias[0] * (1 - 2 * SHARPEN) + SHARPEN


@torch.no_grad()
def alpha_code(vae: AutoencoderKL, images: torch.Tensor, alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A linear code of alpha in latents that the VAE's decoder hardly notices: kernel (C, 1, 8, 8) and bias (C,).

    The first principal components of the 8x8 patches of alpha lie along the directions of the latents to which the
    decoder is least sensitive, the largest along the least; a component of deviation d has the deviation
    `AMPLITUDE` sqrt(d) in the latents.
    """
    z = vae.encode(images).latent_dist.mean
    moves = torch.eye(z.shape[1]).to(z)[:, None, :, None, None] * 0.2
    slopes = torch.stack([(vae.decode(z + move).sample - vae.decode(z - move).sample).flatten() for move in moves])
    directions = torch.linalg.eigh(slopes @ slopes.T).eigenvectors[:, :COMPONENTS]
    patches = F.unfold(alpha, PATCH, stride=PATCH).transpose(1, 2).reshape(-1, PATCH * PATCH)
    mean = patches.mean(0)
    variances, components = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    components, deviations = components.flip(1)[:, :COMPONENTS], variances.flip(0)[:COMPONENTS].sqrt()
    kernel = directions @ (AMPLITUDE * deviations**-0.5 * components).T
    return kernel.view(-1, 1, PATCH, PATCH), -kernel @ mean
