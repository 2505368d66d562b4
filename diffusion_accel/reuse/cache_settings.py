"""The caches that diffusers itself has for its transformers, by name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import shown

# name -> (what its numbers mean, the usual ones, the highest ones)
CACHES: dict[str, tuple[str, tuple[float, ...], tuple[float, ...]]] = {
    "first-block": ("threshold", (0.05,), (10.0,)),
    "taylorseer": ("interval,order", (5, 1), (1000, 4)),
    "mag": ("threshold,skips", (0.06, 3), (10.0, 1000)),
    "pab": ("range", (2,), (1000,)),
    "faster-cache": ("range,unconditional range", (2, 5), (1000, 1000)),
}
_NUMBER = r"([0-9]{0,4}(?:\.[0-9]{1,16})?)"
_TEXT = re.compile(rf"([a-z-]+)(?::{_NUMBER}(?:,{_NUMBER})?)?")


@dataclass(frozen=True)
class CacheSettings:
    """One of diffusers' caches: FirstBlockCache, TaylorSeer, MagCache, Pyramid Attention Broadcast or FasterCache."""

    name: str
    numbers: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> CacheSettings | None:
        """`NAME[:NUMBER[,NUMBER]]`; None if the name is not a cache's.

        Raises:
            ConfigurationError: the numbers are wrong.
        """
        if text.partition(":")[0] not in CACHES:
            return None
        match = _TEXT.fullmatch(text)
        name = text.partition(":")[0]
        meaning, usual, highest = CACHES[name]
        texts = [n for n in match.groups()[1:] if n is not None] if match else []
        given = tuple(float(n or 0) for n in texts)
        whole = [n for n, default in zip(given, usual, strict=False) if isinstance(default, int)]
        wrong = match is None or len(given) > len(usual) or any(n != int(n) for n in whole)
        if wrong or any(not 0 < n <= most for n, most in zip(given, highest, strict=False)):
            limits = " and ".join(f"{n:g}" for n in highest)
            raise ConfigurationError(
                f"{name} takes {name}:{meaning}, such as {name}:{usual[0]:g}, above 0 and at most {limits}; "
                f"got {shown(text)}"
            )
        return cls(name, (*given, *usual[len(given) :]))

    def supports(self, pipeline: Any, denoiser: Any) -> str | None:
        """Why diffusers' cache cannot be used; None if it can."""
        if not hasattr(denoiser, "enable_cache"):
            return f"{type(denoiser).__name__} has none of diffusers' caches; use hold:n or shallow:n,depth"
        if denoiser.is_cache_enabled:
            return "a cache is enabled on its transformer already; call disable_cache() first"
        if self.name == "mag" and not type(denoiser).__name__.startswith("Flux"):
            return "MagCache's ratios are known for Flux only"
        if self.name in ("pab", "faster-cache") and not hasattr(type(pipeline), "current_timestep"):
            return f"{self.name} needs the pipeline's current_timestep, which {type(pipeline).__name__} does not have"
        if self.name == "faster-cache":
            from diffusion_accel.denoisers import unlike_halves

            reason = unlike_halves(pipeline)
            return reason and f"FasterCache takes its batch for an unconditional and a conditional half, but {reason}"
        return None

    def config(self, steps: int, pipeline: Any, arguments: dict[str, Any]) -> Any:
        """The configuration that diffusers' `enable_cache` takes, for a call of `steps` steps with `arguments`."""
        import diffusers  # heavy: diffusers

        from diffusion_accel.diffusers_compat import current_timestep  # heavy: torch

        first, second = (*self.numbers, 0)[:2]
        if self.name == "first-block":
            return diffusers.FirstBlockCacheConfig(threshold=first)
        if self.name == "taylorseer":
            return diffusers.TaylorSeerCacheConfig(cache_interval=int(first), max_order=int(second))
        if self.name == "mag":
            from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

            return diffusers.MagCacheConfig(
                threshold=first, max_skip_steps=int(second), num_inference_steps=steps, mag_ratios=FLUX_MAG_RATIOS
            )
        now = {"current_timestep_callback": lambda: current_timestep(pipeline)}
        if self.name == "pab":
            return diffusers.PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=int(first), **now)
        from diffusion_accel.denoisers import family_of, guided

        halves = family_of(pipeline).branches is not None and guided(pipeline, arguments)
        return diffusers.FasterCacheConfig(
            spatial_attention_block_skip_range=int(first),
            unconditional_batch_skip_range=int(second),
            is_guidance_distilled=not halves,  # else rows of two images would be taken for the two branches
            **now,
        )
