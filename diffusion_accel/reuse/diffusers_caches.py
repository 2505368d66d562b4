"""Runs one of the caches that diffusers itself has for its transformers, for one call."""

from __future__ import annotations

import functools
from typing import Any

from diffusers.hooks import ModelHook

from ..denoisers import find_denoiser, residual_stream_blocks
from ..errors import UnsupportedPipelineError
from ..hooks import HookSet, tidy
from .cache_settings import CacheSettings


class CacheRun:
    """One of diffusers' caches during one call: enabled when the steps are known, removed without a trace after it."""

    def __init__(self, settings: CacheSettings, pipeline: Any, counters: dict[str, float]) -> None:
        denoiser = find_denoiser(pipeline)
        assert denoiser is not None
        self.settings, self.pipeline, self.counters = settings, pipeline, counters
        self.denoiser: Any = denoiser
        self.scheduler = pipeline.scheduler
        self._before: set[int] = set()
        self._counting = HookSet("diffusion_accel.reuse")
        counters.update(blocks_run=0, attentions_run=0)

    def install(self) -> None:
        """Wait for the pipeline to set its timesteps."""
        modules = list(self.denoiser.modules())
        self._before = {id(module) for module in modules if "_diffusers_hook" in module.__dict__}
        for module in residual_stream_blocks(self.denoiser):
            self._counting.add(module, CountHook(self.counters, "blocks_run"))
        for module in modules:
            if type(module).__name__.endswith("Attention"):
                self._counting.add(module, CountHook(self.counters, "attentions_run"))
        set_timesteps = self.scheduler.set_timesteps

        @functools.wraps(set_timesteps)
        def watched(*args: Any, **kwargs: Any) -> Any:
            result = set_timesteps(*args, **kwargs)
            self._enable(len(self.scheduler.timesteps))
            return result

        self.scheduler.set_timesteps = watched

    def _enable(self, steps: int) -> None:
        if self.denoiser.is_cache_enabled:
            self.denoiser.disable_cache()
        try:
            self.denoiser.enable_cache(self.settings.config(steps, self.pipeline))
        except (ValueError, AttributeError, ImportError) as error:
            text = str(error).strip().splitlines()[0]
            raise UnsupportedPipelineError(f"diffusers' cache {self.settings.name} cannot be used: {text}") from error

    def uninstall(self) -> None:
        """Disable the cache and remove what it and the counting left."""
        self.scheduler.__dict__.pop("set_timesteps", None)
        if self.denoiser.is_cache_enabled:
            self.denoiser.disable_cache()
        self._counting.remove()
        for module in self.denoiser.modules():
            tidy(module, keep_registry=id(module) in self._before)


class CountHook(ModelHook):
    """Counts how often a module is really computed: it is there before the cache's hooks, so they may skip it."""

    def __init__(self, counters: dict[str, float], name: str) -> None:
        super().__init__()
        self.counters, self.name = counters, name

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self.counters[self.name] += 1
        return args, kwargs
