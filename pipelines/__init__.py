"""Wrapper pipelines: `AcceleratedPipeline`, named drop-ins such as `AcceleratedStableDiffusionXLPipeline`, and loading.

from diffusion_accel.pipelines import AcceleratedPipeline

pipe = AcceleratedPipeline.from_pretrained("sticker", encoder_reuse=True)
"""

from __future__ import annotations

from typing import Any

from diffusion_accel.mixin import AcceleratedMixin

from .accelerated import AcceleratedPipeline, named_drop_in

__all__ = ["AcceleratedMixin", "AcceleratedPipeline"]


def __getattr__(name: str) -> Any:
    if name.startswith("Accelerated"):
        return named_drop_in(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
