"""Which channels a timestep uses: the masks of Denoising Task Routing, computed when they are needed, never stored.

Source: Park et al., "Denoising Task Routing for Diffusion Models" (ICLR 2024), section 3.2, equation 4.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from ..errors import ConfigurationError

KINDS = ("window", "random")
TIMES = ("index", "flow", "unit")


@dataclass(frozen=True)
class Recipe:
    """How a model's channels are routed; what is written into the config of a model that was trained with it.

    Attributes:
        beta: share of the channels that are active, above 0, at most 1. The paper's value is 0.8.
        alpha: how unevenly the window moves over the timesteps, above 0. The paper's value is 4: most of the movement
            is at high noise.
        kind: "window" (the paper's method) or "random" (its baseline: any channels, drawn for each timestep and block).
        tasks: number of timesteps the model was trained on.
        seed: of the random baseline.
        time: what the denoiser is told: "index" (0 ... tasks - 1), "flow" (1000 s, s in 0...1, as the flow-matching
            schedulers of diffusers give it) or "unit" (s itself, as Flux gets it).
    """

    beta: float = 0.8
    alpha: float = 4.0
    kind: str = "window"
    tasks: int = 1000
    seed: int = 0
    time: str = "index"

    def __post_init__(self) -> None:
        if not 0 < self.beta <= 1:
            raise ConfigurationError(f"the beta of task routing must be above 0 and at most 1, got {self.beta}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigurationError(f"the alpha of task routing must be above 0, got {self.alpha}")
        if self.kind not in KINDS:
            raise ConfigurationError(f"the kind of task routing must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.tasks < 2:
            raise ConfigurationError(f"task routing needs at least 2 timesteps, got {self.tasks}")
        if self.time not in TIMES:
            raise ConfigurationError(f"the time of task routing must be one of {', '.join(TIMES)}, got {self.time!r}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Recipe:
        """The inverse of `to_dict`. Raises `ConfigurationError` for what is not a recipe."""
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) - names:
            raise ConfigurationError(
                f"not a recipe of task routing: {values!r}; its keys are {', '.join(sorted(names))}"
            )
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigurationError(f"not a recipe of task routing: {values!r}") from error

    def positions(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Timesteps as the denoiser gets them -> 0 (no noise) ... 1, float64, same shape."""
        top = {"index": self.tasks - 1, "flow": 1000, "unit": 1}[self.time]
        return (timesteps.double() / top).clamp(0, 1)


def active_channels(channels: int, beta: float) -> int:
    """How many of `channels` are active: int(beta * channels), at least 1."""
    return max(1, int(beta * channels))


def offsets(positions: torch.Tensor, channels: int, recipe: Recipe) -> torch.Tensor:
    """The first active channel, round(position^alpha * (channels - active)): float64, the shape of `positions`."""
    return (positions**recipe.alpha * (channels - active_channels(channels, recipe.beta))).round()


def channel_mask(positions: torch.Tensor, channels: int, recipe: Recipe, block: int = 0) -> torch.Tensor:
    """Which channels are active: bool (N, channels) for positions (N,), `active_channels` of them in every row.

    `block` matters to the random baseline only; the window is the same in every block.
    """
    active = active_channels(channels, recipe.beta)
    index = torch.arange(channels, device=positions.device)
    if recipe.kind == "random":
        rank = _scores(positions, index, recipe, block).argsort(1).argsort(1)
        return rank < active
    first = offsets(positions, channels, recipe)[:, None]
    return (index >= first) & (index < first + active)


def _scores(positions: torch.Tensor, index: torch.Tensor, recipe: Recipe, block: int) -> torch.Tensor:
    """A hash of (seed, block, timestep, channel), int64 (N, channels): the same on every machine and device."""
    task = (positions * (recipe.tasks - 1)).round().long()
    value = (recipe.seed * 1_000_003 + block) * 1_000_003 + task
    mixed = value[:, None] * 2_654_435_761 + index * 40_503 + 12_345
    for multiplier in (0x45D9F3B, 0x45D9F3B, 0x119DE1F3):
        mixed = mixed & 0xFFFFFFFF
        mixed = ((mixed >> 16) ^ mixed) * multiplier
    return mixed & 0xFFFFFFFF
