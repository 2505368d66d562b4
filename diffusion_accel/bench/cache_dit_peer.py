"""cache-dit's DBCache, by its own package."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffusion_accel.denoisers import find_denoisers, not_a_unet

from .cache_peers import layout_of
from .peers import Call, Settings

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from .runner import Runner


def unfit(_kind: str, pipe: DiffusionPipeline) -> str | None:
    """That a pipeline has no transformer; None if it has one. Which ones its package knows it says itself."""
    if any(not_a_unet(denoiser) is None for denoiser in find_denoisers(pipe)) or not find_denoisers(pipe):
        return f"cache-dit is for transformers, and {type(pipe).__name__} has none"
    return None


def dbcache(settings: Settings, runner: Runner) -> Call:
    """DBCache of cache-dit (vipshop): the first blocks decide whether the middle ones are computed.

    `threshold`: of the relative change of what the `first` blocks add; `last`: blocks that are always computed at the
    end; `warmup`: steps computed at the beginning; `skips`: most that are left out in a row (-1: any); `order`: of
    TaylorSeer for what is left out (0: what it was last). The usual number of first blocks is 1 here; cache-dit's own
    is 8, for models of dozens of blocks.
    """
    import cache_dit  # optional package

    config = cache_dit.DBCacheConfig(
        residual_diff_threshold=settings["threshold"],
        Fn_compute_blocks=settings["first"],
        Bn_compute_blocks=settings["last"],
        max_warmup_steps=settings["warmup"],
        max_continuous_cached_steps=settings["skips"],
        enable_separate_cfg=layout_of(runner).calls > 1,
    )
    order = settings["order"]
    forecasts = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=order) if order else None
    cache_dit.enable_cache(runner.pipe, cache_config=config, calibrator_config=forecasts)
    return runner.pipe
