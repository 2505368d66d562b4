"""What diffusers' caches are told of a denoiser's calls: which branch of guidance each is for, and at which step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffusers.hooks import ModelHook
from diffusers.models.cache_utils import CacheMixin

from diffusion_accel.diffusers_compat import registry_of
from diffusion_accel.prediction import Conversion

if TYPE_CHECKING:
    from torch import nn

    from diffusion_accel.steps import StepClock

BRANCHES = ("cond", "uncond")  # what diffusers' pipelines call the first and the second call at a step


class BranchHook(ModelHook):
    """On a denoiser with a cache, inside of the clock's hook, for one call of the pipeline.

    Each branch that is a call of its own has a cache of its own. Some caches ask the pipeline's `cache_context` which
    branch a call is for, and few pipelines say so; the others (Pyramid Attention Broadcast, FasterCache) ask nobody and
    would give one branch what they kept of the other.
    """

    def __init__(self, clock: StepClock) -> None:
        super().__init__()
        self.clock = clock
        self.conversion = Conversion(clock.scheduler)
        self.states: dict[Any, dict[int, Any]] = {}  # by a cache's hook and branch

    def new_forward(self, module: nn.Module, *args: object, **kwargs: object) -> Any:
        """The module's own forward, with the branch's state in each of the cache's hooks."""
        clock = self.clock
        for hook in [hook for part in module.modules() for hook in getattr(registry_of(part), "hooks", {}).values()]:
            if hasattr(hook, "state"):
                states = self.states.setdefault(hook, {0: hook.state})
                hook.state = states.setdefault(clock.call, type(hook.state)())
        place = {"step_index": clock.index, "num_inference_steps": clock.total, "sigma": self._sigma()}
        with CacheMixin.cache_context(module, BRANCHES[min(clock.call, 1)], **place):
            return self.fn_ref.original_forward(*args, **kwargs)

    def _sigma(self) -> float | None:
        """σ of the present step as flow matching has it, of (1 − σ) · x0 + σ · ε; None where it is not known."""
        if not self.conversion.possible:
            return None
        alpha, sigma = self.conversion.coefficients(self.clock.timesteps[self.clock.index])
        return sigma / (alpha + sigma)
