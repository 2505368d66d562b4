"""The one place that opens an image file: orientation, 16 bits, palettes, transparency, colour profiles, animations,
limits."""

from __future__ import annotations

import logging
import stat
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO

from PIL import Image, ImageOps

from .errors import AccelerationError, ConfigurationError
from .io import at_home

PIXEL_LIMIT = 100_000_000  # of an image that is opened: 100 megapixels
MODES = ("RGB", "RGBA", "L")
#: what is opened; Pillow knows more, among them formats that start other programs (EPS) or are no images at all
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM", "TGA", "ICO", "QOI")

logger = logging.getLogger(__name__)


def open_image(
    source: Path | str | IO[bytes] | Image.Image,
    mode: str = "RGB",
    *,
    what: str = "",
    error: type[AccelerationError] = ConfigurationError,
    background: tuple[int, int, int] | None = None,
    limit: int | None = None,
) -> Image.Image:
    """An image file as a viewer shows it.

    It is turned as its EXIF orientation says; samples of 16 and 32 bits are scaled to 8; colours of a profile become
    those of sRGB; of an animation the first frame is taken, with a warning; a palette's or a colour's transparency
    becomes alpha. Without alpha ("RGB", "L") the colours stay as they are stored, as in diffusers' `load_image`, or
    are laid over a `background`.

    Args:
        source: path of a regular file, an open binary file, or an image, which stays as it is.
        mode: "RGB", "RGBA" or "L" (brightness, for masks).
        what: what the image is for, the first words of an error, for example "the image".
        error: what is raised.
        background: what is seen through transparent parts in the modes without alpha, RGB in 0..255.
        limit: the most pixels that a file may have; None: `PIXEL_LIMIT`.

    Raises:
        AccelerationError (of the kind `error`): no such file, no image, a broken one, or one of more than `limit`
            pixels.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    with loaded(source, what=what, error=error, limit=limit) as image:
        if _is_animated(image):
            logger.warning("%s has several frames; the first one is taken", _name(source, what))
        try:
            return _converted(image, mode, background)
        except (ValueError, OSError) as problem:
            raise error(f"{_name(source, what)} has colours ({image.mode}) that cannot be read") from problem


def _converted(image: Image.Image, mode: str, background: tuple[int, int, int] | None) -> Image.Image:
    whole = _in_srgb(_eight_bits(_turned(image)), image.info.get("icc_profile"))
    if background is not None and mode != "RGBA" and whole.has_transparency_data:
        ground = Image.new("RGBA", whole.size, (*background, 255))
        return Image.alpha_composite(ground, whole.convert("RGBA")).convert(mode)
    return whole.convert(_with_alpha(whole, mode)).convert(mode)


@contextmanager
def loaded(
    source: Path | str | IO[bytes] | Image.Image,
    *,
    what: str = "",
    error: type[AccelerationError] = ConfigurationError,
    limit: int | None = None,
) -> Iterator[Image.Image]:
    """Pillow's image of a file, loaded and as it is stored, with all that belongs to it; see `open_image`."""
    name = _name(source, what)
    if isinstance(source, Image.Image):
        if not all(source.size):
            raise error(f"{name} has no pixels")
        yield source
        return
    with ExitStack() as stack:
        try:
            if isinstance(source, (str, Path)):
                path = at_home(source)
                if not stat.S_ISREG(path.stat().st_mode):
                    raise error(f"{name} is not an image file")
                source = stack.enter_context(path.open("rb"))
            image = stack.enter_context(_load(source, name, error, PIXEL_LIMIT if limit is None else limit))
        except FileNotFoundError as problem:
            raise error(f"{name}: no such file") from problem
        except PermissionError as problem:
            raise error(f"{name} cannot be read: {problem.strerror}") from problem
        except AccelerationError:
            raise
        except Exception as problem:  # Pillow's decoders raise many kinds for broken files
            raise error(f"{name} is not an image that can be read") from problem
        yield image


def _name(source: Path | str | IO[bytes] | Image.Image, what: str) -> str:
    shown = str(source) if isinstance(source, (str, Path)) else "" if what else "the image"
    return " ".join(filter(None, (what, shown)))


def _load(stream: IO[bytes], name: str, error: type[AccelerationError], most: int) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # the limit below has a message of its own
        try:
            Image.init()
            opened = Image.open(stream, formats=[name for name in FORMATS if name in Image.OPEN])
        finally:
            Image.MAX_IMAGE_PIXELS = limit
        width, height = opened.size
        if width * height > most:
            raise error(
                f"{name} has {width}x{height} pixels, more than {most / 1e6:.4g} million; make it smaller first"
            )
        if not width or not height:
            raise error(f"{name} has no pixels")
        opened.load()
        return opened


def _is_animated(image: Image.Image) -> bool:
    """Whether there are frames besides the one that is loaded; a camera's JPEG may hold a preview, which is none."""
    try:
        return image.format in ("GIF", "PNG", "WEBP", "AVIF", "TIFF") and bool(getattr(image, "is_animated", False))
    except Exception:  # it looks for the next frame, in a file that may be broken behind the first
        return False


def _turned(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow raises many kinds for broken EXIF; the pixels are whole
        return image


def _with_alpha(image: Image.Image, mode: str) -> str:
    """The mode to go through: a palette with transparency is best read as RGBA."""
    return "RGBA" if mode == "RGBA" or (image.mode == "P" and "transparency" in image.info) else mode


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """An image whose file has a colour profile, with the colours of sRGB; as it is if the profile does not fit it."""
    space = {"RGB": "RGB ", "RGBA": "RGB ", "CMYK": "CMYK"}.get(image.mode)
    if not profile or space is None or "transparency" in image.info:
        return image
    from PIL import ImageCms  # for files with a profile only

    try:
        given = ImageCms.ImageCmsProfile(BytesIO(profile))
        if given.profile.xcolor_space != space or "sRGB" in (given.profile.profile_description or ""):
            return image
        target = "RGBA" if image.mode == "RGBA" else "RGB"
        return ImageCms.profileToProfile(image, given, ImageCms.createProfile("sRGB"), outputMode=target) or image
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image


def _eight_bits(image: Image.Image) -> Image.Image:
    """An image of 16 or 32 bits a sample with 8; others as they are."""
    if image.mode.startswith("I;16"):
        return _scaled(image, 65535.0)
    return _scaled(image, None) if image.mode in ("I", "F") else image


def _scaled(image: Image.Image, top: float | None) -> Image.Image:
    """Samples from 0 to `top` as 8 bits; None: to what the largest of them suggests."""
    import numpy as np  # heavy: commands start by this module

    samples = np.asarray(image)
    if top is None and image.mode == "I":  # Pillow reads some 16-bit files as 32-bit whole numbers
        top = 65535.0 if samples.max() > 255 else 255.0
    elif top is None:
        top = 255.0 if np.nanmax(samples) > 1 else 1.0
    values = np.nan_to_num(samples.astype(np.float32)) * (255 / top)
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
