"""The feature: task-routed channels at inference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from diffusion_accel.feature import Feature, option

from .recipe import KINDS, Recipe


@dataclass(frozen=True, kw_only=True)
class TaskRouting(Feature):
    """Let every noise level use its own window of the channels of each block.

    Of the C channels at the input of a block, int(beta C) neighbouring ones are active; the window starts at channel
    0 for t = 0 and ends at the last one for the noisiest step. Inactive channels pass by the block unchanged. Routing
    has no parameters and saves no work: it is a property of the weights, trained in. A model that was trained with it
    has the recipe in its config and switches it on by itself; without it, it draws badly.

    Source: Park et al., "Denoising Task Routing for Diffusion Models" (ICLR 2024), section 3.2; transformer blocks as
    in its figure 3, U-Nets at the inputs of residual blocks (its ADM variant).

    Attributes:
        beta: share of active channels, above 0, at most 1 (exact baseline). None: as trained; the paper's 0.8.
        alpha: how unevenly the window moves over the timesteps, above 0. None: as trained; the paper's 4.
        kind: "window", or the paper's baseline "random". None: as trained; "window".
        untrained: attach to a model that was trained without routing, or with another recipe. Its images get worse.

    Counters: `routed_blocks`, `active_share`.
    """

    name: ClassVar[str] = "task_routing"
    summary: ClassVar[str] = "task-routed channels, for models that were trained with them"
    paper: ClassVar[str] = "Denoising Task Routing (Park et al., ICLR 2024)"
    order: ClassVar[int] = 20
    runtime: ClassVar[str] = "diffusion_accel.routing.attachment"

    beta: float | None = option(None, "share of active channels, above 0, at most 1 (default: as trained; 0.8)", (0, 1))
    alpha: float | None = option(None, "how unevenly the window moves, above 0 (default: as trained; 4)", (0, 1_000))
    kind: str | None = option(None, f"{' or '.join(KINDS)} (default: as trained; window)")
    untrained: bool = option(False, "attach to a model that was trained without it: its images get worse")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.recipe(Recipe())

    @classmethod
    def neutral(cls) -> Self:
        """All channels are active: what the model draws without routing, bit by bit."""
        return cls(beta=1.0, untrained=True)

    def recipe(self, trained: Recipe) -> Recipe:
        """The recipe of this setting for a model with the recipe `trained`."""
        given = {"beta": self.beta, "alpha": self.alpha, "kind": self.kind}
        return Recipe(**{**trained.to_dict(), **{key: value for key, value in given.items() if value is not None}})
