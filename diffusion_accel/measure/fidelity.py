"""Fidelity of images to a reference: PSNR and SSIM, per image, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from diffusion_accel.errors import ConfigurationError


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
    if min(height, width) < 11:
        raise ConfigurationError(f"SSIM needs images of at least 11x11 pixels, got {width}x{height}")
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
