"""The size of image that a model was trained for."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from . import denoisers  # its names are loaded when they are used: this module needs no torch

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FAR = 2.0  # times the area, or a part of it, from which on a size is far from the one trained for


def trained_size(pipe: DiffusionPipeline) -> tuple[int, int] | None:
    """Width and height in pixels that the denoiser was trained for; None where nothing says so."""
    sample = getattr(getattr(denoisers.find_denoiser(pipe), "config", None), "sample_size", None)
    if sample is None and (side := _side_of_vae(pipe)):
        return side, side
    if sample is None:  # of Flux and Qwen-Image: a constant of the class, whatever model it has
        sample = getattr(pipe, "default_sample_size", None)
    factor = getattr(pipe, "vae_scale_factor", None)
    if factor is None and denoisers.draws_pixels(pipe):
        factor = 1
    sides: list[Any] = list(sample) if isinstance(sample, (list, tuple)) else [sample, sample]
    if not isinstance(factor, int) or len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        return None
    return int(sides[1]) * factor, int(sides[0]) * factor


def side_to_ask_for(pipe: DiffusionPipeline) -> int | None:
    """The side in pixels that a pipeline has to be asked for, to draw what its model was trained for: Flux draws what a
    constant of its class says, whatever model it has. None where it does so by itself, or nothing says what that is."""
    if getattr(getattr(denoisers.find_denoiser(pipe), "config", None), "sample_size", None) is not None:
        return None
    side, usual = _side_of_vae(pipe), getattr(pipe, "default_sample_size", None)
    factor = getattr(pipe, "vae_scale_factor", None)
    if side is None or not isinstance(usual, int) or not isinstance(factor, int) or side == usual * factor:
        return None
    return side


def _side_of_vae(pipe: DiffusionPipeline) -> int | None:
    """The side in pixels that the VAE was trained for; None where its config has what diffusers writes by itself."""
    vae = getattr(pipe, "vae", None)
    side = getattr(getattr(vae, "config", None), "sample_size", None)
    usual = inspect.signature(type(vae)).parameters.get("sample_size")
    return side if isinstance(side, int) and side > 0 and usual is not None and side != usual.default else None


def far_from_trained(pipe: DiffusionPipeline, width: int | None, height: int | None) -> str | None:
    """A sentence if an image of this size has far more or fewer pixels than the model was trained for.

    Args:
        pipe: a loaded pipeline.
        width, height: pixels; None: what the model draws by itself.
    """
    known = trained_size(pipe)
    if known is None:
        return None
    size = (width or known[0], height or known[1])
    ratio = size[0] * size[1] / (known[0] * known[1])
    if 1 / FAR <= ratio <= FAR:
        return None
    return (
        f"the model was trained for {known[0]}x{known[1]} pixels; at {size[0]}x{size[1]} it may not draw what the "
        "prompt says"
    )
