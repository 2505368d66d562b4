"""Low-bit quantization: checkpoints that diffusers loads, the stages that make them, kernels that run them.

Names are loaded when they are first used, so that importing this package imports neither torch nor diffusers.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_LAZY = {
    "QuantizeSettings": ".ptq.settings",
    "quantize": ".ptq.run",
    "runtime_report": ".model",
    "set_runtime": ".model",
}

__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
