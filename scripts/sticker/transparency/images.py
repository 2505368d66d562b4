"""The cached stickers as straight colours and alpha."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from diffusion_accel.transparency.rgba import straight

MARGIN = 6  # pixels between the border and what the adapted UNet learns to draw


def rgba_of(images: np.ndarray, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Straight colours and alpha, in 0..1, of some of the cached images."""
    pixels = torch.from_numpy(images[indices]).permute(0, 3, 1, 2).float() / 255
    alpha = pixels[:, 3:].contiguous()
    return straight(pixels[:, :3], alpha), alpha


def with_margin(rgb: torch.Tensor, alpha: torch.Tensor, margin: int = MARGIN) -> tuple[torch.Tensor, torch.Tensor]:
    """Straight colours and alpha, those images `margin` pixels smaller on each side that come nearer to the border.

    An image that is cut off by its border cannot be put on another one.
    """
    near = F.pad(alpha[..., margin:-margin, margin:-margin], (margin,) * 4).ne(alpha).flatten(1).any(1)
    side = [length - 2 * margin for length in alpha.shape[-2:]]
    small = F.interpolate(torch.cat([rgb * alpha, alpha], 1), side, mode="bicubic", antialias=True).clamp(0, 1)
    small = F.pad(small, (margin,) * 4)
    smaller = straight(small[:, :3], small[:, 3:]), small[:, 3:]
    chosen = near[:, None, None, None]
    return torch.where(chosen, smaller[0], rgb), torch.where(chosen, smaller[1], alpha)
