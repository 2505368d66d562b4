"""Adapter files, and a denoiser's prediction with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from zoo import DIM, TOKENS, rand

from diffusion_accel.transparency.adapter import read_changes
from diffusion_accel.transparency.attention_sharing import Sharing
from diffusion_accel.transparency.weights import read_weights


def predict(model: Any, sample: torch.Tensor | None = None, batch: int = 2) -> torch.Tensor:
    sample = rand(batch, 4, 8, 8) if sample is None else sample
    with torch.no_grad():
        return model(sample, 500, rand(len(sample), TOKENS, DIM, seed=1)).sample


def written(folder: Path, tensors: dict[str, torch.Tensor], name: str = "adapter.safetensors") -> Path:
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)
    return folder / name


def changes_of(file: Path) -> Any:
    return read_changes(file, read_weights(file))


def sharing_of(file: Path, model: Any, frames: int) -> Sharing:
    return Sharing(file, read_weights(file), model, frames)
