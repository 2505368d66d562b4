"""What a pipeline returns beside its images, and what its VAE decoded for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from diffusion_accel.errors import UnsupportedPipelineError


def last_decoded(decoded: list[tuple[torch.Tensor, torch.Tensor]], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The last `count` rows of what went into the VAE's decoder and of what came out.

    Raises:
        UnsupportedPipelineError: there are fewer.
    """
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    for pair in reversed(decoded):
        if sum(len(z) for z, _ in parts) >= count:
            break
        parts.insert(0, pair)
    found = sum(len(z) for z, _ in parts)
    if found < count:
        raise UnsupportedPipelineError(
            f"transparent: the pipeline returned {count} images of {found} that its VAE decoded; it cannot be made "
            "transparent, use views=0 or switch the feature off"
        )
    z, sample = (torch.cat([pair[k] for pair in parts])[-count:] for k in (0, 1))
    return z, sample


def blocked(output: Any) -> set[int]:
    """The images that a safety checker has blocked."""
    said = output[1] if isinstance(output, tuple) and len(output) > 1 else None
    said = said if isinstance(output, tuple) else getattr(output, "nsfw_content_detected", None)
    if not isinstance(said, (list, tuple)) or not all(isinstance(one, (bool, np.bool_)) for one in said):
        return set()  # a caption, for example
    return {i for i, one in enumerate(said) if one}
