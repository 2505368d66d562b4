"""Reading what the stages leave for each other: arrays of images, and tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from diffusion_accel.io import first_line
from diffusion_accel.model_files.tensors import check_values, read_tensors

from .files import TrainingError


def load_array(path: Path) -> np.ndarray:
    """An array of images (N, H, W, channels), uint8, mapped into memory.

    Raises:
        TrainingError: the file is none, or cut off.
    """
    try:
        if not path.is_file():
            raise ValueError("it is no regular file")
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy raises many kinds for broken headers
        raise TrainingError(f"{path} is no whole array: {first_line(error)}") from error
    if not isinstance(found, np.ndarray) or found.ndim != 4 or found.dtype != np.uint8:
        raise TrainingError(f"{path} holds no images")
    return found


def load_tensors(path: Path, *names: str) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, which must have these names; all numbers finite.

    Raises:
        TrainingError: it is broken, or lacks one.
    """
    found = read_tensors(path, error=TrainingError)
    missing = [name for name in names if name not in found]
    if missing:
        raise TrainingError(f"{path} lacks the tensor {missing[0]}")
    check_values({name: x for name, x in found.items() if x.is_floating_point()}, path, TrainingError)
    return found
