"""Task-routed channels: every noise level uses its own window of the channels (Denoising Task Routing)."""

import importlib
from typing import TYPE_CHECKING, Any

from .recipe import Recipe
from .task_routing import TaskRouting

if TYPE_CHECKING:
    from .hooks import route as route

__all__ = ["Recipe", "TaskRouting", "route"]


def __getattr__(name: str) -> Any:
    if name == "route":  # imports torch
        return importlib.import_module(".hooks", __name__).route
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
