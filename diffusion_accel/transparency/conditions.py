"""Given layers as conditions of SDXL's variants, and adapters that are in force for a part of the steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers.hooks import ModelHook

from diffusion_accel.images import open_image

from .images import rgba_tensor
from .rgba import on_grey, resized

if TYPE_CHECKING:
    from diffusion_accel.steps import StepClock


def open_layer(name: str, file: str) -> torch.Tensor:
    """An image file as (1, 4, H, W) in 0..1. Raises `ConfigurationError` if it is not one."""
    made = rgba_tensor(open_image(file, "RGBA", what=f"transparent: {name}"))
    assert made is not None
    return made


@torch.no_grad()
def condition_latents(vae: Any, images: list[torch.Tensor], height: int, width: int) -> torch.Tensor:
    """The latents of given layers, one behind the other: (1, channels x layers, height / 8, width / 8), scaled.

    Each is the VAE's mean of the layer over mid-grey, times the scaling factor, as the published code has it.
    """
    made = []
    for rgba in images:
        fitted = resized(rgba, height, width)
        known = vae.encode(on_grey(fitted[:, :3], fitted[:, 3:]).to(vae.device, vae.dtype)).latent_dist.mean
        made.append((known - (getattr(vae.config, "shift_factor", None) or 0)) * vae.config.scaling_factor)
    return torch.cat(made, 1)


class Concatenated(ModelHook):
    """Appends the conditions' channels to what enters the widened first convolution of a U-Net."""

    def __init__(self, latents: torch.Tensor) -> None:
        super().__init__()
        self.latents = latents
        self.paused = False

    def pre_forward(self, _module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Append the conditions, at the size of what enters."""
        if self.paused:
            return args, kwargs
        x, *rest = args
        latents = self.latents = self.latents.to(x)
        if latents.shape[-2:] != x.shape[-2:]:
            latents = F.interpolate(latents, x.shape[-2:], mode="bilinear", align_corners=False)
        return (torch.cat([x, latents.expand(len(x), -1, -1, -1)], 1), *rest), kwargs


class StopAdapterHook(ModelHook):
    """Calls `stop` once, at the first step of the share of steps that is to run without the adapter."""

    def __init__(self, clock: StepClock, share: float, stop: Callable[[], None]) -> None:
        super().__init__()
        self.clock, self.share, self.stop = clock, share, stop
        self.stopped = False

    def pre_forward(self, _module: torch.nn.Module, *args: object, **kwargs: object) -> Any:
        """Look at the step, and stop the adapter if its share is over."""
        if not self.stopped and self.clock.index >= self.share * self.clock.total:
            self.stopped = True
            self.stop()
        return args, kwargs
