"""What the others have at this step, from what they had before: as far as one's own values went on as they changed.

A displaced step uses what the others had at the step before. Their last change, times a weight, comes nearer to what
they have now; each process reads the weight off its own values, layer by layer, channel by channel
and step by step, so nothing more is sent and nothing is calibrated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

MOST = 2.0  # times the last change


@dataclass
class _Past:
    """Of one message.

    Attributes:
        before: what the others had, by part, at the step before that of `last`.
        last: what they had at the last step that is known.
        own: what this process had at the last two steps, the older one first.
    """

    before: Mapping[int, torch.Tensor]
    last: Mapping[int, torch.Tensor]
    own: list[list[torch.Tensor]]


class Forecaster:
    """Keeps the last two values of every message of a pipeline call, and continues those of the others."""

    def __init__(self) -> None:
        self._past: dict[Any, _Past] = {}

    def note(self, key: Any, received: Mapping[int, torch.Tensor], sends: Mapping[int, torch.Tensor]) -> None:
        """Keep an exact step's values: what the others sent, by part, and what this process sent them."""
        past = self._past.get(key)
        before, own = (past.last, past.own[-1:]) if past else ({}, [])
        self._past[key] = _Past(before, dict(received), [*own, _each(sends)])

    def forecast(
        self, key: Any, stale: Mapping[int, torch.Tensor], sends: Mapping[int, torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """What the others have now, by part.

        Their values of the step before plus w times the change that led to them, channel by channel: w is the
        least-squares weight with which this process's own last change gives its present one, within 0 … `MOST`.

        Args:
            key: of the message.
            stale: what the others had at the step before, by part, in buffers that may be written to later.
            sends: what this process has now.
        """
        past, now = self._past.get(key), _each(sends)
        found = dict(stale)
        if past is not None and len(past.own) == 2 and (weight := _weight(past.own[0], past.own[1], now)) is not None:
            for part, value in stale.items():
                if (older := past.before.get(part)) is not None and older.shape == value.shape:
                    found[part] = torch.lerp(older, value, (1 + weight).to(value.dtype))
        kept = {part: value.clone() for part, value in stale.items()}
        self._past[key] = _Past(kept, kept, [*(past.own[-1:] if past else []), now])
        return found


def _each(sends: Mapping[int, torch.Tensor]) -> list[torch.Tensor]:
    """The tensors that are sent, one that several get once."""
    return list({id(tensor): tensor for tensor in sends.values()}.values())


def _weight(before: list[torch.Tensor], last: list[torch.Tensor], now: list[torch.Tensor]) -> torch.Tensor | None:
    """How much of the last change the present one is, channel by channel; None where shapes differ or nothing is sent.

    Channels are the second dimension of (B, C, H, W) and the last of (B, tokens, C).
    """
    shapes = [[tensor.shape for tensor in tensors] for tensors in (before, last, now)]
    if not now or not shapes[0] == shapes[1] == shapes[2]:
        return None
    products, squares = torch.zeros(()), torch.zeros(())
    for older, old, new in zip(before, last, now, strict=True):
        channel = 1 if new.dim() == 4 else new.dim() - 1
        others = [d for d in range(new.dim()) if d != channel]
        change = (old - older).float()
        products = products.to(new.device) + (change * (new - old).float()).sum(others, keepdim=True)
        squares = squares.to(new.device) + change.square().sum(others, keepdim=True)
    return (products / squares.clamp(min=1e-30)).clamp(0, MOST)
