"""Runs one of the caches that diffusers itself has for its transformers, for one call."""

from __future__ import annotations

import functools
from typing import Any

from diffusers.hooks import ModelHook

from diffusion_accel.changes import Changes
from diffusion_accel.denoisers import find_denoisers, residual_stream_blocks
from diffusion_accel.diffusers_compat import forget, registry_of
from diffusion_accel.errors import UnsupportedPipelineError
from diffusion_accel.hooks import HookSet, tidy
from diffusion_accel.io import first_line

from .cache_settings import CacheSettings


class CacheRun:
    """One of diffusers' caches during one call: enabled when the steps are known, removed without a trace after it."""

    def __init__(
        self, settings: CacheSettings, pipeline: Any, counters: dict[str, float], arguments: dict[str, Any]
    ) -> None:
        self.settings, self.pipeline, self.counters, self.arguments = settings, pipeline, counters, arguments
        self.denoisers: list[Any] = find_denoisers(pipeline)
        self.scheduler = pipeline.scheduler
        self.changes = Changes()
        self._before: set[int] = set()
        counters.update(blocks_run=0, attentions_run=0)

    def install(self) -> None:
        """Wait for the pipeline to set its timesteps."""
        self._before = {id(m) for d in self.denoisers for m in d.modules() if registry_of(m) is not None}
        counting = HookSet.within(self.changes, "diffusion_accel.reuse")
        self.changes.add(self._remove_caches)
        for denoiser in self.denoisers:
            for module in residual_stream_blocks(denoiser):
                counting.add(module, CountHook(self.counters, "blocks_run"))
            for module in denoiser.modules():
                if type(module).__name__.endswith("Attention"):
                    counting.add(module, CountHook(self.counters, "attentions_run"))
        set_timesteps = self.scheduler.set_timesteps

        @functools.wraps(set_timesteps)
        def watched(*args: Any, **kwargs: Any) -> Any:
            result = set_timesteps(*args, **kwargs)
            for denoiser in self.denoisers:
                self._enable(denoiser, len(self.scheduler.timesteps))
            return result

        self.changes.set(self.scheduler, "set_timesteps", watched)

    def _enable(self, denoiser: Any, steps: int) -> None:
        if denoiser.is_cache_enabled:
            denoiser.disable_cache()
        try:
            denoiser.enable_cache(self.settings.config(steps, self.pipeline, self.arguments))
        except (ValueError, AttributeError, ImportError) as error:
            text = first_line(error)
            raise UnsupportedPipelineError(f"diffusers' cache {self.settings.name} cannot be used: {text}") from error

    def uninstall(self) -> None:
        """Disable the cache and remove what it and the counting left."""
        self.changes.undo()

    def _remove_caches(self) -> None:
        for denoiser in self.denoisers:
            registries = [registry for m in denoiser.modules() if (registry := registry_of(m)) is not None]
            hooks = [(registry, dict(registry.hooks)) for registry in registries]
            if denoiser.is_cache_enabled:
                denoiser.disable_cache()
            for registry, before in hooks:
                for name in before.keys() - registry.hooks.keys():
                    forget(before[name])
            for module in denoiser.modules():
                tidy(module, keep_registry=id(module) in self._before)


class CountHook(ModelHook):
    """Counts how often a module is really computed: it is there before the cache's hooks, so they may skip it."""

    def __init__(self, counters: dict[str, float], name: str) -> None:
        super().__init__()
        self.counters, self.name = counters, name

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self.counters[self.name] += 1
        return args, kwargs
