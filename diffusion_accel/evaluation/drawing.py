"""How near what a model draws is to real images, and whether it is what was asked for."""

from __future__ import annotations

from typing import Any

import torch

from .classifier import Features
from .distribution import frechet_distance, precision_recall, retrieval
from .prompts import Asked


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
