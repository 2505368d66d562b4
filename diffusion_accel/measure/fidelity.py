"""Fidelity of images to a reference: PSNR and SSIM, per image, in plain torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.io import shown

EQUAL = 200.0  # dB; what equal images count as where a number is needed, and the most that any two count as
WINDOW = 11  # pixels on a side of SSIM's window; smaller images have none


@dataclass(frozen=True)
class Fidelity:
    """How near images are to a reference, image by image.

    Attributes:
        psnr: of each image, in dB; infinite for equal images.
        ssim: of each image, −1 … 1; empty where the images are smaller than SSIM's window (11x11 pixels).
    """

    psnr: tuple[float, ...]
    ssim: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.psnr)

    @property
    def psnr_median(self) -> float:
        """In dB, at most `EQUAL`."""
        return spread(self.psnr)[0]

    @property
    def psnr_worst_decile(self) -> float:
        """The PSNR in dB that nine images of ten reach, at most `EQUAL`."""
        return spread(self.psnr)[1]

    @property
    def ssim_median(self) -> float | None:
        """None for images that are too small for SSIM."""
        return spread(self.ssim)[0] if self.ssim else None

    @property
    def ssim_worst_decile(self) -> float | None:
        """The SSIM that nine images of ten reach; None for images that are too small for it."""
        return spread(self.ssim)[1] if self.ssim else None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values: PSNR with two digits (None for equal images), SSIM with four."""
        return {
            "psnr": [None if value == float("inf") else round(value, 2) for value in self.psnr],
            "ssim": [round(value, 4) for value in self.ssim],
        }


def fidelity(reference: torch.Tensor | Sequence[Image.Image], images: torch.Tensor | Sequence[Image.Image]) -> Fidelity:
    """PSNR and SSIM of each image to the one of the reference in the same place.

    Args:
        reference, images: (N, C, H, W) in [0, 1], or N PIL images of one size (`as_tensor`).

    Returns:
        The numbers of each image, their medians and worst deciles.

    Raises:
        ConfigurationError: they are not two batches of one shape.
    """
    a, b = (x if isinstance(x, torch.Tensor) else as_tensor(x) for x in (reference, images))
    values = psnr(a, b).tolist()
    return Fidelity(tuple(values), tuple(ssim(a, b).tolist()) if min(a.shape[-2:]) >= WINDOW else ())


def decibels(value: float, unit: str = " dB") -> str:
    """A PSNR for people: "46.1 dB", or "equal" of images that are the same."""
    return "equal" if value >= EQUAL else f"{value:.1f}{unit}"


def spread(values: Sequence[float] | torch.Tensor, most: float = EQUAL) -> tuple[float, float]:
    """Median and worst decile (the value that nine of ten reach); none of the values counts as more than `most`."""
    finite = torch.as_tensor(values, dtype=torch.float64).clamp(max=most)
    return float(finite.quantile(0.5)), float(finite.quantile(0.1))


def conformal_floor(values: Sequence[float] | torch.Tensor, share: float = 0.9) -> float | None:
    """What a new value reaches with a probability of at least `share`, whatever the values' distribution.

    Of n values that nothing was fitted to it is the ⌊(n + 1)(1 − share)⌋-th smallest. If a new value is exchangeable
    with them (the same kind of prompts, model and settings), the probability that it lies below is at most 1 − share,
    over the draws of both; for one set of values it may be more. Source: split conformal prediction (Vovk, Gammerman
    and Shafer, "Algorithmic Learning in a Random World", 2005; Lei et al., "Distribution-Free Predictive Inference for
    Regression", JASA 2018, section 2.2).

    Args:
        values: such as the PSNR of held-out images; none is not a number.
        share: above 0 and below 1.

    Returns:
        One of the values, at most `EQUAL`; None if they are too few to say so (fewer than 9 for a share of 0.9).

    Raises:
        ConfigurationError: a value is not a number, or the share is not between 0 and 1.
    """
    finite = torch.as_tensor(values, dtype=torch.float64).flatten().clamp(max=EQUAL)
    if not 0 < share < 1 or bool(finite.isnan().any()):
        raise ConfigurationError(f"a floor needs numbers and a share between 0 and 1, got a share of {shown(share)}")
    rank = math.floor((len(finite) + 1) * (1 - share) + 1e-9)  # 10 · (1 − 0.9) is a little less than 1 in floats
    return float(finite.kthvalue(rank).values) if rank else None


def as_tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    """PIL images of one size as (N, 3, H, W) in [0, 1]; RGBA ones as (N, 4, H, W), colours premultiplied by alpha."""
    images = list(images) if isinstance(images, Iterable) else []
    if not images or not all(isinstance(image, Image.Image) for image in images):
        raise ConfigurationError("images must be a tensor (N, C, H, W) or PIL images, at least one")
    mode = "RGBA" if images[0].mode == "RGBA" else "RGB"
    arrays = np.stack([np.asarray(image.convert(mode), dtype=np.float32) / 255 for image in images])
    if mode == "RGBA":
        arrays[..., :3] *= arrays[..., 3:]
    return torch.from_numpy(arrays).permute(0, 3, 1, 2)


def psnr(reference: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio, −10·log10(mean squared error) for a peak of 1, in dB; infinite for equal images.

    Args:
        reference, images: (N, C, H, W) in [0, 1].

    Returns:
        (N,), float64.
    """
    _check(reference, images)
    error = (reference.double() - images.double()).square().flatten(1).mean(1)
    return -10 * error.log10()


def ssim(reference: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang, Bovik, Sheikh and Simoncelli 2004, equation 13), −1 … 1, 1 for equal images.

    Gaussian window of 11×11 pixels with σ = 1.5, K1 = 0.01, K2 = 0.03, averaged over channels and over the positions
    at which the whole window lies inside the image.

    Args:
        reference, images: (N, C, H, W) in [0, 1] with H, W ≥ 11.

    Returns:
        (N,), float64.
    """
    _check(reference, images)
    channels, height, width = reference.shape[1:]
    if min(height, width) < WINDOW:
        raise ConfigurationError(f"SSIM needs images of at least {WINDOW}x{WINDOW} pixels, got {width}x{height}")
    offsets = torch.arange(-5, 6, dtype=torch.float64, device=reference.device)
    window = torch.exp(-offsets.square() / (2 * 1.5**2))
    window = window / window.sum()
    columns, rows = window.view(1, 1, -1, 1), window.view(1, 1, 1, -1)

    def local_mean(x: torch.Tensor) -> torch.Tensor:
        vertical = F.conv2d(x, columns.expand(channels, 1, -1, 1), groups=channels)
        return F.conv2d(vertical, rows.expand(channels, 1, 1, -1), groups=channels)

    x, y = reference.double(), images.double()
    mean_x, mean_y = local_mean(x), local_mean(y)
    variance_x = local_mean(x * x) - mean_x.square()
    variance_y = local_mean(y * y) - mean_y.square()
    covariance = local_mean(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    return (luminance * structure).flatten(1).mean(1)


def _check(reference: torch.Tensor, images: torch.Tensor) -> None:
    if reference.dim() != 4 or reference.shape != images.shape:
        raise ConfigurationError(
            f"expected two batches of images of one shape (N, C, H, W), got {tuple(reference.shape)} "
            f"and {tuple(images.shape)}"
        )
