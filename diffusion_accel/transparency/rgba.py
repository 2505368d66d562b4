"""Images with transparency as tensors: padded colours, compositing, backgrounds.

Everywhere: colours (N, 3, H, W) and alpha (N, 1, H, W), in 0..1; "straight" colours are not multiplied by alpha.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from diffusion_accel.compositing import odd_fields

SHRINK = 1.2  # of the pyramid, level to level
CHECKER = 64  # pixels on a side of a field of the preview's checkerboard
_EMPTY = 1e-8


@functools.lru_cache(maxsize=256)
def _area_weights(size: int, smaller: int) -> torch.Tensor:
    """(smaller, size): each new pixel is the mean of the old ones that it covers, parts of pixels included."""
    edges = torch.arange(smaller + 1, dtype=torch.float64) * size / smaller
    pixels = torch.arange(size, dtype=torch.float64)
    covered = torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)
    return (covered.clamp(min=0) * smaller / size).float()


def shrink(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Area resampling of (N, C, H, W) to a smaller size: each new pixel is the mean of the area that it covers."""
    rows = _area_weights(x.shape[-2], height).to(x)
    columns = _area_weights(x.shape[-1], width).to(x)
    return rows @ x @ columns.T


def padded_rgb(rgb: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Colours that go on smoothly where alpha is zero: straight `rgb` and `alpha` -> (N, 3, H, W).

    A pyramid of premultiplied colour and alpha is filled from its coarsest level on (LayerDiffuse, "padded RGB").
    Opaque pixels keep their colour, an image of one colour stays constant, an empty one becomes black.
    """
    pyramid = [(rgb * alpha, alpha)]
    while min(pyramid[-1][1].shape[-2:]) > 1:
        colour, opacity = pyramid[-1]
        height, width = (max(1, int(side / SHRINK)) for side in opacity.shape[-2:])
        pyramid.append((shrink(colour, height, width), shrink(opacity, height, width)))
    colour, opacity = pyramid[-1]
    filled = colour.sum((2, 3), keepdim=True) / opacity.sum((2, 3), keepdim=True).clamp(min=_EMPTY)
    for colour, opacity in reversed(pyramid):
        filled = F.interpolate(filled, size=opacity.shape[-2:], mode="bilinear", align_corners=False)
        filled = colour + filled * (1 - opacity)
    return filled


def composite(rgb: torch.Tensor, alpha: torch.Tensor, background: torch.Tensor | float) -> torch.Tensor:
    """Straight colours over a background (a tensor that broadcasts, or one grey value): α·rgb + (1 - α)·background."""
    return alpha * rgb + (1 - alpha) * background


def on_grey(rgb: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """What the VAE is given: the image over mid-grey, as (2·rgb - 1)·α in -1..1."""
    return (2 * rgb - 1) * alpha


def straight(premultiplied: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Straight colours of premultiplied ones; zero where alpha is zero."""
    return torch.where(alpha > 0, premultiplied / alpha.clamp(min=_EMPTY), torch.zeros_like(premultiplied)).clamp(0, 1)


def resized(rgba: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Straight RGBA (N, 4, H, W) cut to a shape from the middle, then resized: (N, 4, height, width).

    Colours are multiplied by alpha meanwhile, so what cannot be seen does not come up at the rim of what can.
    """
    h, w = rgba.shape[-2:]
    if h * width > w * height:
        keep = max(1, round(w * height / width))
        rgba = rgba[..., (h - keep) // 2 : (h - keep) // 2 + keep, :]
    else:
        keep = max(1, round(h * width / height))
        rgba = rgba[..., (w - keep) // 2 : (w - keep) // 2 + keep]
    if tuple(rgba.shape[-2:]) == (height, width):
        return rgba
    seen = torch.cat([rgba[:, :3] * rgba[:, 3:], rgba[:, 3:]], 1)
    seen = F.interpolate(seen, (height, width), mode="bilinear", antialias=True).clamp(0, 1)
    return torch.cat([straight(seen[:, :3], seen[:, 3:]), seen[:, 3:]], 1)


def checkerboard(height: int, width: int, field: int = CHECKER, low: float = 0.45, high: float = 0.55) -> torch.Tensor:
    """(1, 1, height, width): fields of two greys, the preview's background."""
    return torch.where(torch.from_numpy(odd_fields(height, width, field)), high, low)[None, None]
