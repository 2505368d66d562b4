"""Images with transparency over something: a colour, another image, a checkerboard."""

from __future__ import annotations

import numpy as np
from PIL import Image


def over(image: Image.Image, background: Image.Image | tuple[int, ...]) -> Image.Image:
    """An RGBA image over a colour or another image (resized to it), as RGB."""
    if isinstance(background, Image.Image):
        ground = background.convert("RGBA").resize(image.size, Image.Resampling.LANCZOS)
    else:
        ground = Image.new("RGBA", image.size, (*background[:3], 255))
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


def checkerboard(size: tuple[int, int], low: int = 115, high: int = 140) -> Image.Image:
    """Fields of two greys: 64 pixels on a side, or an eighth of a small image's."""
    width, height = size
    side = max(1, min(64, min(size) // 8))
    odd = (np.arange(height)[:, None] // side + np.arange(width) // side) % 2
    return Image.fromarray(np.where(odd, high, low).astype(np.uint8)).convert("RGB")


def shown_as_rgb(image: Image.Image) -> Image.Image:
    """An image as RGB, over a checkerboard if it has transparency."""
    return over(image, checkerboard(image.size)) if image.mode == "RGBA" else image.convert("RGB")


def premultiplied(image: Image.Image) -> Image.Image:
    """An RGBA image with its colours multiplied by alpha, as compositing programs want them."""
    pixels = np.asarray(image.convert("RGBA")).astype(np.float32)
    pixels[..., :3] *= pixels[..., 3:] / 255
    return Image.fromarray(pixels.round().astype(np.uint8))
