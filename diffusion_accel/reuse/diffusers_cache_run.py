"""Runs one of the caches that diffusers itself has for its transformers, for one call."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import diffusers
from diffusers.hooks import ModelHook, mag_cache
from torch import nn

from diffusion_accel.changes import Changes
from diffusion_accel.denoisers import (
    attentions,
    family_of,
    find_denoisers,
    guided,
    model_family,
    residual_stream_blocks,
    unlike_halves,
)
from diffusion_accel.diffusers_compat import current_timestep, forget, registry_of, taylorseer_finds
from diffusion_accel.errors import UnsupportedPipelineError
from diffusion_accel.hooks import HookSet, tidy
from diffusion_accel.io import first_line

from . import needs
from .cache_branches import BranchHook
from .diffusers_cache import DiffusersCache

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin

    from diffusion_accel.steps import StepClock


def supports(cache: DiffusersCache, pipe: DiffusionPipeline) -> str | None:
    """Why a pipeline cannot use one of diffusers' caches; None if it can."""
    reasons = (_unmet_need(cache, pipe, denoiser) for denoiser in find_denoisers(pipe))
    return needs.unfollowable(pipe) or next(filter(None, reasons), None)


def _unmet_need(cache: DiffusersCache, pipe: DiffusionPipeline, denoiser: ModelMixin) -> str | None:
    kind = type(denoiser).__name__
    if not hasattr(denoiser, "enable_cache"):
        return f"{kind} has none of diffusers' caches; use hold:n or shallow:n,depth"
    if denoiser.is_cache_enabled:
        return "a cache is enabled on its transformer already; call disable_cache() first"
    family = model_family(type(denoiser))
    if cache.name == "mag" and (family is None or not family.mag_cache):
        return "MagCache's ratios are known for Flux only"
    if cache.name == "taylorseer" and not taylorseer_finds(denoiser):
        return f"TaylorSeer of diffusers finds no attention in {kind} by its name; use hold:n or shallow:n,depth"
    if cache.name in ("pab", "faster-cache") and not hasattr(type(pipe), "current_timestep"):
        return f"{cache.name} needs the pipeline's current_timestep, which {type(pipe).__name__} does not have"
    if cache.name == "faster-cache" and (reason := unlike_halves(pipe)):
        return f"FasterCache takes its batch for an unconditional and a conditional half, but {reason}"
    return None


def cache_config(cache: DiffusersCache, steps: int, pipe: DiffusionPipeline, arguments: dict[str, Any]) -> Any:
    """The configuration that diffusers' `enable_cache` takes, for a call of `steps` steps with `arguments`."""
    first, second = (*cache.numbers, 0)[:2]
    if cache.name == "first-block":
        return diffusers.FirstBlockCacheConfig(threshold=first)
    if cache.name == "taylorseer":
        return diffusers.TaylorSeerCacheConfig(cache_interval=int(first), max_order=int(second))
    if cache.name == "mag":
        return diffusers.MagCacheConfig(
            threshold=first,
            max_skip_steps=int(second),
            num_inference_steps=steps,
            mag_ratios=mag_cache.FLUX_MAG_RATIOS,
        )
    now = {"current_timestep_callback": lambda: current_timestep(pipe)}
    if cache.name == "pab":
        return diffusers.PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=int(first), **now)
    halves = family_of(pipe).branches is not None and guided(pipe, arguments)
    return diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=int(first),
        unconditional_batch_skip_range=int(second),
        is_guidance_distilled=not halves,  # else rows of two images would be taken for the two branches
        **now,
    )


class CacheRun:
    """One of diffusers' caches during one call: enabled when the steps are known, removed without a trace after it."""

    def __init__(
        self, cache: DiffusersCache, pipeline: DiffusionPipeline, counters: dict[str, float], clock: StepClock
    ) -> None:
        self.cache, self.pipeline, self.counters, self.clock = cache, pipeline, counters, clock
        self.denoisers: list[Any] = find_denoisers(pipeline)
        self.scheduler = pipeline.scheduler
        self.changes = Changes()
        self._before: set[int] = set()
        counters.update(blocks_run=0, attentions_run=0)

    def install(self) -> None:
        """Wait for the pipeline to set its timesteps."""
        self._before = {id(m) for d in self.denoisers for m in d.modules() if registry_of(m) is not None}
        self.changes.add(self._remove_caches)
        hooks = HookSet.within(self.changes, "diffusion_accel.reuse")
        for denoiser in self.denoisers:
            hooks.add(denoiser, BranchHook(self.clock))
            for module in residual_stream_blocks(denoiser):
                hooks.add(module, CountHook(self.counters, "blocks_run"))
            for module in attentions(denoiser):
                hooks.add(module, CountHook(self.counters, "attentions_run"))
        set_timesteps = self.scheduler.set_timesteps

        @functools.wraps(set_timesteps)
        def watched(*args: object, **kwargs: object) -> Any:
            result = set_timesteps(*args, **kwargs)
            for denoiser in self.denoisers:
                self._enable(denoiser, len(self.scheduler.timesteps))
            return result

        self.changes.set(self.scheduler, "set_timesteps", watched)

    def _enable(self, denoiser: ModelMixin, steps: int) -> None:
        if denoiser.is_cache_enabled:
            denoiser.disable_cache()
        try:
            denoiser.enable_cache(cache_config(self.cache, steps, self.pipeline, self.clock.arguments))
        except (ValueError, AttributeError, ImportError) as error:
            text = first_line(error)
            raise UnsupportedPipelineError(f"diffusers' cache {self.cache.name} cannot be used: {text}") from error

    def uninstall(self) -> None:
        """Disable the cache and remove what it and the hooks left."""
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

    def pre_forward(self, _module: nn.Module, *args: object, **kwargs: object) -> Any:
        """Count; what the module is given stays as it is."""
        self.counters[self.name] += 1
        return args, kwargs
