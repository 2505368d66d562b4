#!/usr/bin/env python3
"""What the numbers of `diffusion-accel evaluate` mean: real stickers against other real ones and degraded ones.

    python scripts/calibrate_features.py --data data/stickers

Prints a Markdown table. Every row compares 300 real stickers of the embedded model's concepts, in four styles, with
what the row says, on the features of the classifier that ships.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from training_options import guarded

from diffusion_accel.evaluation import prompts
from diffusion_accel.evaluation.classifier import extract, load_classifier
from diffusion_accel.evaluation.distribution import frechet_distance, precision_recall
from diffusion_accel.evaluation.drawing import drawing_quality
from diffusion_accel.model_files.names import EMBEDDED
from diffusion_accel.training.datasets import as_tensor
from diffusion_accel.training.models import load_vae


def through_pil(change: Callable[[Image.Image], Image.Image]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A change of Pillow images as one of tensors in -1..1."""

    def run(images: torch.Tensor) -> torch.Tensor:
        pixels = ((images + 1) * 127.5 + 0.5).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        return as_tensor(np.stack([np.asarray(change(Image.fromarray(p)).convert("RGB")) for p in pixels]))

    return run


def jpeg(quality_: int) -> Callable[[Image.Image], Image.Image]:
    """Writing and reading an image as a JPEG of a quality."""

    def change(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality_)
        return Image.open(buffer)

    return change


def noise(strength: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Adding Gaussian noise of a deviation, in shares of the range."""

    def run(images: torch.Tensor) -> torch.Tensor:
        made = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        return (images + 2 * strength * made).clamp(-1, 1)

    return run


@torch.no_grad()
def run(options: argparse.Namespace) -> None:
    """Print a row for every change of real stickers."""
    model = load_classifier()
    asked, real, load = prompts.reference_of(options.data, model)
    reference = prompts.embedded_reference()[0]
    known = [i for i, split in enumerate(reference.splits) if split]
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(1)).tolist()
    first, second = ([known[i] for i in order[a : a + options.count]] for a in (0, options.count))
    images = load(first)
    vae = load_vae(EMBEDDED["sticker"].path)
    rows: list[tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = [
        ("the same", lambda p: p),
        ("through the embedded VAE", lambda p: torch.cat([_round_trip(vae, part) for part in p.split(32)])),
        ("blurred, radius 1 px", through_pil(lambda i: i.filter(ImageFilter.GaussianBlur(1)))),
        ("blurred, radius 2 px", through_pil(lambda i: i.filter(ImageFilter.GaussianBlur(2)))),
        ("noise of 5 %", noise(0.05)),
        ("noise of 15 %", noise(0.15)),
        ("JPEG, quality 20", through_pil(jpeg(20))),
        ("at 24×24 pixels", lambda p: F.interpolate(F.adaptive_avg_pool2d(p, 24), 96, mode="bicubic").clamp(-1, 1)),
        ("mirrored", lambda p: p.flip(-1)),
        ("colours inverted", lambda p: -p),
    ]
    print("| 300 real stickers against | Fréchet | precision | recall | right concept, same style | any style |")
    print("|" + " --- |" * 6)
    for name, change in rows:
        values = drawing_quality(extract(model, change(images)), first, asked, real)
        show(name, values["frechet"], values["precision"], values["recall"], values["retrieval"])
    a, b = real.values[first], real.values[second]
    show("other real ones of the same kind", frechet_distance(a, b), *precision_recall(a, b), None)
    other = [i for i, split in enumerate(reference.splits) if not split][: options.count]
    c = real.values[other]
    show("real ones of other concepts", frechet_distance(a, c), *precision_recall(a, c), None)
    for style in prompts.STICKER_STYLES:
        d = real.values[[i for i in known if real.styles[i] == style][: options.count]]
        show(f"real ones in the style {style} alone", frechet_distance(a, d), *precision_recall(a, d), None)


def _round_trip(vae: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    return vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)  # type: ignore[operator,union-attr]


def show(name: str, distance: float, precision: float, recall: float, found: dict[str, float] | None) -> None:
    """Print one row."""
    shares = [f"{found[key]:.1%}" for key in ("style_top1", "any_top1")] if found else ["–", "–"]
    print(f"| {name} | {distance:.2f} | {precision:.1%} | {recall:.1%} | {' | '.join(shares)} |", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/stickers"), help="sticker data set")
    parser.add_argument("--count", type=int, default=300)
    return guarded(run, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
