"""What a denoiser was called with at one moment: arguments are compared by value."""

from __future__ import annotations

from typing import Any

import torch

from diffusion_accel.hooks import map_tensors


class Arguments:
    """What a denoiser was called with at one moment."""

    def __init__(self, named: dict[str, Any]) -> None:
        self._values = map_tensors(torch.clone, named)

    def same(self, named: dict[str, Any]) -> bool:
        """Whether a call with `named` would read the same values."""
        return _equal(self._values, named)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return (
            isinstance(a, torch.Tensor)
            and isinstance(b, torch.Tensor)
            and (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
            and torch.equal(a, b)
        )
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
