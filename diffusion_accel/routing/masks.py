"""Which channels a timestep uses: the masks of Denoising Task Routing, computed when they are needed, never stored.

Source: Park et al., "Denoising Task Routing for Diffusion Models" (ICLR 2024), section 3.2, equation 4.
"""

from __future__ import annotations

import torch

from .recipe import Recipe


def positions(timesteps: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Timesteps as the denoiser gets them -> 0 (no noise) ... 1, float64, same shape."""
    return (timesteps.double() / _top(recipe)).clamp(0, 1)


def position(timestep: float, recipe: Recipe) -> float:
    """The same for one timestep that is known on the host."""
    return min(1.0, max(0.0, timestep / _top(recipe)))


def _top(recipe: Recipe) -> int:
    return {"index": recipe.tasks - 1, "flow": 1000, "unit": 1}[recipe.time]


def active_channels(channels: int, beta: float) -> int:
    """How many of `channels` are active: int(beta * channels), at least 1."""
    return max(1, int(beta * channels))


def offsets(where: torch.Tensor, channels: int, recipe: Recipe) -> torch.Tensor:
    """The first active channel, round(position^alpha * (channels - active)): float64, the shape of `where`."""
    return (where**recipe.alpha * (channels - active_channels(channels, recipe.beta))).round()


def channel_mask(where: torch.Tensor, channels: int, recipe: Recipe, block: int = 0) -> torch.Tensor:
    """Which channels are active: bool (N, channels) for positions `where` (N,), `active_channels` of them in every row.

    `block` matters to the random baseline only; the window is the same in every block.
    """
    active = active_channels(channels, recipe.beta)
    index = torch.arange(channels, device=where.device)
    if recipe.kind == "random":
        rank = _scores(where, index, recipe, block).argsort(1).argsort(1)
        return rank < active
    first = offsets(where, channels, recipe)[:, None]
    return (index >= first) & (index < first + active)


def window(position: float, channels: int, recipe: Recipe) -> tuple[int, int]:
    """The first active channel and the first one behind the window, for one position that is known on the host."""
    active = active_channels(channels, recipe.beta)
    first = round(position**recipe.alpha * (channels - active))
    return first, first + active


def _scores(where: torch.Tensor, index: torch.Tensor, recipe: Recipe, block: int) -> torch.Tensor:
    """A hash of (seed, block, timestep, channel), int64 (N, channels): the same on every machine and device."""
    task = (where * (recipe.tasks - 1)).round().long()
    value = (recipe.seed * 1_000_003 + block) * 1_000_003 + task
    mixed = value[:, None] * 2_654_435_761 + index * 40_503 + 12_345
    for multiplier in (0x45D9F3B, 0x45D9F3B, 0x119DE1F3):
        mixed = mixed & 0xFFFFFFFF
        mixed = ((mixed >> 16) ^ mixed) * multiplier
    return mixed & 0xFFFFFFFF
