"""The mixin of every accelerated pipeline class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_accel.switchboard import Acceleration


class AcceleratedMixin:
    """Adds the handle `acceleration` to a pipeline class. Calls are bracketed by the generated subclass."""

    @property
    def acceleration(self) -> Acceleration:
        """The features of this pipeline and the report of its last call."""
        handle: Acceleration = self.__dict__["_acceleration"]
        if handle._pipeline() is not self:  # a copy: give it a handle of its own
            handle = self.__dict__["_acceleration"] = handle._rebind(self)
        return handle

    def __reduce__(self) -> Any:
        base = type(self)._accelerated_base  # type: ignore[attr-defined]
        return _rebuild, (base,), self.__dict__


def _rebuild(base: type) -> Any:
    from diffusion_accel.switchboard import accelerated_class

    cls: Any = accelerated_class(base)
    return cls.__new__(cls)
