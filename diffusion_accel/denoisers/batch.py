"""What a denoiser is given and returns: a batch as one tensor, or as a list of samples (Z-Image)."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch

_LATENTS_ARGUMENTS = ("sample", "hidden_states", "x")


def latents_argument(names: Container[str]) -> str | None:
    """Which of a denoiser's arguments is the latents; None if none of them is."""
    return next((name for name in _LATENTS_ARGUMENTS if name in names), None)


def latents_of(named: dict[str, Any]) -> torch.Tensor:
    """The latents among the arguments of a denoiser, a list of samples as one batch."""
    return _together(named[latents_argument(named) or ""])


def lists_samples(named: dict[str, Any]) -> bool:
    """Whether a denoiser is given a list of samples; then a list of as many things has one for each."""
    return isinstance(named[latents_argument(named) or ""], list)


def prediction(output: Any) -> torch.Tensor:
    """The prediction in what a denoiser returned (a tuple or an output dataclass), a list of samples as one batch."""
    return _together(output[0] if isinstance(output, tuple) else output.sample)


def with_prediction(output: Any, sample: torch.Tensor) -> Any:
    """The same kind of output around another prediction."""
    own = output[0] if isinstance(output, tuple) else output.sample
    value = list(sample.unbind()) if isinstance(own, list) else sample
    return (value, *output[1:]) if isinstance(output, tuple) else type(output)(sample=value)


def like_latents(value: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """What a denoiser is given or returns in the form of the pipeline's latents: those of an image have no dimension
    for frames, which a model of videos too has for it (Z-Image)."""
    frames = value.dim() == latents.dim() + 1 == 5 and value.shape[2] == 1
    return value.squeeze(2) if frames else value


def _together(batch: Any) -> torch.Tensor:
    return torch.stack(batch) if isinstance(batch, list) else batch
