"""Twins: what a request's thread has in place of shared models, and the pipelines made of them.

A twin is a model of the same class with the same weights (the very tensors), whose modules are objects of its own. So
hooks, processors and switches that are put on it concern its thread only, also inside; and its calls go wherever the
thread sends them.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import ConfigMixin
from torch import nn

from diffusion_accel.denoisers.find import DECODERS
from diffusion_accel.diffusers_compat import LEFT_BY_HOOKS
from diffusion_accel.errors import UnsupportedPipelineError
from diffusion_accel.hooks import model_of
from diffusion_accel.io import first_line

#: (component, method, args, kwargs) -> what that method of the shared model returns
Answer = Callable[[str, str, tuple[Any, ...], dict[str, Any]], Any]

_LEFT_OUT = LEFT_BY_HOOKS | {"_compiled_call_impl"}  # what stands around the calls of the shared model


def base_class(pipe: Any) -> Any:
    """The class of a pipeline, of an accelerated one that of diffusers."""
    return getattr(type(pipe), "_accelerated_base", type(pipe))


def twin_of(model: nn.Module) -> Any:
    """A twin of a model: the tensors are its own, the modules are not; without what stands around its calls.

    Raises:
        UnsupportedPipelineError: its modules hold something that cannot be copied.
    """
    shared: dict[int, Any] = {}
    for module in model.modules():
        for value in (*vars(module).values(), *module._parameters.values(), *module._buffers.values()):
            if isinstance(value, torch.Tensor):
                shared[id(value)] = value
        if isinstance(module, ConfigMixin):
            shared[id(module.config)] = module.config
    try:
        twin = copy.deepcopy(model, shared)
    except Exception as error:  # whatever an attribute of somebody's module raises
        raise UnsupportedPipelineError(
            f"{type(model).__name__} cannot be served: its modules cannot be copied ({first_line(error)})"
        ) from error
    for name in _LEFT_OUT:
        vars(twin).pop(name, None)
    return twin


class Twins:
    """The components of a pipeline for one thread: twins of its models, copies of what keeps state (tokenizers keep
    that of padding), and pipelines made of them.

    Args:
        pipe: a pipeline; what it has now is what the twins are of.
        answer: where calls of the twins go; None: they compute by themselves.
    """

    def __init__(self, pipe: DiffusionPipeline, answer: Answer | None = None) -> None:
        self.pipe, self._answer = pipe, answer
        self.parts: dict[str, Any] = {}
        for name, part in pipe.components.items():
            if isinstance(part, nn.Module):
                self.renew(name, part)
            elif name != "scheduler":
                self.parts[name] = copy.deepcopy(part)

    def renew(self, name: str, model: nn.Module) -> None:
        """Make the twin of a part, of this model."""
        twin = self.parts[name] = twin_of(model_of(model))
        vars(twin)["to"] = functools.partial(_stay, twin)
        if self._answer is None:
            return
        methods = ("encode", "decode") if name in DECODERS else ()
        for method in ("forward", *(m for m in methods if hasattr(twin, m))):
            vars(twin)[method] = _Sent(self._answer, name, method)

    def own(self, name: str, method: str) -> Callable[..., Any]:
        """A method of a twin itself, which runs in the thread that calls it."""
        return functools.partial(getattr(type(self.parts[name]), method), self.parts[name])

    def pipeline(self, scheduler: Any, like: Any = None) -> Any:
        """A pipeline of these parts.

        Args:
            scheduler: which it is to have; it gets a copy. None: the pipeline has none.
            like: of whose class and with whose settings; None: those of the pipeline that the parts are of.
        """
        like = self.pipe if like is None else like
        cls = base_class(like)
        made = cls.__new__(cls)
        for name, value in vars(like).items():
            vars(made)[name] = copy.copy(value) if isinstance(value, ConfigMixin) else value  # image processors
        vars(made).pop("_acceleration", None)
        vars(made).update({name: part for name, part in self.parts.items() if name in vars(like)})
        if scheduler is not None:
            vars(made)["scheduler"] = copy.deepcopy(scheduler)
        return made


class _Sent:
    """A method of a twin: its calls go elsewhere."""

    def __init__(self, answer: Answer, name: str, method: str) -> None:
        self._answer, self._name, self._method = answer, name, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the shared model returns."""
        return self._answer(self._name, self._method, args, kwargs)


def _stay(twin: Any, *_args: Any, **_kwargs: Any) -> Any:
    """In place of `twin.to(...)`: its tensors are others' too, and stay where and what they are."""
    return twin
