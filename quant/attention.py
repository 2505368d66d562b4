"""Attention probabilities on a grid: 2^bits levels over [0, 1]-like ranges, zero point 0."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import nn

from .affine import fake_quantize
from .buckets import Buckets


def quantizable_attention(module: nn.Module) -> bool:
    """Whether the probabilities of an attention module can be quantized: diffusers' `Attention`, plain processor."""
    return isinstance(module, Attention) and isinstance(module.processor, (AttnProcessor, AttnProcessor2_0))


class WithScores:
    """An attention module whose probabilities pass through a function; everything else is the module's own."""

    def __init__(self, attention: Any, change: Any) -> None:
        self._attention, self._change = attention, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attention, name)

    def get_attention_scores(self, *args: object, **kwargs: object) -> torch.Tensor:
        """The probabilities, passed through the function."""
        return self._change(self._attention.get_attention_scores(*args, **kwargs))


class QuantizedSoftmax(AttnProcessor):
    """diffusers' plain attention processor with probabilities on a grid for each bucket of timesteps.

    The attention module holds `softmax_scale` (buckets, 1); the zero point is 0. Source: QuEST's code (softmax
    quantizer: asymmetric, zero point 0).
    """

    def __init__(self, bits: int, buckets: Buckets, before: Any) -> None:
        super().__init__()
        self.bits, self.buckets, self.before = bits, buckets, before

    @classmethod
    def install(cls, attention: Any, bits: int, buckets: Buckets) -> None:
        """Put it on an attention module, with grids that are still to be filled."""
        device = attention.to_q.weight_codes.device if hasattr(attention.to_q, "weight_codes") else None
        device = attention.to_q.weight.device if device is None else device
        attention.register_buffer("softmax_scale", torch.zeros(len(buckets.timesteps), 1, device=device))
        attention.set_processor(cls(bits, buckets, attention.processor))

    def __call__(self, attn: Any, *args: object, **kwargs: object) -> Any:
        """What the plain processor answers, with rounded probabilities."""

        def rounded(probabilities: torch.Tensor) -> torch.Tensor:
            # rows of the batch, each with its heads
            scale = attn.softmax_scale[self.buckets.rows(len(probabilities) // attn.heads)]
            if len(scale) > 1:
                scale = scale.repeat_interleave(attn.heads, 0)
            return fake_quantize(probabilities, scale[:, :, None], torch.zeros_like(scale)[:, :, None], self.bits)

        return super().__call__(WithScores(attn, rounded), *args, **kwargs)
