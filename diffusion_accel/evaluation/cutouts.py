"""Whether an image with alpha is a clean cut-out."""

from __future__ import annotations

import numpy as np

BORDER = 0.05  # largest alpha on the outermost pixels
PART = 0.95  # least share of the largest connected part
EDGE = 3.0  # widest soft edge, in pixels
HOLES = 0.005  # largest share of holes in the filled silhouette
_CLEAR, _SOLID = 0.05, 0.95  # alpha between them is soft


def cutout_faults(alpha: np.ndarray) -> list[str]:
    """What keeps alpha (H, W) in 0..1 from being a clean cut-out; empty for a clean one.

    "empty": nothing is opaque. "border": the outermost pixels are not transparent. "parts": the largest connected part
    (alpha above 1/2, neighbours over corners included) holds less than 95%. "edge": a soft region is wider than 3
    pixels. "holes": the filled silhouette has holes. Real images have faults too (what touches the border, pairs,
    rings, smoke), so the share among real ones is the scale to read a share by.
    """
    from scipy import ndimage  # optional package

    solid = alpha > 0.5
    if not solid.any():
        return ["empty"]
    faults = []
    if max(alpha[0].max(), alpha[-1].max(), alpha[:, 0].max(), alpha[:, -1].max()) > BORDER:
        faults.append("border")
    parts, count = ndimage.label(solid, np.ones((3, 3)))
    sizes = ndimage.sum_labels(solid, parts, range(1, count + 1))
    if sizes.max() < PART * sizes.sum():
        faults.append("parts")
    soft = np.pad((alpha > _CLEAR) & (alpha < _SOLID), 1)
    if soft.any() and 2 * ndimage.distance_transform_edt(soft).max() - 1 > EDGE:
        faults.append("edge")
    filled = ndimage.binary_fill_holes(solid)
    if (filled & ~solid).sum() > HOLES * filled.sum():
        faults.append("holes")
    return faults


def flood_filled(rgb: np.ndarray, tolerance: int = 16) -> np.ndarray:
    """Alpha of an image (H, W, 3) uint8 on white: 0 on the white that is connected to the border, else 1."""
    from scipy import ndimage  # optional package

    white = (255 - rgb.astype(int)).max(-1) <= tolerance
    parts, _ = ndimage.label(np.pad(white, 1, constant_values=True))
    return 1.0 - (parts == parts[0, 0])[1:-1, 1:-1].astype(np.float32)


def thresholded(rgb: np.ndarray, low: int = 8, high: int = 40) -> np.ndarray:
    """Alpha of an image (H, W, 3) uint8 on white by its distance from white, soft between `low` and `high`."""
    distance = (255 - rgb.astype(np.float32)).max(-1)
    return np.clip((distance - low) / (high - low), 0, 1).astype(np.float32)
