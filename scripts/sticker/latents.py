"""Latents without a trained encoder: principal components of image patches, written into an AutoencoderKL.

An autoencoder trained from scratch on a CPU spends most of its time on finding a latent space. The principal components
of 8x8x3 patches, or of smaller ones, are a good one, known at once: the latents are fixed before any training, so the
decoder and the denoiser can train independently. `write_encoder` puts the projection into a genuine diffusers encoder,
so the result is an ordinary AutoencoderKL that loads, runs and trains like any other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from diffusion_accel.training.archives import on_colours
from diffusion_accel.training.arrays import load_tensors
from diffusion_accel.training.files import TrainingError, replacing, require

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

PATCH = 8  # pixels on a side of one latent, of the U-Net's model


@dataclass(frozen=True)
class PatchCodec:
    """A linear codec of square patches of P pixels on a side.

    Attributes:
        weight: (C, 3, P, P), the encoder: a convolution of stride P on images in -1..1.
        bias: (C,), so that latents have mean zero over the fitted images.
        inverse: (C, 3, P, P), the linear decoder: a transposed convolution of stride P.
        mean: (3, P, P), the mean patch, which the linear decoder adds.
        std: (C,), standard deviation of each latent channel over the fitted images.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    inverse: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    @property
    def patch(self) -> int:
        """Pixels on a side of one latent."""
        return self.weight.shape[-1]

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) in -1..1 -> latents (N, C, H/P, W/P)."""
        return F.conv2d(images, self.weight, self.bias, stride=self.patch)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The best linear reconstruction: latents (N, C, h, w) -> (N, 3, Ph, Pw); of stickers 24 dB with 12 channels
        of 8x8 patches, 27 dB with 8 of 4x4 ones."""
        mean = self.mean.repeat(1, *latents.shape[-2:])
        return F.conv_transpose2d(latents, self.inverse, stride=self.patch) + mean

    def save(self, path: Path) -> None:
        """Write the codec as a safetensors file."""
        with replacing(path) as temporary:
            save_file({name: value.contiguous() for name, value in vars(self).items()}, temporary)

    @classmethod
    def load(cls, path: Path) -> PatchCodec:
        """The codec in a file."""
        names = [field.name for field in fields(cls)]
        found = load_tensors(require(path, "latents"), *names)
        return cls(**{name: found[name] for name in names})


def fit_codec(images: torch.Tensor, channels: int, side: int = PATCH) -> PatchCodec:
    """Principal components of the `side` x `side` x 3 patches of `images` (N, 3, H, W) in -1..1.

    Each component is divided by the square root of its standard deviation, and all together are brought to a root mean
    square of 1: halfway between plain PCA, where the first channels dominate the loss, and whitening, where the noise
    in the last channels would count as much as the layout in the first. Signs are fixed, so that results are the same
    on every machine: the largest weight of a component is positive.
    """
    values = images.numpy()
    n, _, height, width = values.shape
    if height % side or width % side:
        raise TrainingError(f"image sides must be multiples of {side} pixels, got {height}x{width}")
    patches = values.reshape(n, 3, height // side, side, width // side, side).transpose(0, 2, 4, 1, 3, 5)
    patches = patches.reshape(-1, 3 * side * side)
    mean = patches.mean(0)
    patches = patches - mean
    variances, vectors = np.linalg.eigh(patches.T @ patches / len(patches))
    variances, vectors = variances[::-1][:channels], vectors[:, ::-1][:, :channels]
    if variances[-1] <= 1e-9:
        raise TrainingError(f"the images have fewer than {channels} independent patch components")
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(channels)])
    std = np.sqrt(variances)
    scale = 1 / np.sqrt(std)
    scale /= np.sqrt(np.mean((std * scale) ** 2))

    def tensor(value: np.ndarray, *shape: int) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(value, np.float32)).reshape(*shape)

    patch = (3, side, side)
    return PatchCodec(
        weight=tensor((vectors * scale).T, channels, *patch),
        bias=tensor(-mean @ (vectors * scale), channels),
        inverse=tensor((vectors / scale).T, channels, *patch),
        mean=tensor(mean, *patch),
        std=tensor(std * scale, channels),
    )


def encode_images(codec: PatchCodec, images: np.ndarray, indices: np.ndarray) -> torch.Tensor:
    """Latents (len(indices), C, h, w) of images of the cache on white."""
    batches = [indices[i : i + 64] for i in range(0, len(indices), 64)]
    return torch.cat([codec.encode(on_colours(images[batch])) for batch in batches])


