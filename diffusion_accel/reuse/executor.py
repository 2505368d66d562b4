"""The executor of reuse plans: puts the hooks that follow a plan on the denoisers, for one pipeline call.

Below it lie the state that they share (`state`), the hooks on the denoiser as a whole (`denoiser_hook`), those on the
parts of U-Nets and of transformers (`unet_hooks`, `block_hooks`), and what acts at the scheduler (`fitted_steps`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from diffusion_accel.denoisers import called_denoisers, find_controlnet
from diffusion_accel.hooks import model_of
from diffusion_accel.steps import StepClock

from . import block_hooks, unet_hooks
from .denoiser_hook import ControlNetHook, DenoiserHook
from .fitted_steps import FittedSteps
from .plan import Kinds, Plan
from .state import ReuseState

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

_COUNTERS = ("encoder_runs", "decoder_runs", "decoder_steps", "full_steps", "reused_steps", "peak_cache_bytes")


class ReuseRun:
    """A plan in force during one call of a pipeline.

    Args:
        name: of the feature.
        pipeline: the pipeline that is called.
        clock: says which step a call of the denoiser is.
        counters: what was done is counted here.
        kinds: a step of every kind that the plans of `plan_for` may have.
        plan_for: makes the plan for a number of steps, as soon as it is known.
        batch_decoder: decode all steps up to the next full one in one batch, where that is possible.
        max_group_mb: MiB that the features of one such batch may take.
    """

    def __init__(
        self,
        name: str,
        pipeline: DiffusionPipeline,
        clock: StepClock,
        counters: dict[str, float],
        kinds: Kinds,
        plan_for: Callable[[int], Plan],
        batch_decoder: bool = True,
        max_group_mb: int = 1024,
    ) -> None:
        self.name, self.pipeline = name, pipeline
        self.controlnet = find_controlnet(pipeline)
        self.state = ReuseState(name, pipeline, clock, counters, kinds, plan_for, batch_decoder, max_group_mb)
        counters.update(dict.fromkeys(_COUNTERS, 0))
        if self.controlnet is not None:
            counters.update(controlnet_runs=0, controlnet_skipped=0)

    def install(self) -> None:
        """Put the hooks on the denoisers, on their parts that the plan skips or keeps, and on the ControlNet."""
        state, parts = self.state, unet_hooks if self.state.unet else block_hooks
        for denoiser in called_denoisers(self.pipeline):
            parts.install_parts(state, model_of(denoiser))
            state.hooks.add(denoiser, DenoiserHook(state))
        if self.controlnet is not None:
            state.hooks.add(self.controlnet, ControlNetHook(state))
        if state.kinds.fitted:
            state.clock.on_step(before=FittedSteps(state))

    def uninstall(self) -> None:
        """Remove the hooks and free every kept tensor."""
        state = self.state
        state.hooks.remove()
        planned = any(step.mode != "full" for step in state.plan.steps)
        many = state.counters["decoder_runs"] > 2 and state.clock.steps != 1
        if planned and many and not state.counters["reused_steps"]:
            cause = "calls its denoiser in a way that cannot be followed (each call counts as a first one)"
            if len(called_denoisers(self.pipeline)) > 1:
                cause = "has two denoisers, and the first step of each is computed: use more steps"
            logger.warning(
                "%s: every step was computed, none was reused: %s %s", self.name, type(self.pipeline).__name__, cause
            )
        state.clear()
