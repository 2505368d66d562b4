"""Images to train on: a folder of images, a folder a class, or captions in a JSONL file; as pixels or latents.

`prepare` reads them once into the work folder: ``pictures.npy`` (uint8, N x size x size x 3), ``rows.jsonl`` (file and
label or caption), and, where the space is that of a VAE, ``latents.safetensors``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file
from tqdm import tqdm

from diffusion_accel.images import open_image

from .arrays import load_array, load_tensors
from .files import TrainingError, UsageError, read_json_lines, replacing, require, rows_of, write_json_lines

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from transformers import CLIPTokenizer

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
KINDS = ("folder", "classes", "captions")
Row = dict[str, Any]


# ------------------------------------------------------------------------------------------- what is there
def find_rows(data: Path, kind: str | None = None) -> tuple[str, list[Row]]:
    """The kind of a data folder and a row an image: {"file", "label" or "caption", "split" if it is given}.

    - "captions": ``captions.jsonl`` or ``metadata.jsonl``, a file ("file_name") and a caption ("text") in each line;
    - "classes": a folder of images for each class; its name is the label;
    - "folder": images, in any depth, without labels.

    Raises:
        UsageError: there is no such folder, nothing in it, or an image that a line names lies outside of it.
    """
    if not data.is_dir():
        raise UsageError(f"{data} is not a folder of images")
    listed = [data / name for name in ("captions.jsonl", "metadata.jsonl") if (data / name).is_file()]
    children = sorted(child for child in data.iterdir() if child.is_dir() and not child.name.startswith("."))
    if kind is None:
        loose = any(file.suffix.lower() in SUFFIXES for file in data.iterdir())
        kind = "captions" if listed else "classes" if children and not loose else "folder"
    if kind == "captions":
        if not listed:
            raise UsageError(f"{data} has no captions.jsonl or metadata.jsonl")
        rows = [_captioned(data, listed[0], n, row) for n, row in enumerate(read_json_lines(listed[0]), 1)]
    elif kind == "classes":
        rows = [{"file": str(f.relative_to(data)), "label": c.name} for c in children for f in _images(c)]
    elif kind == "folder":
        rows = [{"file": str(f.relative_to(data))} for f in _images(data)]
    else:
        raise UsageError(f"unknown kind of data {kind!r}; the kinds are: {', '.join(KINDS)}")
    if not rows:
        raise UsageError(f"{data} holds no images ({', '.join(sorted(SUFFIXES))})")
    return kind, rows


def _captioned(data: Path, file: Path, number: int, row: Row) -> Row:
    name, caption = row.get("file", row.get("file_name")), row.get("caption", row.get("text"))
    if not isinstance(name, str) or not isinstance(caption, str):
        raise UsageError(f"{file}, line {number}: needs a file (or file_name) and a caption (or text)")
    if not (data / name).resolve().is_relative_to(data.resolve()):
        raise UsageError(f"{file}, line {number}: {name} lies outside of {data}")
    return {"file": name, "caption": caption} | ({"split": row["split"]} if "split" in row else {})


def _images(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())


def load_image(file: Path, size: int, background: int = 255) -> np.ndarray:
    """uint8 (size, size, 3): cropped to the middle square, resized; transparency on a flat grey value."""
    image = open_image(file, "RGBA", error=TrainingError)
    flat = Image.new("RGBA", image.size, (background,) * 3 + (255,))
    image = Image.alpha_composite(flat, image).convert("RGB")
    return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))


# ------------------------------------------------------------------------------------------- preparing
def prepare(data: Path, work: Path, size: int, kind: str | None = None, heldout: float = 0.05) -> str:
    """Read every image into the work folder; returns the kind.

    A share `heldout` of the rows, the same ones on every machine, is for evaluation only, unless the rows name splits
    themselves ("train" or "heldout").
    """
    kind, rows = find_rows(data, kind)
    images = np.empty((len(rows), size, size, 3), np.uint8)
    for image, row in zip(images, tqdm(rows, desc="prepare", unit="image", disable=None), strict=True):
        try:
            image[:] = load_image(data / row["file"], size)
        except TrainingError as error:
            raise TrainingError(f"an image cannot be read: {error}") from error
    rows = with_splits(rows, heldout)
    with replacing(work / "pictures.npy") as temporary:
        np.save(temporary, images, allow_pickle=False)
    write_json_lines(work / "rows.jsonl", rows)
    return kind


def with_splits(rows: list[Row], heldout: float = 0.05) -> list[Row]:
    """The rows with a "split" each: their own, or `heldout` of them chosen at random, the same ones every time."""
    if all(row.get("split") in ("train", "heldout") for row in rows):
        return rows
    chosen = set(np.random.default_rng(0).permutation(len(rows))[: int(len(rows) * heldout)].tolist())
    return [row | {"split": "heldout" if i in chosen else "train"} for i, row in enumerate(rows)]


def as_tensor(images: np.ndarray) -> torch.Tensor:
    """uint8 (N, H, W, 3) -> float32 (N, 3, H, W) in -1..1."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def encode(work: Path, vae: AutoencoderKL, device: torch.device) -> None:
    """Write the latents of every image: the mean of the VAE's posterior, times its scaling factor."""
    images = load_array(require(work / "pictures.npy", "prepare"))
    model: Any = vae.to(device).eval()
    parts = []
    for start in tqdm(range(0, len(images), 32), desc="encode", unit="batch", disable=None):
        batch = as_tensor(images[start : start + 32]).to(device)
        parts.append(model.encode(batch).latent_dist.mean.float().cpu() * model.config.scaling_factor)
    with replacing(work / "latents.safetensors") as temporary:
        save_file({"latents": torch.cat(parts).contiguous()}, temporary)


