"""Task routing on a pipeline: which models it fits, and its hooks for one call."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from torch import nn

from diffusion_accel.denoisers import find_denoisers, timestep_kind
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.feature import Attachment
from diffusion_accel.hooks import HookSet
from diffusion_accel.report import several

from .hooks import not_routable, route, trained_recipe
from .recipe import Recipe
from .task_routing import TaskRouting

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from diffusion_accel.steps import StepClock

logger = logging.getLogger(__name__)


def supports(feature: TaskRouting, pipeline: DiffusionPipeline) -> str | None:
    """Why this setting is not for a pipeline's denoisers, or None if it is."""
    denoisers = find_denoisers(pipeline)
    if not denoisers:
        return "the pipeline has no unet or transformer"
    return next(filter(None, (_why_not(feature, denoiser) for denoiser in denoisers)), None)


def _why_not(feature: TaskRouting, denoiser: nn.Module) -> str | None:
    reason = not_routable(denoiser)
    if reason:
        return reason
    try:
        trained = trained_recipe(denoiser)
    except ConfigurationError as error:
        return str(error)
    if feature.untrained:
        return None
    name = type(denoiser).__name__
    if trained is None:
        return (
            f"this {name} was trained without task routing, which would only spoil its images; "
            "untrained=true attaches it all the same"
        )
    if feature.recipe(trained) != trained:
        changed = {k: v for k, v in trained.to_dict().items() if feature.recipe(trained).to_dict()[k] != v}
        was = ", ".join(f"{k}={v}" for k, v in changed.items())
        return f"this {name} was trained with {was}; leave that out, or pass untrained=true"
    return None


def rows_apart(_feature: TaskRouting, _pipeline: DiffusionPipeline) -> bool:
    """A row's masks follow its own timestep."""
    return True


def attach(feature: TaskRouting, pipeline: DiffusionPipeline) -> TaskRoutingAttachment:
    """Attach the feature to a pipeline that it supports; warns if its models were trained otherwise."""
    return TaskRoutingAttachment(feature, pipeline)


class TaskRoutingAttachment(Attachment[TaskRouting]):
    """Task routing on one pipeline; its hooks live for one call."""

    def __init__(self, feature: TaskRouting, pipeline: DiffusionPipeline) -> None:
        super().__init__(feature, pipeline)
        self._counters: dict[str, float] = {}
        self._elsewhere = False  # the blocks are routed in the models that compute for this pipeline
        for denoiser in find_denoisers(pipeline):
            trained, recipe = trained_recipe(denoiser), self._recipe(denoiser)
            if recipe != trained and recipe.beta < 1:
                how = "without task routing" if trained is None else "with another task routing"
                logger.warning("task_routing: the model was trained %s, its images get worse", how)

    def _recipe(self, denoiser: nn.Module) -> Recipe:
        trained = trained_recipe(denoiser)
        return self.feature.recipe(trained or Recipe(time=timestep_kind(self.pipeline, denoiser)))

    def shared(self, pipeline: DiffusionPipeline) -> TaskRoutingAttachment:
        """The same for another pipeline, whose calls are computed with denoisers that are routed already."""
        other = super().shared(pipeline)
        other._elsewhere = True
        return other

    def before_call(self, _clock: StepClock) -> None:
        """Put the hooks on every denoiser, each with its own recipe."""
        if self._elsewhere:
            return
        reason = supports(self.feature, self.pipeline)  # the user may have replaced the denoiser since accelerate()
        if reason:
            raise ConfigurationError(f"task_routing cannot be used on this pipeline any more: {reason}")
        hooks = HookSet.within(self.changes, "diffusion_accel.task_routing")
        denoisers = find_denoisers(self.pipeline)
        recipes = [self._recipe(denoiser) for denoiser in denoisers]
        for denoiser, recipe in zip(denoisers, recipes, strict=True):
            route(denoiser, recipe, hooks)
        self._counters = {"routed_blocks": len(hooks) - len(denoisers), "active_share": recipes[0].beta}

    def counters(self) -> dict[str, float]:
        """How many blocks are routed, and the share of their channels that is active."""
        return dict(self._counters)

    def words(self) -> str:
        """The counters for people."""
        blocks, share = self._counters["routed_blocks"], self._counters["active_share"]
        return f"{several(blocks, 'block')} routed, with {share:.0%} of their channels active"
