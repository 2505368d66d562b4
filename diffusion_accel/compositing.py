"""Images with transparency over something: a colour, another image, a checkerboard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageColor

from .errors import ConfigurationError
from .images import open_image
from .io import is_there, shown

if TYPE_CHECKING:
    import numpy as np


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
    odd = odd_fields(height, width, max(1, min(64, min(size) // 8)))
    return Image.fromarray((low + odd * (high - low)).astype("uint8")).convert("RGB")


def odd_fields(height: int, width: int, side: int) -> np.ndarray:
    """The fields of a checkerboard, `side` pixels wide: bool (height, width), false in the first one."""
    import numpy as np  # heavy: commands start by this module

    return (np.arange(height)[:, None] // side + np.arange(width) // side) % 2 == 1


def shown_as_rgb(image: Image.Image) -> Image.Image:
    """An image as RGB, over a checkerboard if it has transparency."""
    return over(image, checkerboard(image.size)) if image.mode == "RGBA" else image.convert("RGB")


def premultiplied(image: Image.Image) -> Image.Image:
    """An RGBA image with its colours multiplied by alpha, as compositing programs want them."""
    return Image.fromarray(premultiplied_pixels(image).round().astype("uint8"))


def premultiplied_pixels(image: Image.Image) -> np.ndarray:
    """The pixels of an image, float32 (height, width, 4) in 0..255, colours multiplied by alpha."""
    import numpy as np  # heavy: commands start by this module

    pixels = np.asarray(image.convert("RGBA")).astype(np.float32)
    pixels[..., :3] *= pixels[..., 3:] / 255
    return pixels


def stack(images: Sequence[Image.Image], names: Sequence[str] = ()) -> Image.Image:
    """RGBA images of one size as one, the lowest first.

    Args:
        images: the layers.
        names: what errors call them.

    Raises:
        ConfigurationError: they differ in size.
    """
    made = images[0]
    names = names or [f"layer {number + 1}" for number in range(len(images))]
    for name, image in zip(names[1:], images[1:], strict=True):
        if image.size != made.size:
            raise ConfigurationError(
                f"{name} has {image.width}x{image.height} pixels, {names[0]} {made.width}x{made.height}; layers must "
                "have one size"
            )
        made = Image.alpha_composite(made, image)
    return made


def background_of(text: str) -> Image.Image | tuple[int, ...] | None:
    """What a text means as a background: a colour (a name or #rrggbb) or an image file; None for "checkerboard".

    Raises:
        ConfigurationError: it is none of them.
    """
    if text == "checkerboard":
        return None
    if is_there(text, "file"):
        return open_image(text, "RGBA")
    try:
        return ImageColor.getrgb(text)
    except ValueError as error:
        raise ConfigurationError(
            f"the background {shown(text)} is neither checkerboard, nor a colour (white, #ff8800), nor an image file"
        ) from error
