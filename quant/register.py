"""Makes our checkpoints known to diffusers, without importing diffusers or torch before somebody else does.

`import diffusion_accel` calls `register`. diffusers looks quantization methods up in two tables by name; what is put
there imports the real classes when a quantized model is loaded.
"""

from __future__ import annotations

from diffusion_accel.model_files.quantized import METHOD
from diffusion_accel.when_imported import when_imported

TYPE_CHECKING = False  # without importing `typing`: every start of the command comes by here
if TYPE_CHECKING:
    from typing import Any

_TABLES = "diffusers.quantizers.auto"


class _Config:
    """Stands for `loader.LowBitConfig`."""

    @staticmethod
    def from_dict(values: dict[str, Any], **kwargs: Any) -> Any:
        from .loader import LowBitConfig  # heavy: torch, diffusers

        return LowBitConfig.from_dict(values, **kwargs)


def _quantizer(*args: object, **kwargs: object) -> Any:
    """Stands for `loader.LowBitQuantizer`."""
    from .loader import LowBitQuantizer  # heavy: torch, diffusers

    return LowBitQuantizer(*args, **kwargs)


def _fill(tables: Any) -> None:
    tables.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = _Config
    tables.AUTO_QUANTIZER_MAPPING[METHOD] = _quantizer


def register() -> None:
    """Fill the tables now if they are there, else when they are imported. Safe to call twice."""
    when_imported(_TABLES, _fill)
