"""Models of published shapes with random weights, for what depends on the shape alone: times, sizes, memory."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel


def sd15_unet(seed: int = 0) -> UNet2DConditionModel:
    """The U-Net of Stable Diffusion 1.5: 860 million parameters, for latents of 64x64; the same numbers for a seed."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(cross_attention_dim=768, sample_size=64).eval()
