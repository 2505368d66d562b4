"""Task-routed channels: every noise level uses its own window of the channels (Denoising Task Routing)."""

from .hooks import route
from .masks import Recipe
from .task_routing import TaskRouting

__all__ = ["Recipe", "TaskRouting", "route"]
