"""Low-bit quantization: checkpoints that diffusers loads, the stages that make them, kernels that run them.

Names are loaded when they are first used, so that importing this package imports neither torch nor diffusers.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_LAZY = {
    "QuantizationReport": (".ptq.report", "QuantizationReport"),
    "QuantizationRun": (".ptq.run", "QuantizationRun"),
    "QuantizeSettings": (".ptq.settings", "QuantizeSettings"),
    "quantize": (".ptq.run", "quantize_denoiser"),  # old name; `diffusion_accel.quantize` takes a pipeline
    "quantize_denoiser": (".ptq.run", "quantize_denoiser"),
    "runtime_report": (".model", "runtime_report"),
    "set_runtime": (".model", "set_runtime"),
}

__all__ = list(_LAZY)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module, own = _LAZY[name]
        return getattr(importlib.import_module(module, __name__), own)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
