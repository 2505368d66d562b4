"""Layers: stacking them, and how well they make up an image again.

Everywhere: straight colours (N, 3, H, W) and alpha (N, 1, H, W), in 0..1; gradients flow to all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from diffusion_accel.arguments import with_old_keywords

Layer = tuple[torch.Tensor, torch.Tensor]
_EMPTY = 1e-8


def stack_layers(layers: Sequence[Layer]) -> Layer:
    """Layers, the lowest first, as one (Porter and Duff 1984, "over"): straight colours and alpha.

    Colours are zero where nothing covers. Raises `ValueError` for no layers.
    """
    if not layers:
        raise ValueError("there are no layers to stack")
    premultiplied, covered = torch.zeros_like(layers[0][0]), torch.zeros_like(layers[0][1])
    for rgb, alpha in layers:
        premultiplied = rgb * alpha + premultiplied * (1 - alpha)
        covered = alpha + covered * (1 - alpha)
    return premultiplied / covered.clamp(min=_EMPTY), covered


@with_old_keywords(picture="image")
def recomposition_error(layers: Sequence[Layer], image: torch.Tensor, background: float = 0.5) -> torch.Tensor:
    """Mean square error of the stacked layers (over a grey where nothing covers) against `image`, (N,).

    The consistency of a decomposition into foreground and background, as LayerDecomp asks for (CVPR 2025). Zero for
    layers that make up the image exactly.
    """
    rgb, alpha = stack_layers(layers)
    made = rgb * alpha + background * (1 - alpha)
    return ((made - image) ** 2).flatten(1).mean(1)
