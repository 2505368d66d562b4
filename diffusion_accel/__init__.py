"""diffusion-accel: make any diffusers pipeline faster, smaller and transparent, and see what that costs.

    from diffusion_accel import accelerate, EncoderReuse

    accelerate(pipe, EncoderReuse())
    image = pipe("red apple, 3d style").images[0]
    print(pipe.acceleration.report())

Importing this package imports neither torch nor diffusers; names are loaded when they are first used. diffusers then
loads quantized checkpoints (docs/quantization.md) with its own `from_pretrained`.
"""

from __future__ import annotations

import importlib

from ._version import __version__
from .errors import (
    AccelerationError,
    CallStateError,
    ConfigurationError,
    FeatureConflictError,
    ModelLoadError,
    OutputError,
    UnsupportedPipelineError,
)
from .quant.register import register as _register_checkpoints

TYPE_CHECKING = False  # without importing `typing`: an interrupt is heard only after this file
if TYPE_CHECKING:
    from typing import Any

    from .feature import Feature
    from .parallel import PatchParallel
    from .pipelines import AcceleratedPipeline
    from .report import Report
    from .reuse import EncoderReuse, Reuse
    from .routing import TaskRouting
    from .switchboard import accelerate
    from .transparency import LatentTransparency

_register_checkpoints()  # from now on diffusers loads quantized checkpoints

_LAZY = {
    "AcceleratedPipeline": ".pipelines",
    "EncoderReuse": ".reuse",
    "Feature": ".feature",
    "LatentTransparency": ".transparency",
    "PatchParallel": ".parallel",
    "Report": ".report",
    "Reuse": ".reuse",
    "TaskRouting": ".routing",
    "accelerate": ".switchboard",
}

__all__ = [
    "AcceleratedPipeline",
    "AccelerationError",
    "CallStateError",
    "ConfigurationError",
    "EncoderReuse",
    "Feature",
    "FeatureConflictError",
    "LatentTransparency",
    "ModelLoadError",
    "OutputError",
    "PatchParallel",
    "Report",
    "Reuse",
    "TaskRouting",
    "UnsupportedPipelineError",
    "__version__",
    "accelerate",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
