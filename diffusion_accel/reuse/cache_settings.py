"""The caches that diffusers itself has for its transformers, by name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigurationError

# name -> (what its numbers mean, how many it takes at most, the usual ones)
CACHES: dict[str, tuple[str, int, tuple[float, ...]]] = {
    "first-block": ("threshold", 1, (0.05,)),
    "taylorseer": ("interval,order", 2, (5, 1)),
    "mag": ("threshold,skips", 2, (0.06, 3)),
    "pab": ("range", 1, (2,)),
    "faster-cache": ("range,unconditional range", 2, (2, 5)),
}
_TEXT = re.compile(r"([a-z-]+)(?::(\d*\.?\d+)(?:,(\d*\.?\d+))?)?")


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
        meaning, most, usual = CACHES[name]
        given = tuple(float(n) for n in match.groups()[1:] if n is not None) if match else ()
        whole = [n for n, default in zip(given, usual, strict=False) if isinstance(default, int)]
        if match is None or len(given) > most or any(n != int(n) or n < 1 for n in whole) or 0 in given:
            raise ConfigurationError(f"{name} takes {name}:{meaning}, such as {name}:{usual[0]:g}; got {text!r}")
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
            from ..families import unlike_halves

            reason = unlike_halves(pipeline)
            return reason and f"FasterCache takes its batch for an unconditional and a conditional half, but {reason}"
        return None

    def config(self, steps: int, pipeline: Any, arguments: dict[str, Any]) -> Any:
        """The configuration that diffusers' `enable_cache` takes, for a call of `steps` steps with `arguments`."""
        import diffusers

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
        now = {"current_timestep_callback": lambda: pipeline._current_timestep or pipeline.current_timestep}
        if self.name == "pab":
            return diffusers.PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=int(first), **now)
        from ..families import family_of, guided

        halves = family_of(pipeline).branches is not None and guided(pipeline, arguments)
        return diffusers.FasterCacheConfig(
            spatial_attention_block_skip_range=int(first),
            unconditional_batch_skip_range=int(second),
            is_guidance_distilled=not halves,  # else rows of two images would be taken for the two branches
            **now,
        )
