"""Makes our checkpoints known to diffusers, without importing diffusers or torch before somebody else does.

`import diffusion_accel` calls `register`. diffusers looks quantization methods up in two tables by name; what is put
there imports the real classes when a quantized model is loaded.
"""

from __future__ import annotations

import sys

from .method import METHOD

TYPE_CHECKING = False  # without importing `typing`: every start of the command comes by here
if TYPE_CHECKING:
    import importlib.machinery
    from collections.abc import Sequence
    from types import ModuleType
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


class _Watch:
    """Fills diffusers' tables as soon as somebody has imported them, then steps aside."""

    def find_spec(
        self, name: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _TABLES:
            return None
        import importlib.util  # only where diffusers is imported: every start of the command comes by here

        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _fill(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Fill the tables now if they are there, else when they are imported. Safe to call twice."""
    if _TABLES in sys.modules:
        _fill(sys.modules[_TABLES])
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())  # type: ignore[arg-type]
