"""Captioned images with transparency in zip archives: their rows, their pixels, their captions.

The data folder holds ``captions.jsonl`` (one row per image) and the zips that its rows name in ``file``.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusion_accel.compositing import premultiplied_pixels
from diffusion_accel.images import open_image

from .files import TrainingError, UsageError, read_json_lines

Row = dict[str, Any]
ROW_KEYS = ("id", "style", "style_words", "slug", "name", "keywords", "group", "subgroup", "core", "file", "split")


def read_rows(data: Path) -> list[Row]:
    """The rows of ``captions.jsonl``, checked for the keys that training needs."""
    if not data.is_dir():
        raise UsageError(f"{data} is not a folder with a data set (captions.jsonl and zip archives)")
    rows = read_json_lines(data / "captions.jsonl")
    if not rows:
        raise TrainingError(f"{data / 'captions.jsonl'} is empty")
    for number, row in enumerate(rows, 1):
        absent = [key for key in ROW_KEYS if key not in row]
        if absent:
            raise TrainingError(f"{data / 'captions.jsonl'}, line {number}: no {', '.join(absent)}")
    return rows


def premultiplied(image: Image.Image, size: int) -> np.ndarray:
    """uint8 (size, size, 4): RGBA with the colours multiplied by alpha, then resized (Lanczos)."""
    pixels = premultiplied_pixels(image)
    if pixels.shape[:2] != (size, size):
        planes = [Image.fromarray(pixels[..., c]).resize((size, size), Image.Resampling.LANCZOS) for c in range(4)]
        pixels = np.stack([np.asarray(plane) for plane in planes], -1)
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


def read_images(data: Path, rows: list[Row], size: int) -> np.ndarray:
    """The images of some rows: uint8 (N, size, size, 4), premultiplied."""
    images = np.zeros((len(rows), size, size, 4), np.uint8)
    archives: dict[str, zipfile.ZipFile] = {}
    row: Row = {"file": ""}
    try:
        for image, row in zip(images, rows, strict=True):
            archive, _, member = row["file"].partition(":")
            if archive not in archives:
                archives[archive] = zipfile.ZipFile(data / archive)
            file = io.BytesIO(archives[archive].read(member))
            image[:] = premultiplied(open_image(file, "RGBA", what=row["file"], error=TrainingError), size)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise TrainingError(f"{data}: cannot read {row['file']}: {error}") from error
    finally:
        for opened in archives.values():
            opened.close()
    return images


def on_colours(images: np.ndarray, background: np.ndarray | None = None) -> torch.Tensor:
    """Premultiplied uint8 (N, H, W, 4) over flat colours (N, 3) in 0..255, default white -> (N, 3, H, W) in -1..1."""
    pixels = torch.from_numpy(np.array(images, order="C")).float()  # a copy: a file that is mapped is read-only
    if background is None:
        background = np.full((len(images), 3), 255, np.float32)
    flat = torch.from_numpy(background.astype(np.float32))[:, None, None, :]
    over = pixels[..., :3] + (255 - pixels[..., 3:]) / 255 * flat
    return (over / 127.5 - 1).permute(0, 3, 1, 2).contiguous()


def caption_of(row: Row) -> str:
    """The canonical caption of an image, such as "red apple, 3d style"."""
    return f"{row['name']}, {row['style_words']} style"