# ------------------------------------------------------------------------------------------- examples
@dataclass
class ImageExamples:
    """The prepared images as `Examples` of a `DenoisingTask`.

    Attributes:
        space: float32 latents (N, C, h, w), or the uint8 images (N, H, W, 3).
        conditions: token ids (N, tokens), class indices (N,) or None.
        empty: the empty condition: token ids (tokens), the index behind the last class, or None.
        vae: decodes previews; None in pixel space.
    """

    rows: list[Row]
    space: Any
    conditions: torch.Tensor | None
    empty: torch.Tensor | None
    vae: Any = None
    variants: int = 1

    def __post_init__(self) -> None:
        splits = np.array([row["split"] for row in self.rows])
        self.train, self.heldout = np.flatnonzero(splits == "train"), np.flatnonzero(splits == "heldout")
        self.watched = self.train
        if not len(self.train):
            raise TrainingError("every image is held out: nothing to train on")

    def clean(self, indices: torch.Tensor) -> torch.Tensor:
        """Latents, or pixels in -1..1, of some images."""
        if isinstance(self.space, torch.Tensor):
            return self.space[indices]
        return as_tensor(self.space[indices.numpy()])

    def condition(self, indices: torch.Tensor, _variants: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor | None:
        """Token ids or classes of some images, the empty condition where `dropped`; an image has one caption."""
        if self.conditions is None:
            return None
        chosen = self.conditions[indices].clone()
        if self.empty is not None:
            chosen[dropped] = self.empty
        return chosen

    @torch.no_grad()
    def decode(self, clean: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) in -1..1."""
        if self.vae is None:
            return clean.clamp(-1, 1)
        parts = clean.to(self.vae.device).split(8)
        decoded = [self.vae.decode(part / self.vae.config.scaling_factor).sample.float().cpu() for part in parts]
        return torch.cat(decoded).clamp(-1, 1)


def load_examples(work: Path, vae: Any = None, tokenizer: CLIPTokenizer | None = None) -> ImageExamples:
    """What `prepare` (and `encode`, if there is a VAE) left in the work folder."""
    rows = rows_of(require(work / "rows.jsonl", "prepare"), file=str, split=str)
    space: Any = load_array(require(work / "pictures.npy", "prepare"))
    if vae is not None:
        space = load_tensors(require(work / "latents.safetensors", "prepare"), "latents")["latents"]
    if len(space) != len(rows):
        raise TrainingError(f"{work} has {len(rows)} rows and {len(space)} images; prepare it again")
    kinds = {tuple(isinstance(row.get(key), str) for key in ("caption", "label")) for row in rows}
    if len(kinds) > 1:
        raise TrainingError(f"{work / 'rows.jsonl'}: some rows have a caption or a label, others have none")
    conditions = empty = None
    if "caption" in rows[0]:
        if tokenizer is None:
            raise UsageError("captioned images need a tokenizer")
        padding = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
        conditions = torch.tensor(tokenizer([row["caption"] for row in rows], **padding).input_ids)
        empty = torch.tensor(tokenizer([""], **padding).input_ids[0])
    elif "label" in rows[0]:
        names = class_names(rows)
        conditions = torch.tensor([names.index(row["label"]) for row in rows])
        empty = torch.tensor(len(names))
    return ImageExamples(rows, space, conditions, empty, vae)


def class_names(rows: list[Row]) -> list[str]:
    """The classes in the order of their indices."""
    return sorted({row["label"] for row in rows})


def describe(rows: list[Row]) -> str:
    """One line about the rows, for the log."""
    kind = "captions" if "caption" in rows[0] else f"{len(class_names(rows))} classes" if "label" in rows[0] else "none"
    heldout = sum(row["split"] == "heldout" for row in rows)
    return json.dumps({"images": len(rows), "heldout": heldout, "conditions": kind})
