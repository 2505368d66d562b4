"""What a model is asked to draw when it is evaluated, and the real images that the answers are compared with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.training import archives, datasets
from diffusion_accel.training.files import read_json_lines

from .classifier import Features, StickerClassifier, asset_folder, extract, load_reference

SPLITS = ("train", "heldout")
STICKER_STYLES = ("noto", "flat", "3d", "twemoji")
LoadImages = Callable[[list[int]], torch.Tensor]


@dataclass(frozen=True)
class Asked:
    """What a model is asked to draw: captions, with the concept and style of each, and their split."""

    captions: list[str]
    concepts: list[str]
    styles: list[str]
    splits: list[str]

    def choose(self, split: str, count: int, skip: int = 0) -> list[int]:
        """Up to `count` indices of a split, the same ones every time; behind the `skip` first choices."""
        inside = [i for i, name in enumerate(self.splits) if name == split]
        order = torch.randperm(len(inside), generator=torch.Generator().manual_seed(5)).tolist()
        return sorted(inside[i] for i in order[skip : skip + count])


def of_classes(asked: Asked, names: dict[str, int]) -> Asked:
    """What of it a model of classes can be asked for: captions are names of classes, the others have no split.

    Args:
        names: the names of the model's classes; a caption or a concept is one of them whatever its case and hyphens.

    Raises:
        ConfigurationError: no caption or concept is one of its classes.
    """

    def folded(text: str) -> str:
        return " ".join(text.casefold().replace("-", " ").replace("_", " ").split())

    known = {folded(name): name for name in names}
    found = [known.get(folded(c)) or known.get(folded(k)) for c, k in zip(asked.captions, asked.concepts, strict=True)]
    if not any(found):
        raise ConfigurationError(
            f"the reference shows none of the {len(names)} classes of the model; give data, a folder of "
            "images for each class"
        )
    splits = [split if name else "" for split, name in zip(asked.splits, found, strict=True)]
    return Asked([name or "" for name in found], asked.concepts, asked.styles, splits)


def embedded_reference() -> tuple[Asked, Features]:
    """The captions of the real stickers that ship as features, and those features.

    Stickers that the embedded model never saw any style of have an empty split: they only make retrieval harder.
    """
    rows = json.loads((asset_folder() / "reference.json").read_text(encoding="utf-8"))
    return Asked(rows["captions"], rows["concepts"], rows["styles"], rows["splits"]), load_reference()


def embedded_prompts(count: int, skip: int = 0) -> list[str]:
    """Captions of the embedded model's training images, the same ones every time, behind the `skip` first."""
    asked, _ = embedded_reference()
    return [asked.captions[i] for i in asked.choose("train", count, skip)]


def reference_of(data: Path, classifier: StickerClassifier) -> tuple[Asked, Features, LoadImages]:
    """What a captioned data folder asks for, the features of its images, and what loads them.

    A sticker data set keeps its concepts and styles; elsewhere a caption is its own concept.

    Returns:
        What is asked for; the features of all images; a function that gives the images (N, 3, 96, 96) in -1..1 of
        some indices.

    Raises:
        ConfigurationError: the folder has neither captions nor a folder of images for each class.
    """
    listed = data / "captions.jsonl"
    stickers = listed.is_file() and {"slug", "style", "split"} <= {*(read_json_lines(listed) or [{}])[0]}
    asked, load = (_stickers if stickers else _captioned)(data, classifier.size)
    parts = [extract(classifier, load(part.tolist())) for part in torch.arange(len(asked.captions)).split(256)]
    return asked, Features(torch.cat(parts), asked.concepts, asked.styles), load


def _stickers(data: Path, size: int) -> tuple[Asked, LoadImages]:
    rows = [row for row in archives.read_rows(data) if row["core"] and row["style"] in STICKER_STYLES]
    cache: dict[int, torch.Tensor] = {}

    def load(indices: list[int]) -> torch.Tensor:
        missing = [i for i in indices if i not in cache]
        images = archives.read_images(data, [rows[i] for i in missing], size)
        cache.update(zip(missing, archives.on_colours(images), strict=True))
        return torch.stack([cache[i] for i in indices])

    captions = [archives.caption_of(row) for row in rows]
    concepts, styles, splits = ([row[key] for row in rows] for key in ("slug", "style", "split"))
    return Asked(captions, concepts, styles, splits), load


def _captioned(data: Path, size: int) -> tuple[Asked, LoadImages]:
    kind, found = datasets.find_rows(data)
    if kind not in ("captions", "classes"):
        raise ConfigurationError(
            f"{data} has neither captions (captions.jsonl or metadata.jsonl) nor a folder of images for each class"
        )
    rows = datasets.with_splits(found)

    def load(indices: list[int]) -> torch.Tensor:
        loaded = [datasets.load_image(data / rows[i]["file"], size) for i in indices]
        return torch.cat([datasets.as_tensor(image[None]) for image in loaded])

    captions = [row["caption" if kind == "captions" else "label"] for row in rows]
    return Asked(captions, captions, [""] * len(rows), [row["split"] for row in rows]), load
