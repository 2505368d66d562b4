"""Image files that are written: their types, what is put into them, and reading that back."""

from __future__ import annotations

import logging
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import AccelerationError, ConfigurationError, OutputError
from .image_metadata import read_embedded, save_options
from .images import loaded
from .io import first_line, is_there, replacing

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}
LARGEST = {"WEBP": 16_383, "JPEG": 65_500}  # pixels on a side that a file can hold

logger = logging.getLogger(__name__)


def is_image_file(output: str, what: str = "output") -> bool:
    """Whether `output` means an image file, not a folder.

    Args:
        output: a path; one that ends in "/", has no suffix or is a folder means a folder.
        what: what it is, the first word of an error.

    Raises:
        ConfigurationError: a file of another type.
    """
    path = Path(output)
    if not path.suffix or output.endswith(("/", os.sep)) or is_there(path, "dir"):
        return False
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigurationError(
            f"{what} {output}: unknown image type {path.suffix}; allowed: {', '.join(SUFFIXES)}, or a folder (end its "
            "name with /)"
        )
    return True


def check_fits(path: Path, width: int | None, height: int | None) -> None:
    """Raise `ConfigurationError` for an image of so many pixels that is too large for the type of its file."""
    kind = SUFFIXES[path.suffix.lower()]
    if max(width or 0, height or 0) > LARGEST.get(kind, 10**9):
        raise ConfigurationError(f"{path}: {kind} holds at most {LARGEST[kind]} pixels on a side; use .png")


def check_holds_alpha(path: Path, what: str = "") -> None:
    """Raise `ConfigurationError` for a file type that has no alpha; `what` goes before the path."""
    if path.suffix.lower() in (".jpg", ".jpeg"):
        raise ConfigurationError(
            f"{what}{path}: JPEG cannot hold transparency; use .png or .webp (compose makes opaque images)"
        )


def save_image(image: Image.Image, path: Path, text: str | None = None, data: dict[str, Any] | None = None) -> None:
    """Write beside and rename, so that no half-written image is ever seen. `text` and `data` go in as metadata.

    An image is never lost for its metadata: if they cannot be written, it is written without, with a warning.

    Args:
        image: what is written; PNG holds every mode, WebP and JPEG at most 8 bits.
        path: the file, with one of the `SUFFIXES`.
        text: the settings for other tools; see `image_metadata.parameters_text`.
        data: the settings as JSON values.

    Raises:
        OutputError: the file cannot be written.
    """
    kind = SUFFIXES[path.suffix.lower()]
    options: dict[str, Any] = {"quality": 95} if kind != "PNG" else {}
    if text is not None:
        try:
            return _write(image, path, kind, options | save_options(kind, text, data or {}))
        except (ValueError, TypeError, ArithmeticError, RecursionError, struct.error) as error:
            logger.warning("%s is written without its settings: %s", path, first_line(error))
    try:
        _write(image, path, kind, options)
    except (ValueError, TypeError) as error:
        if isinstance(error, AccelerationError):
            raise
        raise OutputError(f"cannot write {path}: {first_line(error)}") from error


def _write(image: Image.Image, path: Path, kind: str, options: dict[str, Any]) -> None:
    try:
        with replacing(path) as temporary:
            image.save(temporary, format=kind, **options)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def read_metadata(file: str) -> tuple[str | None, dict[str, Any] | None]:
    """The `parameters` text and the JSON data of an image; None for what is not there.

    Raises:
        OutputError: the file is missing, no image, or its metadata of ours is damaged.
    """
    with loaded(file, error=OutputError) as image:
        return read_embedded(image, file)
