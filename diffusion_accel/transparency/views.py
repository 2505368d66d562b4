"""The transparent decoder seen from several sides: flips and quarter turns, and the median of what they say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

VIEWS = {  # horizontal flip, then quarter turns
    1: ((False, 0),),
    4: ((False, 0), (False, 2), (True, 0), (True, 2)),
    8: tuple((flip, turns) for flip in (False, True) for turns in range(4)),
}
Decode = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def turned(x: torch.Tensor, flip: bool, turns: int) -> torch.Tensor:
    """(N, C, H, W), mirrored left to right if `flip`, then turned counter-clockwise by `turns` quarters."""
    return torch.rot90(x.flip(-1) if flip else x, turns, (-2, -1))


def turned_back(x: torch.Tensor, flip: bool, turns: int) -> torch.Tensor:
    """The inverse of `turned`."""
    x = torch.rot90(x, -turns, (-2, -1))
    return x.flip(-1) if flip else x


class Clipped(torch.autograd.Function):
    """`clamp(0, 1)` whose gradient also brings values back that are outside: of a plain clamp they would get none."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
        """Clamp to 0..1."""
        context.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Let a gradient through where it is inside, or leads back to it."""
        (x,) = context.saved_tensors
        leads_on = ((x > 1) & (gradient < 0)) | ((x < 0) & (gradient > 0))  # going down the gradient
        return gradient.masked_fill(leads_on, 0)


def decode_views(decode: Decode, pixels: torch.Tensor, latents: torch.Tensor, views: int = 8) -> torch.Tensor:
    """The median over views of `decode(pixels, latents)`, clipped to 0..1, pixel by pixel (test-time augmentation).

    Of an even number of views the lower middle value is taken, as the published code does. Views of one shape run as
    one batch: all of them for a square, two halves otherwise.
    """
    turns = VIEWS[views]
    groups: dict[bool, list[tuple[bool, int]]] = {}
    for flip, quarter in turns:
        groups.setdefault(quarter % 2 == 1 and pixels.shape[-1] != pixels.shape[-2], []).append((flip, quarter))
    found = []
    for group in groups.values():
        made = decode(*(torch.cat([turned(x, *turn) for turn in group]) for x in (pixels, latents)))
        parts = Clipped.apply(made).chunk(len(group))
        found += [turned_back(part, *turn) for part, turn in zip(parts, group, strict=True)]
    return found[0] if views == 1 else torch.stack(found).median(0).values
