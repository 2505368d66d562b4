"""What a plan needs from the inside of a denoiser and from its scheduler, asked before anything is attached."""

from __future__ import annotations

from typing import Any

from torch import nn

from diffusion_accel.denoisers import not_a_unet
from diffusion_accel.prediction import Conversion

from .plan import Plan


def unmet_need(denoiser: nn.Module, scheduler: Any, kinds: Plan) -> str | None:
    """Why a denoiser cannot follow a plan with these kinds of steps; None if it can."""
    if any(kinds.spaces) and not Conversion(scheduler).possible:
        return (
            f"with {type(scheduler).__name__} a prediction cannot be turned into noise or clean sample; "
            "use hold without epsilon or sample"
        )
    if not_a_unet(denoiser) is None:
        from .unet_hooks import missing_parts
    else:
        from .block_hooks import missing_parts
    return missing_parts(denoiser, kinds)
