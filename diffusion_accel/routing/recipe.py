"""The recipe of task routing: what a model that was trained with it remembers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import shown

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
            raise ConfigurationError(
                f"the kind of task routing must be one of {', '.join(KINDS)}, got {shown(self.kind)}"
            )
        if self.tasks < 2:
            raise ConfigurationError(f"task routing needs at least 2 timesteps, got {self.tasks}")
        if self.time not in TIMES:
            raise ConfigurationError(
                f"the time of task routing must be one of {', '.join(TIMES)}, got {shown(self.time)}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON values: what a model's config keeps."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Recipe:
        """The inverse of `to_dict`. Raises `ConfigurationError` for what is not a recipe."""
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) - names:
            raise ConfigurationError(
                f"not a recipe of task routing: {shown(values)}; its keys are {', '.join(sorted(names))}"
            )
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigurationError(f"not a recipe of task routing: {shown(values)}") from error
