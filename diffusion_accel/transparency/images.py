"""Images with alpha in the kinds that pipelines take and return (PIL, arrays, tensors), between callers and tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageChops

from diffusion_accel.compositing import over
from diffusion_accel.errors import ConfigurationError

from .rgba import composite, resized, straight

GREY = (127, 127, 127)


@dataclass(frozen=True)
class Given:
    """An image, or several, as a call was given them, divided into what a pipeline understands.

    Attributes:
        flat: over mid-grey, of the kind that was given.
        colours: multiplied by alpha, of the same kind and size, so that a pipeline's own processing cuts and resizes
            all alike.
        alpha: alpha three times, likewise.
        rgba: straight colours and alpha of each, (4, H, W) in 0..1.
    """

    flat: Any
    colours: Any
    alpha: Any
    rgba: list[torch.Tensor]

    @property
    def opaque(self) -> bool:
        """Whether nothing can be seen through."""
        return all(bool((one[3] == 1).all()) for one in self.rgba)

    def layers(self) -> tuple[Any, Any]:
        """What is seen, without the grey: colours multiplied by alpha, and alpha."""
        return self.colours, self.alpha

    def parts(self) -> list[tuple[Any, Given]]:
        """What a pipeline may process by itself: the whole, and single images of a list, with what is known of each."""
        found: list[tuple[Any, Given]] = [(self.flat, self)]
        if isinstance(self.flat, list) and len(self.flat) == len(self.rgba):
            each = zip(self.flat, self.colours, self.alpha, self.rgba, strict=True)
            found += [(flat, Given(flat, colours, alpha, [rgba])) for flat, colours, alpha, rgba in each]
        return found


def given(image: Any, latent_channels: int | None = None) -> Given | None:
    """What `image` is: PIL, an array (N, H, W, C) or (H, W, C), a tensor (N, C, H, W) or (C, H, W), or a list of them.

    Three channels are opaque, four have alpha. Values are 0..1, or whole numbers up to 255. A tensor with as many
    channels as latents have is an image only if all its values are in that range: latents never are. None: latents, or
    something else that is no such image.

    Raises:
        ConfigurationError: four channels with other values.
    """
    images = list(image) if isinstance(image, (list, tuple)) else [image]
    listed = isinstance(image, (list, tuple))
    if not images:
        return None
    if all(isinstance(one, Image.Image) for one in images):
        return _given_pil(images, listed)
    if all(isinstance(one, np.ndarray) for one in images):
        rows = [torch.from_numpy(np.ascontiguousarray(one)) for one in images]
        if any(one.dim() not in (3, 4) or one.shape[-1] not in (3, 4) for one in rows):
            return None
        rows = [one.movedim(-1, -3) for one in rows]
    elif all(isinstance(one, torch.Tensor) for one in images):
        rows = images
        if any(one.dim() not in (3, 4) or one.shape[-3] not in (3, 4) for one in rows):
            return None
    else:
        return None
    if len({one.shape[-2:] for one in rows}) > 1 or len({one.shape[-3] for one in rows}) > 1:
        return None  # the pipeline says what it thinks of that
    if rows[0].shape[-3] == 3:
        ones = [torch.ones_like(one, dtype=torch.float32) for one in rows]
        flat = images if listed else image
        return Given(flat, flat, _alike(ones, images, listed), [one for row in rows for one in _opaque(row)])
    if isinstance(images[0], torch.Tensor) and latent_channels == 4 and not all(_in_range(one) for one in rows):
        return None
    values = [_in_unit(one) for one in rows]
    values = values if listed else [one if one.dim() == 4 else one[None] for one in values]  # some pipelines count rows
    made = []
    for one in values:
        rgb, alpha = one[..., :3, :, :], one[..., 3:, :, :]
        made.append((composite(rgb, alpha, 0.5), rgb * alpha, alpha.expand_as(rgb).contiguous()))
    flat, colours, alphas = (_alike(list(part), images, listed) for part in zip(*made, strict=True))
    return Given(flat, colours, alphas, [one for row in values for one in (row if row.dim() == 4 else row[None])])


def _given_pil(images: list[Image.Image], listed: bool) -> Given:
    known = [one.convert("RGBA") for one in images]
    alpha = [Image.merge("RGB", [one.getchannel("A")] * 3) for one in known]
    colours = [ImageChops.multiply(one.convert("RGB"), thrice) for one, thrice in zip(known, alpha, strict=True)]
    flat = [over(one, GREY) for one in known]
    tensors = [VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy(one)) for one in known]
    rgba = [one[0].contiguous() for one in tensors]
    return Given(flat, colours, alpha, rgba) if listed else Given(flat[0], colours[0], alpha[0], rgba)


def _opaque(rgb: torch.Tensor) -> torch.Tensor:
    """(N, 4, H, W) of three channels in 0..1 or (as older diffusers have it) -1..1, or whole numbers."""
    batch = rgb if rgb.dim() == 4 else rgb[None]
    batch = batch.float() / 255 if not batch.is_floating_point() else batch.float()
    batch = batch / 2 + 0.5 if batch.numel() and batch.min() < 0 else batch
    return torch.cat([batch.clamp(0, 1), torch.ones_like(batch[:, :1])], 1)


def _in_range(rgba: torch.Tensor) -> bool:
    """Whether all values are in 0..1, or whole numbers up to 255."""
    top = 1 if rgba.is_floating_point() else 255
    return bool(((rgba >= 0) & (rgba <= top)).all())


def _in_unit(rgba: torch.Tensor) -> torch.Tensor:
    """RGBA in 0..1."""
    if not _in_range(rgba):
        low, high = (float(value) for value in (rgba.min(), rgba.max()))
        raise ConfigurationError(
            f"transparent: an RGBA image has values in 0..1, or whole numbers in 0..255; got {low:g} to {high:g}"
        )
    return rgba if rgba.is_floating_point() else rgba.float() / 255


def _alike(values: list[torch.Tensor], images: list[Any], listed: bool) -> Any:
    """Tensors (…, C, H, W) as the kind of thing that `images` were."""
    if isinstance(images[0], np.ndarray):
        made: list[Any] = [one.movedim(-3, -1).contiguous().numpy() for one in values]
    else:
        made = values
    return made if listed else made[0]


def rgba_tensor(image: Any) -> torch.Tensor | None:
    """(N, 4, H, W) in 0..1 of a PIL image or a list of them, opaque ones included; None for anything else."""
    images = image if isinstance(image, (list, tuple)) else [image]
    if not images or not all(isinstance(one, Image.Image) for one in images):
        return None
    return torch.stack(_given_pil(list(images), True).rgba)


def to_pil(rgba: torch.Tensor) -> list[Image.Image]:
    """(N, 4, H, W) or (N, 3, H, W) in 0..1 -> RGBA or RGB images, rounded."""
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(rgba))


def size_of(images: Any) -> tuple[int, int] | None:
    """Height and width of what a pipeline returned: a list of PIL images, an array, a tensor; None: something else."""
    if isinstance(images, list):
        first = images[0] if images else None
        return (first.height, first.width) if isinstance(first, Image.Image) else None
    if isinstance(images, np.ndarray):
        return (images.shape[1], images.shape[2]) if images.ndim == 4 and images.shape[-1] == 3 else None
    if isinstance(images, torch.Tensor):
        return (images.shape[-2], images.shape[-1]) if images.dim() == 4 and images.shape[1] == 3 else None
    return None


def to_type(images: Any, rows: list[int], rgba: list[torch.Tensor]) -> Any:
    """`images` as a pipeline returned them, with the `rgba` images (4, H, W) in the place of the ones in `rows`.

    A list of PIL images keeps its other ones. Arrays (N, H, W, 3) and tensors (N, 3, H, W) get a fourth channel, which
    is 1 in other rows.
    """
    if isinstance(images, list):
        made = list(images)
        for i, one in zip(rows, rgba, strict=True):
            made[i] = to_pil(one[None])[0]
        return made
    if isinstance(images, np.ndarray):
        opaque = np.concatenate([images, np.ones_like(images[..., :1])], -1)
        opaque[rows] = torch.stack(rgba).permute(0, 2, 3, 1).float().cpu().numpy()
        return opaque
    opaque_tensor = torch.cat([images, torch.ones_like(images[:, :1])], 1)
    opaque_tensor[rows] = torch.stack(rgba).to(images)
    return opaque_tensor


def overlaid(
    drawn: torch.Tensor, mask: Image.Image, under: torch.Tensor, box: tuple[int, int, int, int] | None = None
) -> torch.Tensor:
    """What was drawn, put into the whole image where a mask is white: RGBA (4, H, W) in 0..1.

    As diffusers' `apply_overlay` does with opaque images: cut to the shape of `box` (left, top, right, bottom; None:
    everywhere), resized, pasted; soft masks mix.

    Args:
        drawn: RGBA (4, h, w), straight.
        mask: of the size of the whole image, white where `drawn` counts.
        under: the whole image, (4, H, W), straight.
    """
    under = under.to(drawn)
    height, width = under.shape[-2:]
    left, top, right, bottom = box or (0, 0, width, height)
    whole = torch.zeros_like(under)
    whole[:, top:bottom, left:right] = resized(drawn[None], bottom - top, right - left)[0][
        :, : height - top, : width - left
    ]
    share = torch.from_numpy(np.asarray(mask.convert("L"), np.float32) / 255).to(drawn)
    seen = [torch.cat([one[:3] * one[3:], one[3:]]) for one in (whole, under)]
    mixed = seen[0] * share + seen[1] * (1 - share)
    return torch.cat([straight(mixed[None, :3], mixed[None, 3:])[0], mixed[3:]])
