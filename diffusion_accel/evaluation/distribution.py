"""Distances between two sets of images, on features (N, D) of a classifier."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def frechet_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Fréchet distance of Gaussians fitted to two feature sets (N, D), (M, D): |μ1-μ2|² + tr(C1 + C2 - 2 (C1 C2)^½).

    The formula of Heusel et al. 2017 (equation 6). Covariances divide by N - 1. 0 for identical sets. The fewer
    images, the larger it is for sets of the same kind: compare only at equal sizes.
    """
    first, second = first.double(), second.double()
    means = (first.mean(0) - second.mean(0)).square().sum()
    one, two = (torch.cov(values.T).reshape(values.shape[1], values.shape[1]) for values in (first, second))
    root = _root(one)
    crossed = torch.linalg.eigvalsh(root @ two @ root).clamp(min=0).sqrt().sum()
    return max(0.0, float(means + one.trace() + two.trace() - 2 * crossed))


def _root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T


def precision_recall(real: torch.Tensor, made: torch.Tensor, k: int = 3) -> tuple[float, float]:
    """Precision and recall of Kynkäänniemi et al. 2019 (equations 1, 2), with balls to the k-th neighbour.

    Precision: share of the made samples inside the ball of a real one; recall: share of the real inside the ball of a
    made one. Both are 1 for identical sets.
    """
    return _covered(real, made, k), _covered(made, real, k)


def _covered(centres: torch.Tensor, points: torch.Tensor, k: int) -> float:
    centres, points = centres.double(), points.double()
    between = torch.cdist(centres, centres)
    radius = between.kthvalue(min(k + 1, len(centres)), dim=1).values  # the nearest one is the point itself
    return float((torch.cdist(points, centres) <= radius + 1e-9).any(1).double().mean())


def retrieval(
    made: torch.Tensor, concepts: list[str], styles: list[str], real: torch.Tensor, names: list[str], kinds: list[str]
) -> dict[str, Any]:
    """Is the real image whose features have the highest cosine with a made one of the asked concept?

    Args:
        made, concepts, styles: features (N, D) and what was asked for; an empty style is any.
        real, names, kinds: features (M, D), concepts and styles of the real images.

    Returns:
        Shares: "style_top1" and "style_top5" (among the real images of the asked style), "any_top1", "any_top5"
        (among all), "nearest_style" (the nearest image has the asked style).
    """
    order = (F.normalize(made, dim=1) @ F.normalize(real, dim=1).T).argsort(1, descending=True)
    return hit_shares(order.tolist(), concepts, styles, names, kinds)


def hit_shares(
    order: list[list[int]], concepts: list[str], styles: list[str], names: list[str], kinds: list[str]
) -> dict[str, Any]:
    """The shares of `retrieval` from the real images of each made one, the nearest first."""
    hits: dict[str, list[bool]] = {}
    for nearest, concept, style in zip(order, concepts, styles, strict=True):
        same = [i for i in nearest if not style or kinds[i] == style]
        for kind, found in (("style", same), ("any", nearest)):
            top = [names[i] == concept for i in found[:5]]
            hits.setdefault(f"{kind}_top1", []).append(bool(top and top[0]))
            hits.setdefault(f"{kind}_top5", []).append(any(top))
        hits.setdefault("nearest_style", []).append(not style or kinds[nearest[0]] == style)
    return {"n": len(concepts)} | {name: round(sum(values) / len(values), 4) for name, values in hits.items()}
