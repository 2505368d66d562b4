"""The layers that one image is drawn as, with `LatentTransparency`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from diffusion_accel.feature import Feature
from diffusion_accel.transparency.latent_transparency import LAYERS, LatentTransparency

if TYPE_CHECKING:
    from PIL import Image


def drawn_layers(features: Mapping[str, Feature]) -> tuple[str, ...]:
    """The layers that one image is drawn as, by name; ("",) without transparency."""
    feature = features.get("transparent")
    return LAYERS[feature.variant] if isinstance(feature, LatentTransparency) and feature.views != 0 else ("",)


def by_image(images: list[Image.Image], layers: tuple[str, ...]) -> list[dict[str, Image.Image]]:
    """What one call drew, for each seed its layers by name."""
    return [
        dict(zip(layers, images[start : start + len(layers)], strict=True))
        for start in range(0, len(images), len(layers))
    ]
