"""The learned solver: a diffusers scheduler of fitted timesteps and coefficients, and the neutral ones it starts from;
Heun's method for flow matching.

A pipeline folder names its scheduler's class as one of this package, so that plain diffusers loads it once
`diffusion_accel` is imported. Names are loaded when they are first used: importing this imports neither torch nor
diffusers.
"""

from __future__ import annotations

import importlib

from diffusion_accel.when_imported import when_imported

TYPE_CHECKING = False  # without importing `typing`: every start of the command comes by here
if TYPE_CHECKING:
    from typing import Any

_LAZY = {
    "FlowMatchHeunScheduler": ".flow_heun",
    "LearnedMultistepScheduler": ".learned",
    "SchedulerMixin": ".learned",  # diffusers looks here for it when it loads a pipeline folder
    "ddim_coefficients": ".neutral",
    "dpmpp_2m_coefficients": ".neutral",
}

__all__ = [*_LAZY]


def _fill(table: Any) -> None:
    """Name the classes in diffusers' table of what pipelines of the hub may have."""
    own = ("LearnedMultistepScheduler", "FlowMatchHeunScheduler")
    table.LOADABLE_CLASSES.setdefault(__name__, {name: ["save_pretrained", "from_pretrained"] for name in own})


when_imported("diffusers.pipelines.pipeline_loading_utils", _fill)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
