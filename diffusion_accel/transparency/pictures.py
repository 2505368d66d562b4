"""Pictures with alpha as PIL images and arrays, between callers and tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from ..evaluation.pictures import over

GREY = (127, 127, 127)


def rgba_tensor(image: Any) -> torch.Tensor | None:
    """(N, 4, H, W) in 0..1 of a PIL image or a list of them, opaque ones included; None for anything else."""
    images = image if isinstance(image, (list, tuple)) else [image]
    if not images or not all(isinstance(one, Image.Image) for one in images):
        return None
    arrays = [np.asarray(one.convert("RGBA"), np.float32) / 255 for one in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def flattened(image: Any) -> Any:
    """A PIL image or a list of them over mid-grey, as RGB."""
    return [over(one, GREY) for one in image] if isinstance(image, (list, tuple)) else over(image, GREY)


def to_pil(rgba: torch.Tensor) -> list[Image.Image]:
    """(N, 4, H, W) or (N, 3, H, W) in 0..1 -> RGBA or RGB images, rounded."""
    pixels = (rgba.permute(0, 2, 3, 1).float().cpu().numpy() * 255).round().astype(np.uint8)
    return [Image.fromarray(one) for one in pixels]


def to_type(images: Any, rows: list[int], rgba: torch.Tensor) -> Any:
    """`images` as a pipeline returned them, with `rgba` (len(rows), 4, H, W) in the place of some rows.

    A list of PIL images keeps its other ones. Arrays (N, H, W, 3) and tensors (N, 3, H, W) get a fourth channel, which
    is 1 in other rows.
    """
    if isinstance(images, list):
        made = list(images)
        for i, one in zip(rows, to_pil(rgba), strict=True):
            made[i] = one
        return made
    if isinstance(images, np.ndarray):
        opaque = np.concatenate([images, np.ones_like(images[..., :1])], -1)
        opaque[rows] = rgba.permute(0, 2, 3, 1).float().cpu().numpy()
        return opaque
    opaque_tensor = torch.cat([images, torch.ones_like(images[:, :1])], 1)
    opaque_tensor[rows] = rgba.to(images)
    return opaque_tensor
