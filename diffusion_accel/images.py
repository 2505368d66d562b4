"""The one place that opens an image file: orientation, 16 bits, palettes, transparency, animations, limits."""

from __future__ import annotations

import stat
import warnings
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from .errors import AccelerationError, ConfigurationError

PIXEL_LIMIT = 100_000_000  # of an image that is opened: 100 megapixels
MODES = ("RGB", "RGBA", "L")


def open_image(
    source: Path | str | IO[bytes],
    mode: str = "RGB",
    *,
    what: str = "",
    error: type[AccelerationError] = ConfigurationError,
) -> Image.Image:
    """An image file as a viewer shows it.

    It is turned as its EXIF orientation says; samples of 16 and 32 bits are scaled to 8; of an animation the first
    frame is taken; a palette's or a colour's transparency becomes alpha. Without alpha ("RGB", "L") the colours stay as
    they are stored, as in diffusers' `load_image`.

    Args:
        source: path of a regular file, or an open binary file.
        mode: "RGB", "RGBA" or "L" (brightness, for masks).
        what: what the image is for, the first words of an error, for example "--image".
        error: what is raised.

    Raises:
        AccelerationError (of the kind `error`): no such file, no image, a broken one, or more pixels than
            `PIXEL_LIMIT`.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    shown = str(source) if isinstance(source, (str, Path)) else "the image"
    name = " ".join(filter(None, (what, shown)))
    try:
        if isinstance(source, (str, Path)):
            path = Path(source).expanduser()
            if not stat.S_ISREG(path.stat().st_mode):
                raise error(f"{name} is not an image file")
            with path.open("rb") as stream:
                return _read(stream, name, mode, error)
        return _read(source, name, mode, error)
    except FileNotFoundError as problem:
        raise error(f"{name}: no such file") from problem
    except PermissionError as problem:
        raise error(f"{name} cannot be read: {problem.strerror}") from problem
    except AccelerationError:
        raise
    except Exception as problem:  # Pillow's decoders raise many kinds for broken files
        raise error(f"{name} is not an image that can be read") from problem


def _read(stream: IO[bytes], name: str, mode: str, error: type[AccelerationError]) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # the limit below has a message of its own
        try:
            opened = Image.open(stream)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
        with opened:
            width, height = opened.size
            if width * height > PIXEL_LIMIT:
                most = f"{PIXEL_LIMIT / 10**6:g} million"
                raise error(f"{name} has {width}x{height} pixels, more than {most}; make it smaller first")
            if not width or not height:
                raise error(f"{name} has no pixels")
            opened.load()
            image = ImageOps.exif_transpose(opened)
            return _eight_bits(image).convert(_with_alpha(image, mode)).convert(mode)


def _with_alpha(image: Image.Image, mode: str) -> str:
    """The mode to go through: a palette with transparency is best read as RGBA."""
    return "RGBA" if mode == "RGBA" or (image.mode == "P" and "transparency" in image.info) else mode


def _eight_bits(image: Image.Image) -> Image.Image:
    """An image of 16 or 32 bits a sample with 8; others as they are."""
    if image.mode.startswith("I;16"):
        return _scaled(image, 65535.0)
    if image.mode == "I":  # Pillow reads some 16-bit files as 32-bit whole numbers
        return _scaled(image, 65535.0 if np.asarray(image).max() > 255 else 255.0)
    if image.mode == "F":
        return _scaled(image, 255.0 if np.nanmax(np.asarray(image)) > 1 else 1.0)
    return image


def _scaled(image: Image.Image, top: float) -> Image.Image:
    values = np.nan_to_num(np.asarray(image).astype(np.float64)) * (255 / top)
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
