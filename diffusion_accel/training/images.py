"""Grids of images, and the error between images."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from diffusion_accel.io import replacing
from diffusion_accel.measure.fidelity import psnr


def save_grid(images: torch.Tensor, columns: int, path: Path, scale: int = 1) -> None:
    """Write images (N, 3, H, W) in -1..1 as one PNG, row by row, each pixel `scale` pixels wide."""
    n, _, height, width = images.shape
    rows = -(-n // columns)
    grid = torch.ones(3, rows * height, columns * width)
    for i, image in enumerate(images.float().clamp(-1, 1).cpu()):
        y, x = i // columns * height, i % columns * width
        grid[:, y : y + height, x : x + width] = image
    pixels = ((grid + 1) * 127.5 + 0.5).byte().permute(1, 2, 0).numpy()
    sheet = Image.fromarray(pixels)
    if scale > 1:
        sheet = sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)
    with replacing(path) as temporary:
        sheet.save(temporary)


def image_loss(error: torch.Tensor) -> torch.Tensor:
    """MSE + 0.25 L1 + 0.25 L1 of the gradients of an error (N, C, H, W): what decoders of images are trained on."""
    gradients = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return (error**2).mean() + 0.25 * error.abs().mean() + 0.25 * gradients


def mean_psnr(first: torch.Tensor, second: torch.Tensor) -> float:
    """Mean over images of the peak signal-to-noise ratio in dB, for (N, 3, H, W) in -1..1; equal ones count as 96."""
    return float(psnr(first.float() / 2 + 0.5, second.float() / 2 + 0.5).clamp(max=96).mean())
