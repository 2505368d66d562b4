"""ControlNets that run beside the denoiser.

Names are loaded when they are first used, so that importing this package imports neither torch nor diffusers.
"""

from __future__ import annotations

import importlib
from typing import Any

_LAZY = {"ControlNetParallel": ".controlnet_parallel"}

__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
