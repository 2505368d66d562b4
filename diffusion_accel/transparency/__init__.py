"""Latent transparency: RGBA images and layers from any base pipeline (LayerDiffuse)."""

import importlib
from typing import Any

from .latent_transparency import LatentTransparency

_LAZY = {  # these import torch
    "LatentTransparencyEncoder": "modules",
    "LatentTransparencyDecoder": "modules",
    "encode_rgba": "codec",
    "decode_rgba": "codec",
    "padded_rgb": "rgba",
    "composite": "rgba",
    "stack_layers": "layers",
    "recomposition_error": "layers",
}
__all__ = ["LatentTransparency", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
