"""The mixin of every accelerated pipeline class."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from .switchboard import Acceleration

from .diffusers_compat import configured
from .model_files.index_notes import KEY, RECIPE

logger = logging.getLogger(__name__)


class AcceleratedMixin:
    """Adds the handle `acceleration` to a pipeline class. Calls are bracketed by the generated subclass.

    The switchboard generates that class, and says there how a handle and the class itself are made.
    """

    _new_handle: ClassVar[Callable[[Any], Acceleration]]
    _accelerated_class: ClassVar[Callable[[type], type]]

    @property
    def acceleration(self) -> Acceleration:
        """The features of this pipeline and the report of its last call."""
        handle: Acceleration | None = self.__dict__.get("_acceleration")
        if handle is None:  # made by a class method of the generated class, such as type(pipe).from_pretrained
            handle = self.__dict__["_acceleration"] = type(self)._new_handle(self)
        elif handle._pipeline() is not self:  # a copy: give it a handle of its own
            handle = self.__dict__["_acceleration"] = handle._rebind(self)
        return handle

    def save_pretrained(self, save_directory: Any, *args: object, **kwargs: object) -> Any:
        """diffusers' own, with the recipe of the features as an acceleration.json in the folder.

        `AcceleratedPipeline.from_pretrained` restores them; diffusers' own `from_pretrained` loads the plain pipeline.
        """
        has_recipe = self.acceleration.save_with_model(save_directory)  # first: diffusers may upload the folder
        known = super().config.get(KEY) or {}  # type: ignore[misc]
        with configured(self, **({KEY: {**known, RECIPE: True}} if has_recipe else {})):
            return super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: object) -> Any:
        """diffusers' own, from the class of an accelerated pipeline: its features come along, as far as they work."""
        made = super().from_pipe(plain_twin(pipeline), **kwargs)  # type: ignore[misc]
        handle: Acceleration | None = pipeline.__dict__.get("_acceleration")
        if handle is not None:
            made.__dict__["_acceleration"] = handle.carry_over(made)
        return made

    # What a class of diffusers' own makes of an accelerated pipeline is a plain one, and it asks nobody.
    @property
    def config(self) -> Any:
        """diffusers' own. `from_pipe` of any class reads it once from the pipeline that it converts."""
        if sys._getframe(1).f_code.co_name == "from_pipe" and "_acceleration" in self.__dict__:
            self._tell_what_is_lost(self.__dict__["_acceleration"].features)
        return super().config  # type: ignore[misc]

    @staticmethod
    def _tell_what_is_lost(features: Mapping[str, object]) -> None:
        if features:
            logger.warning(
                "the features of this pipeline (%s) do not come along: diffusers' from_pipe makes a plain one; "
                "AcceleratedPipeline.from_pipe(pipe, task=...) takes them along, or, afterwards, "
                "accelerate(other, *pipe.acceleration.features.values())",
                ", ".join(features),
            )

    def __reduce__(self) -> Any:
        base = type(self)._accelerated_base  # type: ignore[attr-defined]
        return _rebuild, (base, type(self)._accelerated_class), self.__dict__


def plain_twin(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """A pipeline of its own class with the same components and without features; a pipeline without is itself."""
    base = getattr(type(pipe), "_accelerated_base", None)
    if base is None:
        return pipe
    twin = base.__new__(base)
    twin.__dict__.update({key: value for key, value in pipe.__dict__.items() if key != "_acceleration"})
    return twin


def _rebuild(base: type, accelerated_class: Callable[[type], Any]) -> Any:
    cls = accelerated_class(base)
    return cls.__new__(cls)
