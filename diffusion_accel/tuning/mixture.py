"""What guidance makes of the outputs of a denoiser: found from what went in and came out at the steps of a call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

_LEAST = 1e-12


@dataclass(frozen=True)
class Mixture:
    """A sum of outputs.

    Attributes:
        shares: what each output counts.
        like: the sum has the length of this output, in the last dimension (Qwen-Image); None: its own.
    """

    shares: tuple[float, ...]
    like: int | None = None

    def __call__(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """What the scheduler is given."""
        mixed = torch.stack([s * o for s, o in zip(self.shares, outputs, strict=True)]).sum(0)
        if self.like is None:
            return mixed
        return mixed * (_length(outputs[self.like]) / _length(mixed).clamp(min=_LEAST))


class Mixing:
    """Collects what was mixed at the steps of a call.

    Args:
        like: the conditional one of two outputs, whose length a mixture may have; None: it is not known.
    """

    def __init__(self, like: int | None) -> None:
        self.like = like
        self._sums: list[tuple[np.ndarray, np.ndarray, float]] = []
        self._turned: list[tuple[np.ndarray, float]] = []

    def add(self, outputs: Sequence[torch.Tensor], given: torch.Tensor) -> None:
        """One step: what the denoiser returned, and what the scheduler was given."""
        products = _products((*outputs, given))
        self._sums.append((products[:-1, :-1], products[:-1, -1], float(products[-1, -1])))
        if self.like is not None and len(outputs) == 2:
            ahead = torch.nn.functional.normalize(given, dim=-1)
            across = [part - (part * ahead).sum(-1, keepdim=True) * ahead for part in outputs]
            off = float((_length(outputs[self.like]) - _length(given)).square().sum())
            self._turned.append((_products(across), off))

    def found(self, tolerance: float) -> Mixture | None:
        """The mixture of all steps; None if there is none to this relative tolerance."""
        own, aims, _ = (sum(parts) for parts in zip(*self._sums, strict=True))
        shares = np.linalg.lstsq(np.asarray(own), np.asarray(aims), rcond=1e-9)[0]
        left = [square - 2 * shares @ aim + shares @ products @ shares for products, aim, square in self._sums]
        if self._within(left, tolerance):
            return Mixture(tuple(map(float, shares)))
        if not self._turned or len(self._turned) < len(self._sums):
            return None
        (aa, ab), (_, bb) = np.asarray(sum(products for products, _ in self._turned))
        share = (aa - ab) / max(_LEAST, aa - 2 * ab + bb)  # of the second, for which the sum points where it should
        both = np.array([1 - share, share])
        left = [both @ products @ both + off for products, off in self._turned]
        sign = float(np.sign(shares.sum())) or 1.0
        return Mixture((sign * both[0], sign * both[1]), self.like) if self._within(left, tolerance) else None

    def _within(self, left: Sequence[float], tolerance: float) -> bool:
        return all(
            max(0.0, own) <= tolerance**2 * max(square, _LEAST)
            for own, (_, _, square) in zip(left, self._sums, strict=True)
        )


def _length(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.norm(dim=-1, keepdim=True)


def _products(parts: Sequence[torch.Tensor]) -> np.ndarray:
    table = torch.stack([part.flatten() for part in parts]).double()
    products: np.ndarray = (table @ table.T).cpu().numpy()
    return products
