"""The images with alpha that a call is given: followed through the pipeline's own processing to where they are read."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from diffusion_accel.denoisers import find_denoiser
from diffusion_accel.errors import ConfigurationError

from .fit import read_by_vae
from .images import Given, given, rgba_tensor
from .rgba import on_grey, resized, straight

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

NEAR = 0.02  # mean distance in -1..1 below which a tensor is a given image; half precision rounds by up to 0.004
ROUGHLY = 0.1  # the same where the image was resized in another way


class GivenImages:
    """What one call is given, what became of it, and where it belongs in what is drawn.

    Attributes:
        given: what the pipeline is called with, and what is known of it.
        seen: pixels as the pipeline processed them, and straight RGBA.
        overlays: where what is drawn goes: mask, RGBA under it, place.
        unread: whether an image with alpha was given whose alpha nothing has read yet.
        size: height and width of what the call draws, in pixels.
    """

    def __init__(self) -> None:
        self.given: list[tuple[Any, Given]] = []
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.overlays: list[tuple[Any, torch.Tensor, Any]] = []
        self.unread = False
        self.size = (0, 0)

    def take(self, arguments: dict[str, Any], pipeline: DiffusionPipeline, readable: bool) -> dict[str, Any]:
        """The arguments of a call with grey behind its images; their alpha is kept.

        Args:
            readable: whether there is an encoder for alpha.

        Raises:
            ConfigurationError: an image can be seen through, and there is none.
        """
        vae, changed = getattr(pipeline, "vae", None), dict(arguments)
        channels = getattr(vae, "config", {}).get("latent_channels")
        for name in read_by_vae(pipeline):
            found = given(arguments.get(name), channels)
            if found is None:
                continue
            if not readable and not found.opaque:
                raise ConfigurationError(
                    f"transparent: {name} has transparent parts, and these weights have no encoder for them; give an "
                    "opaque image, or weights with an encoder"
                )
            changed[name] = found.flat
            self.given += found.parts()
        self.unread = not all(found.opaque for _, found in self.given)
        self.size = self._image_size(arguments, pipeline)
        return changed

    def _image_size(self, arguments: dict[str, Any], pipe: DiffusionPipeline) -> tuple[int, int]:
        starts = self.given and "strength" in inspect.signature(type(pipe).__call__).parameters
        side = getattr(find_denoiser(pipe), "config", {}).get("sample_size") or 64
        scale = 1 if starts else getattr(pipe, "vae_scale_factor", 8)
        sides = self.given[0][1].rgba[0].shape[-2:] if starts else (side,) * 2 if isinstance(side, int) else side
        asked = (arguments.get("height"), arguments.get("width"))
        height, width = (int(one or known * scale) for one, known in zip(asked, sides, strict=True))
        return height // 8 * 8, width // 8 * 8

    def forget(self) -> None:
        """Free the images of a call that has ended; its overlays are still needed for what it returned."""
        self.given, self.seen = [], []

    def known(self, image: Any) -> Given | None:
        """What is known of an image, if it is one that the call was given."""
        if isinstance(image, (list, tuple)) and len(image) == 1 and not any(one is image for one, _ in self.given):
            image = image[0]
        return next((found for one, found in self.given if one is image), None)

    def preprocess(
        self, processor: Any, original: Callable[..., Any], image: Any, *args: object, **kwargs: object
    ) -> Any:
        """The pipeline cuts and resizes a given image; its colours without the grey and its alpha go the same way."""
        pixels, found = original(image, *args, **kwargs), self.known(image)
        if found is not None and isinstance(pixels, torch.Tensor):
            self.seen.append((pixels, _straight(processor, *(original(x, *args, **kwargs) for x in found.layers()))))
        return pixels

    def overlay(
        self,
        original: Callable[..., Any],
        mask: Any,
        init_image: Any,
        image: Any,
        crop_coords: Any = None,
        **kwargs: object,
    ) -> Any:
        """The pipeline puts what was drawn into the whole image; where that is, is kept for RGBA."""
        found = self.known(init_image)
        under = rgba_tensor(init_image)[0] if found is None else found.rgba[0]  # type: ignore[index]
        self.overlays.append((mask, under, crop_coords))
        return original(mask, init_image, image, crop_coords, **kwargs)

    def rgba_of(self, x: torch.Tensor) -> torch.Tensor | None:
        """Straight RGBA (N, 4, H, W) of what the VAE is given, (N, 3, H, W) in -1..1.

        Each row belongs to the given image that it equals, but for parts that an inpainting mask has set to 0: there
        nothing is seen. None: it is none of the given images, but for example what guides a ControlNet.
        """
        known, near = self.seen, NEAR
        if not known:  # the pipeline has a way of its own to make tensors of images
            known, near = [_fitted(found, x) for _, found in self.given[:1]], ROUGHLY
        rows = [row for one in known if one[0].shape[-2:] == x.shape[-2:] for row in zip(*one, strict=True)]
        made = []
        for i, row in enumerate(x.float()):
            there = (row != 0).any(0, keepdim=True)
            distances = [float(((row - pixels.to(row)) * there).abs().sum()) for pixels, _ in rows]
            best = min(range(len(rows)), key=lambda j: (distances[j], j != i), default=None)
            if best is None or distances[best] > near * max(1, int(there.sum())) * len(row):
                return None
            rgba = rows[best][1].to(row)
            made.append(torch.cat([rgba[:3], rgba[3:] * there]))
        return torch.stack(made)


def _straight(processor: Any, colours: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """Straight RGBA in 0..1 of colours multiplied by alpha, and alpha, as the pipeline processed them."""
    normalized = getattr(getattr(processor, "config", None), "do_normalize", True)
    in_unit = [(x.float() / 2 + 0.5 if normalized else x.float()).clamp(0, 1) for x in (colours, alpha[:, :1])]
    return torch.cat([straight(*in_unit), in_unit[1]], 1)


def _fitted(found: Given, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A given image at the size of `x`: pixels over grey in -1..1, and straight RGBA."""
    rgba = torch.cat([resized(one[None].float(), *x.shape[-2:]) for one in found.rgba])
    return on_grey(rgba[:, :3], rgba[:, 3:]), rgba