@torch.no_grad()
def write_encoder(vae: AutoencoderKL, codec: PatchCodec, images: torch.Tensor) -> None:
    """Write the codec's convolution into the encoder of an AutoencoderKL with three or four levels, to about 0.1 %.

    The encoder computes a linear map although it is full of GroupNorm and SiLU:
    - residual blocks become identities (their second convolution is zero);
    - the stride-2 convolutions collect 2x2 blocks into channels; with four levels, after the second one a 4x4x3 patch
      (48 numbers) is projected to as many channels as there are (32) with the smallest error in the latents of
      `images`;
    - the last one computes every latent twice, as u and -u, and GroupNorm is held constant by large constant channels;
    - conv_out uses silu(u) - silu(-u) = u.
    All of it stays trainable.

    Args:
        vae: its first level has at least 12 channels, the last two have equally many; one layer per block, no attention
            in the middle.
        codec: the projection to write, with as many channels as the VAE has latent channels: of 4x4 patches for three
            levels, of 8x8 ones for four.
        images: (N, 3, H, W) in -1..1, examples for the projection to 32 channels.

    Raises:
        TrainingError: the VAE has another shape.
    """
    config, encoder, latents = vae.config, vae.encoder, len(codec.weight)
    widths, groups = list(config.block_out_channels), config.norm_num_groups
    pairs = -(-latents // groups)  # latents per normalization group of the last level
    constants = widths[-1] // groups - 2 * pairs  # channels left in each group
    constants -= constants % 2
    fits = (len(widths), codec.patch) in ((3, 4), (4, 8)) and widths[-2] == widths[-1] and widths[0] >= 12
    fits = fits and config.latent_channels == latents
    if not fits or constants < 4 or config.mid_block_add_attention or not config.use_quant_conv:
        raise TrainingError(f"the linear encoder cannot be written into a VAE of channels {widths}, {latents} latents")

    for block in [r for down in encoder.down_blocks for r in down.resnets] + list(encoder.mid_block.resnets):
        _zero(block.conv2)
        if block.conv_shortcut is not None:
            _zero(block.conv_shortcut)
            kept = range(min(block.conv_shortcut.weight.shape[:2]))
            block.conv_shortcut.weight[kept, kept, 0, 0] = 1
    first, *between, last = (down.downsamplers[0].conv for down in encoder.down_blocks[:-1])
    for conv in [first, *between, last, encoder.conv_in, encoder.conv_out]:
        _zero(conv)
    encoder.conv_in.weight[range(3), range(3), 1, 1] = 1
    for colour, y, x in np.ndindex(3, 2, 2):
        first.weight[colour * 4 + y * 2 + x, colour, y, x] = 1
    if between:
        middle, kernels = _best_projection(codec, images, min(widths[1], 4 * latents, 48))
        between[0].weight[: len(middle), :12, :2, :2] = middle.view(-1, 2, 2, 12).permute(0, 3, 1, 2).float()
    else:  # (C, colour, block y, pixel y, block x, pixel x) -> (block y, block x, C, colour and pixel)
        kernels = codec.weight.reshape(latents, 3, 2, 2, 2, 2).permute(2, 4, 0, 1, 3, 5).reshape(2, 2, latents, 12)

    group_width, large = widths[-1] // groups, 30.0
    for c in range(latents):
        u = (c // pairs) * group_width + 2 * (c % pairs)
        kernel = kernels[:, :, c].permute(2, 0, 1).float()
        for channel, sign in ((u, 1), (u + 1, -1)):
            last.weight[channel, : len(kernel), :2, :2] = sign * kernel
            last.bias[channel] = sign * codec.bias[c]
            encoder.conv_out.weight[c, channel, 1, 1] = sign
    for group in range(groups):
        start = group * group_width + 2 * pairs
        last.bias[start : start + constants : 2] = large
        last.bias[start + 1 : start + constants : 2] = -large
    encoder.conv_norm_out.weight.fill_(math.sqrt(constants / group_width) * large)  # undoes the normalization
    encoder.conv_norm_out.bias.zero_()

    every = range(latents)
    for conv in (vae.quant_conv, vae.post_quant_conv):
        _zero(conv)
        conv.weight[every, every, 0, 0] = 1
    vae.quant_conv.bias[latents:] = -8.0  # log variance: the posterior is next to a point


def _zero(conv: torch.nn.Module) -> None:
    for parameter in conv.parameters():
        parameter.zero_()


def _best_projection(codec: PatchCodec, images: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """4x4x3 patch -> `rank` numbers -> latents of 8x8 patches, with the smallest mean square error over `images`.

    Returns float64 tensors: the projection (rank, 48), its columns ordered (2x2 block, colour, pixel in the block), and
    (2, 2, C, rank), which rebuilds a latent from the projections of the four 4x4 patches of its 8x8 patch.
    """
    latents = len(codec.weight)
    # (C, colour, 4x4 patch y, block y, pixel y, 4x4 patch x, block x, pixel x)
    weight = codec.weight.double().reshape(latents, 3, 2, 2, 2, 2, 2, 2)
    target = weight.permute(2, 5, 0, 3, 6, 1, 4, 7).reshape(4 * latents, 48)
    n, _, height, width = images.shape
    blocks = images.double().reshape(n, 3, height // 4, 2, 2, width // 4, 2, 2)
    patches = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, 48)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T  # square root of the patches' second moment
    left = torch.linalg.svd(target @ root, full_matrices=False)[0][:, :rank]
    return left.T @ target, left.reshape(2, 2, latents, rank)
