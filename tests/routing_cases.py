"""A tiny diffusion transformer, and the masks of every timestep."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
)
from zoo import seeded

from diffusion_accel.routing import Recipe
from diffusion_accel.routing.masks import channel_mask, positions

EVERY = torch.arange(1000)


def masks(channels: int, recipe: Recipe = Recipe(), timesteps: torch.Tensor = EVERY) -> torch.Tensor:  # noqa: B008
    return channel_mask(positions(timesteps, recipe), channels, recipe)


def tiny_dit(layers: int = 2) -> Any:
    return seeded(
        lambda: DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            num_layers=layers,
            sample_size=8,
            num_embeds_ada_norm=1000,  # DiTPipeline's empty class
        )
    )
