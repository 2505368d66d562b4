"""Output files: where images go, what is written into them, and reading it back."""

from __future__ import annotations

import logging
import os
import re
import struct
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_accel.errors import AccelerationError, ConfigurationError, OutputError
from diffusion_accel.images import loaded
from diffusion_accel.io import first_line, is_there, replacing

from .image_metadata import read_embedded, save_options

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}
LARGEST = {"WEBP": 16_383, "JPEG": 65_500}  # pixels on a side that a file can hold
NAME = 255 - 30  # bytes of a file name; the rest is for what is put around it while the file is written

logger = logging.getLogger(__name__)


def plan_outputs(output: str, seeds: list[list[int]], names: list[str | None], overwrite: bool) -> list[list[Path]]:
    """The path of every image: `seeds` has one list a prompt; `names` the file names that prompts ask for.

    A path with an image suffix is a file (several images become `name-1.png`, `name-2.png`, …); a folder that exists,
    or a path without a suffix or with "/" at its end, is a folder, in which numbering goes on after the highest number
    there.

    Raises:
        OutputError: a file exists and `overwrite` is false, or the folder cannot be written.
        ConfigurationError: a name or suffix that cannot be used.
    """
    target = output_path(output)
    total = sum(map(len, seeds))
    paths: list[list[Path]] = []
    if is_image_file(output):
        named = next((name for name in names if name is not None), None)
        if named is not None:
            raise ConfigurationError(
                f"output {named!r} of the prompts file needs -o to be a folder, and -o {output} is an image file"
            )
        number = 0
        for some in seeds:
            paths.append([])
            for _ in some:
                number += 1
                paths[-1].append(target if total == 1 else target.with_name(f"{target.stem}-{number}{target.suffix}"))
    else:
        number = _highest(target)
        for some, name in zip(seeds, names, strict=True):
            paths.append([])
            for k, seed in enumerate(some):
                number += 1
                path = target / f"{number:04d}-{seed}.png" if name is None else _named(target, name, k, len(some))
                paths[-1].append(path)
    flat = [p for group in paths for p in group]
    if len(set(flat)) != len(flat):
        raise ConfigurationError("two images would be written to the same file; give the prompts different outputs")
    check_free(flat, overwrite)
    for folder in {p.parent for p in flat}:
        check_writable(folder)
    return paths


def output_path(text: str, flag: str = "-o") -> Path:
    """A path to write to. Raises `ConfigurationError` for text that names nothing."""
    try:
        os.fsencode(text)
    except ValueError as error:
        raise ConfigurationError(f"{flag}: {text!r} cannot be the name of a file") from error
    if not text.strip() or "\0" in text:
        raise ConfigurationError(f"{flag}: {text!r} cannot be the name of a file")
    if Path(text).name.lower() in SUFFIXES:
        raise ConfigurationError(f"{flag}: {text} has nothing before its suffix")
    return Path(text)


def is_image_file(output: str, flag: str = "-o") -> bool:
    """Whether `output` means an image file, not a folder. Raises `ConfigurationError` for another type of file."""
    path = Path(output)
    if not path.suffix or output.endswith(("/", os.sep)) or is_there(path, "dir"):
        return False
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigurationError(
            f"{flag} {output}: unknown image type {path.suffix}; allowed: {', '.join(SUFFIXES)}, or a folder (end its "
            "name with /)"
        )
    return True


def check_free(paths: list[Path], overwrite: bool) -> None:
    """Raise `OutputError` if a path is a folder, exists and may not be replaced, or has a name that is too long."""
    for path in paths:
        if len(os.fsencode(path.name)) > NAME:
            raise OutputError(f"the name of {path} is too long: at most {NAME} bytes")
        if is_there(path, "dir"):
            raise OutputError(f"{path} is a folder")
        if is_there(path) and not overwrite:
            raise OutputError(f"{path} exists; choose another name or pass --overwrite")


def check_distinct(paths: list[Path]) -> None:
    """Raise `ConfigurationError` if a file would be written twice."""
    twice = next((path for path in paths if paths.count(path) > 1), None) if len(set(paths)) < len(paths) else None
    if twice is not None:
        raise ConfigurationError(f"{twice} would be written twice; give the prompts different outputs")


def check_fits(paths: list[Path], width: int | None, height: int | None) -> None:
    """Raise `ConfigurationError` for an image that is too large for the type of its file."""
    for path in paths:
        kind = SUFFIXES[path.suffix.lower()]
        if max(width or 0, height or 0) > LARGEST.get(kind, 10**9):
            raise ConfigurationError(f"{path}: {kind} holds at most {LARGEST[kind]} pixels on a side; use .png")


def _highest(folder: Path) -> int:
    numbers = [int(m[1]) for p in folder.glob("*") if (m := re.match(r"(\d{4,})-", p.name))] if folder.is_dir() else []
    return max(numbers, default=0)


def _named(folder: Path, name: str, k: int, count: int) -> Path:
    path = output_path(name, "output")
    if path.name != name or name.startswith("."):
        raise ConfigurationError(f"output {name!r} must be a plain file name; the folder is set by -o")
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigurationError(f"output {name!r}: unknown image type; allowed: {', '.join(SUFFIXES)}")
    return folder / (name if count == 1 else f"{path.stem}-{k + 1}{path.suffix}")


def check_writable(folder: Path) -> None:
    """Raise `OutputError` unless files can be made in `folder` (or in the nearest parent that exists)."""
    parent = folder.absolute()
    try:
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            raise OutputError(f"cannot write to {folder}: {parent} is not a folder")
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror}") from error


def save_image(image: Image.Image, path: Path, text: str | None = None, data: dict[str, Any] | None = None) -> None:
    """Write beside and rename, so that no half-written image is ever seen. `text` and `data` go in as metadata.

    An image is never lost for its metadata: if they cannot be written, it is written without, with a warning.
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


def check_free_folder(folder: Path, overwrite: bool) -> None:
    """Raise `OutputError` unless a folder of this name can be written (and, with `overwrite`, replaced)."""
    if folder.is_file():
        raise OutputError(f"{folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise OutputError(f"{folder} exists; choose another name or pass --overwrite")
        if not (folder / "model_index.json").is_file():
            raise OutputError(f"{folder} is not a pipeline folder, so --overwrite does not replace it")
    check_writable(folder.absolute().parent)
