"""How well a model draws: validation loss, distances between distributions, and whether it draws what was asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion_accel.errors import ConfigurationError

from .classifier import Features, StickerClassifier, asset_folder, extract, load_reference
from .distribution import frechet_distance, precision_recall, retrieval

SPLITS = ("train", "heldout")
BINS = 10


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
            f"the reference shows none of the {len(names)} classes of the model; give --data with a folder of "
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


def reference_of(data: Path, classifier: StickerClassifier) -> tuple[Asked, Features, Callable[[list[int]], Any]]:
    """The same for a captioned data folder; the third value gives its images (N, 3, 96, 96) in -1..1.

    A sticker data set keeps its concepts and styles; elsewhere a caption is its own concept.
    """
    from diffusion_accel.training import archives, datasets
    from diffusion_accel.training.files import read_json_lines

    listed = data / "captions.jsonl"
    if listed.is_file() and all(key in (read_json_lines(listed) or [{}])[0] for key in ("slug", "style", "split")):
        rows = [row for row in archives.read_rows(data) if row["core"] and row["style"] in STICKER_STYLES]
        cache: dict[int, Any] = {}

        def pictures(indices: list[int]) -> Any:
            missing = [i for i in indices if i not in cache]
            images = archives.read_images(data, [rows[i] for i in missing], classifier.size)
            cache.update(zip(missing, archives.composite(images), strict=True))
            return torch.stack([cache[i] for i in indices])

        captions = [archives.caption_variants(row)[0] for row in rows]
        names, styles = [row["slug"] for row in rows], [row["style"] for row in rows]
    else:
        kind, found = datasets.find_rows(data)
        if kind not in ("captions", "classes"):
            raise ConfigurationError(
                f"{data} has neither captions (captions.jsonl or metadata.jsonl) nor a folder of images for each class"
            )
        key = "caption" if kind == "captions" else "label"
        rows = datasets.with_splits(found)

        def pictures(indices: list[int]) -> Any:
            loaded = [datasets.load_image(data / rows[i]["file"], classifier.size) for i in indices]
            return torch.cat([datasets.as_tensor(image[None]) for image in loaded])

        captions = names = [row[key] for row in rows]
        styles = [""] * len(rows)
    asked = Asked(captions, names, styles, [row["split"] for row in rows])
    parts = [extract(classifier, pictures(part.tolist())) for part in torch.arange(len(rows)).split(256)]
    return asked, Features(torch.cat(parts), names, styles), pictures


STICKER_STYLES = ("noto", "flat", "3d", "twemoji")


def drawing_quality(made: torch.Tensor, chosen: list[int], asked: Asked, real: Features) -> dict[str, Any]:
    """Numbers for features `made` (N, D) of images for the captions `chosen`.

    "frechet", "precision", "recall": against the real images of the same captions, as many as were made;
    "retrieval": among all real images.
    """
    concepts, styles = [asked.concepts[i] for i in chosen], [asked.styles[i] for i in chosen]
    same = real.values[chosen]
    precision, recall = precision_recall(same, made)
    return {
        "frechet": round(frechet_distance(same, made), 3),
        "precision": round(precision, 4),
        "recall": round(recall, 4),
        "retrieval": retrieval(made, concepts, styles, real.values, real.concepts, real.styles),
    }


def validation_loss(pipe: Any, images: torch.Tensor, captions: list[str]) -> dict[str, Any]:
    """Prediction error by timestep of a text-to-image pipeline on real images (N, 3, H, W) in -1..1.

    `BINS` equal parts of the timesteps, each with a share of the images; see `training.diffusion_task`.

    Raises:
        ConfigurationError: the pipeline is not like Stable Diffusion (one text encoder, UNet2DConditionModel, VAE).
    """
    from diffusion_accel.training.denoising import Process
    from diffusion_accel.training.diffusion_task import Denoiser, prediction_error

    reason = not_measurable(pipe)
    if reason:
        raise ConfigurationError(reason)
    config, tokenizer = pipe.scheduler.config, pipe.tokenizer
    schedules = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
    process = Process(config.prediction_type, schedules[config.beta_schedule])
    padding = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
    ids = torch.tensor(tokenizer(captions, **padding).input_ids)
    with torch.no_grad():
        parts = [pipe.vae.encode(part.to(pipe.device)).latent_dist.mean.float().cpu() for part in images.split(16)]
        clean = torch.cat(parts) * pipe.vae.config.scaling_factor
        return prediction_error(Denoiser(pipe.unet, pipe.text_encoder), clean, ids, process, bins=BINS)


def not_measurable(pipe: Any) -> str | None:
    """Why the validation loss of this pipeline cannot be measured, or None."""
    config = getattr(pipe.scheduler, "config", {})
    name = type(pipe).__name__
    if type(getattr(pipe, "unet", None)).__name__ != "UNet2DConditionModel" or getattr(pipe, "text_encoder_2", None):
        return f"the validation loss is for pipelines with one text encoder and a UNet2DConditionModel, not {name}"
    if config.get("prediction_type") not in ("epsilon", "v_prediction"):
        return f"the validation loss needs an epsilon or v-prediction scheduler, not {type(pipe.scheduler).__name__}"
    if config.get("beta_schedule") not in ("linear", "scaled_linear", "squaredcos_cap_v2"):
        return f"the validation loss does not know the beta schedule {config.get('beta_schedule')!r}"
    return None


def embedded_prompts(count: int, skip: int = 0) -> list[str]:
    """Captions of the embedded model's training images, the same ones every time, behind the `skip` first."""
    asked, _ = embedded_reference()
    return [asked.captions[i] for i in asked.choose("train", count, skip)]
