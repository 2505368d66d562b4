"""Output files: where images go, what is written into them, and reading it back."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError, OutputError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = {".png": "PNG", ".webp": "WEBP", ".jpg": "JPEG", ".jpeg": "JPEG"}
CHUNK = "diffusion_accel"
_USER_COMMENT, _EXIF_IFD = 0x9286, 0x8769


def plan_outputs(output: str, seeds: list[list[int]], names: list[str | None], overwrite: bool) -> list[list[Path]]:
    """The path of every image: `seeds` has one list a prompt; `names` the file names that prompts ask for.

    A path with an image suffix is a file (several images become `name-1.png`, `name-2.png`, …); anything else is a
    folder, in which numbering goes on after the highest number there.

    Raises:
        OutputError: a file exists and `overwrite` is false, or the folder cannot be written.
        ConfigurationError: a name or suffix that cannot be used.
    """
    target = Path(output)
    total = sum(map(len, seeds))
    paths: list[list[Path]] = []
    if target.suffix:
        if target.suffix.lower() not in SUFFIXES:
            raise ConfigurationError(f"-o {output}: unknown image type {target.suffix}; allowed: {', '.join(SUFFIXES)}")
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


def check_free(paths: list[Path], overwrite: bool) -> None:
    """Raise `OutputError` if a path is a folder, or exists and may not be replaced."""
    for path in paths:
        if path.is_dir():
            raise OutputError(f"{path} is a folder")
        if path.exists() and not overwrite:
            raise OutputError(f"{path} exists; choose another name or pass --overwrite")


def _highest(folder: Path) -> int:
    numbers = [int(m[1]) for p in folder.glob("*") if (m := re.match(r"(\d{4,})-", p.name))] if folder.is_dir() else []
    return max(numbers, default=0)


def _named(folder: Path, name: str, k: int, count: int) -> Path:
    path = Path(name)
    if path.name != name or name.startswith("."):
        raise ConfigurationError(f"output {name!r} must be a plain file name; the folder is set by -o")
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigurationError(f"output {name!r}: unknown image type; allowed: {', '.join(SUFFIXES)}")
    return folder / (name if count == 1 else f"{path.stem}-{k + 1}{path.suffix}")


def check_writable(folder: Path) -> None:
    """Raise `OutputError` unless files can be made in `folder` (or in the nearest parent that exists)."""
    parent = folder.absolute()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise OutputError(f"cannot write to {folder}: {parent} is not a folder")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror}") from error


def save_image(image: Image.Image, path: Path, text: str | None = None, data: dict[str, Any] | None = None) -> None:
    """Write beside and rename, so that no half-written image is ever seen. `text` and `data` go in as metadata."""
    from PIL import Image as PIL
    from PIL.PngImagePlugin import PngInfo

    kind = SUFFIXES[path.suffix.lower()]
    options: dict[str, Any] = {"quality": 95} if kind != "PNG" else {}
    if text is not None:
        if kind == "PNG":
            info = PngInfo()
            info.add_itxt("parameters", text)
            info.add_itxt(CHUNK, json.dumps(data or {}))
            options["pnginfo"] = info
        else:
            exif = PIL.Exif()
            comment = json.dumps({"parameters": text, CHUNK: data or {}})
            exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = b"UNICODE\0" + comment.encode("utf-16-be")
            options["exif"] = exif.tobytes()
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(temporary, format=kind, **options)
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_metadata(file: str) -> tuple[str | None, dict[str, Any] | None]:
    """The `parameters` text and the JSON data of an image; None for what is not there.

    Raises:
        OutputError: the file is missing or no image.
    """
    from PIL import Image as PIL
    from PIL import UnidentifiedImageError

    try:
        with PIL.open(file) as image:
            image.load()
            texts = dict(getattr(image, "text", {}))
            comment = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    except FileNotFoundError as error:
        raise OutputError(f"no such file: {file}") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise OutputError(f"{file} is not an image that can be read") from error
    try:
        if isinstance(comment, bytes) and comment.startswith(b"UNICODE\0"):
            both = json.loads(comment[8:].decode("utf-16-be"))
            return both.get("parameters"), both.get(CHUNK)
        return texts.get("parameters"), json.loads(texts[CHUNK]) if CHUNK in texts else None
    except (ValueError, AttributeError) as error:
        raise OutputError(f"the metadata of {file} is damaged") from error


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
