"""The feature: task-routed channels at inference."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.feature import Attachment, Feature, option
from diffusion_accel.hooks import HookSet

from .recipe import KINDS, Recipe

if TYPE_CHECKING:
    from diffusion_accel.steps import StepClock

logger = logging.getLogger(__name__)


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

    beta: float | None = option(None, "share of active channels, above 0, at most 1 (default: as trained; 0.8)", (0, 1))
    alpha: float | None = option(None, "how unevenly the window moves, above 0 (default: as trained; 4)", (0, 1_000))
    kind: str | None = option(None, f"{' or '.join(KINDS)} (default: as trained; window)")
    untrained: bool = option(False, "attach to a model that was trained without it: its images get worse")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.recipe(Recipe())

    @classmethod
    def neutral(cls) -> Self:
        return cls(beta=1.0, untrained=True)

    def recipe(self, trained: Recipe) -> Recipe:
        """The recipe of this setting for a model with the recipe `trained`."""
        given = {"beta": self.beta, "alpha": self.alpha, "kind": self.kind}
        return Recipe(**{**trained.to_dict(), **{key: value for key, value in given.items() if value is not None}})

    def supports(self, pipeline: Any) -> str | None:
        from diffusion_accel.denoisers import find_denoisers

        denoisers = find_denoisers(pipeline)
        if not denoisers:
            return "the pipeline has no unet or transformer"
        return next(filter(None, map(self._why_not, denoisers)), None)

    def _why_not(self, denoiser: Any) -> str | None:
        from .hooks import not_routable, trained_recipe

        reason = not_routable(denoiser)
        if reason:
            return reason
        try:
            trained = trained_recipe(denoiser)
        except ConfigurationError as error:
            return str(error)
        if self.untrained:
            return None
        name = type(denoiser).__name__
        if trained is None:
            return (
                f"this {name} was trained without task routing, which would only spoil its images; "
                "untrained=true attaches it all the same"
            )
        if self.recipe(trained) != trained:
            changed = {k: v for k, v in trained.to_dict().items() if self.recipe(trained).to_dict()[k] != v}
            was = ", ".join(f"{k}={v}" for k, v in changed.items())
            return f"this {name} was trained with {was}; leave that out, or pass untrained=true"
        return None

    def attach(self, pipeline: Any) -> Attachment:
        return TaskRoutingAttachment(self, pipeline)


class TaskRoutingAttachment(Attachment):
    """Task routing on one pipeline; its hooks live for one call."""

    def __init__(self, feature: TaskRouting, pipeline: Any) -> None:
        from diffusion_accel.denoisers import find_denoisers

        from .hooks import trained_recipe

        super().__init__(feature, pipeline)
        self._counters: dict[str, float] = {}
        for denoiser in find_denoisers(pipeline):
            trained, recipe = trained_recipe(denoiser), self._recipe(denoiser)
            if recipe != trained and recipe.beta < 1:
                how = "without task routing" if trained is None else "with another task routing"
                logger.warning("task_routing: the model was trained %s, its images get worse", how)

    def _recipe(self, denoiser: Any) -> Recipe:
        from diffusion_accel.denoisers import timestep_kind

        from .hooks import trained_recipe

        feature: TaskRouting = self.feature  # type: ignore[assignment]
        trained = trained_recipe(denoiser)
        return feature.recipe(trained or Recipe(time=timestep_kind(self.pipeline, denoiser)))

    def before_call(self, clock: StepClock) -> None:
        from diffusion_accel.denoisers import find_denoisers

        from .hooks import route

        feature: TaskRouting = self.feature  # type: ignore[assignment]
        reason = feature.supports(self.pipeline)  # the user may have replaced the denoiser since accelerate()
        if reason:
            raise ConfigurationError(f"task_routing cannot be used on this pipeline any more: {reason}")
        hooks = HookSet.within(self.changes, "diffusion_accel.task_routing")
        denoisers = find_denoisers(self.pipeline)
        recipes = [self._recipe(denoiser) for denoiser in denoisers]
        for denoiser, recipe in zip(denoisers, recipes, strict=True):
            route(denoiser, recipe, hooks)
        self._counters = {"routed_blocks": len(hooks) - len(denoisers), "active_share": recipes[0].beta}

    def counters(self) -> dict[str, float]:
        return dict(self._counters)
