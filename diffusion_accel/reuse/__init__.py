"""Encoder-feature reuse (Faster Diffusion's encoder propagation)."""

from .encoder_reuse import EncoderReuse

__all__ = ["EncoderReuse"]
