"""Calls of a module as lists of tensors: what a graph takes and returns, and around it what stays the same."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from diffusion_accel.denoisers import time_argument
from diffusion_accel.hooks import map_tensors, own_forward
from diffusion_accel.inside import CallInside, call_inside, making_a_graph

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
_HALF = (torch.bfloat16, torch.float16)
_WRITTEN = "feat_cache"  # a list of features of the frames before, which coders of videos read and write in every call


class OpaqueError(Exception):
    """A call holds something that no graph can be compiled for; the message says what."""


@dataclass(frozen=True)
class Slot:
    """The place of a tensor in what was given or returned."""

    number: int


class Template:
    """The arguments of a call with slots in the places of its tensors, and what the call returned.

    Attributes:
        named: the arguments by name.
        inside: what hooks inside of the module are given; None where there are none.
        own: whether what stands in the place of the module's forward on the instance is a part of the call.
        returned: what the module returns and what hooks inside leave, with slots; None before `run` was called.
    """

    def __init__(self, named: dict[str, Any], inside: Any = None, own: bool = False) -> None:
        self.named, self.inside, self.own = named, inside, own
        self.returned: Any = None

    def run(self, module: nn.Module, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Call the module's own forward, below all hooks around it, and return the tensors that it returns and those
        that hooks inside of it leave."""
        inside = call_inside(module)
        if inside is not None:
            inside.start(map_tensors(lambda slot: tensors[slot.number], self.inside, Slot))
        named = map_tensors(lambda slot: tensors[slot.number], self.named, Slot)
        output = own_forward(module)(**named) if self.own else type(module).forward(module, **named)
        found: list[torch.Tensor] = []
        self.returned = _outlined((output, None if inside is None else inside.finish()), found)
        return found

    def output(self, tensors: list[torch.Tensor]) -> tuple[Any, Any]:
        """Tensors as what the module returns, and as what hooks inside of it leave."""
        output, left = _filled(self.returned, tensors)
        return output, left


@dataclass(frozen=True)
class Call:
    """One call of a module: its tensors, and the rest as a template.

    Attributes:
        signature: the same for calls that one graph can serve.
    """

    signature: str
    template: Template
    tensors: list[torch.Tensor]

    @classmethod
    def of(cls, named: dict[str, Any], inside: CallInside | None = None, own: bool = False) -> Call:
        """The call with these arguments, what hooks inside of the module do in it, and whether it goes through what is
        on the instance in the place of its forward. A number for the timestep becomes a tensor, as models make one.

        Raises:
            OpaqueError: no graph can be compiled for it.
        """
        if named.get(_WRITTEN) is not None:
            raise OpaqueError("a cache that it writes into")
        name, tensors = time_argument(named), list[torch.Tensor]()
        if name and type(named[name]) in (int, float):
            named = {**named, name: torch.tensor(named[name])}

        def slot(tensor: torch.Tensor) -> Slot:
            if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout != torch.strided:
                raise OpaqueError(f"a {type(tensor).__name__} of layout {tensor.layout}")
            tensors.append(tensor)
            return Slot(len(tensors) - 1)

        does = "" if inside is None else inside.signature
        if does is None:
            raise OpaqueError("features of several steps that are forecast")
        template, given = map_tensors(slot, named), None if inside is None else map_tensors(slot, inside.given)
        if not tensors:
            raise OpaqueError("no tensor")
        kinds = [(tuple(t.shape), str(t.dtype), str(t.device)) for t in tensors]
        described = f"{_described(template)} {does and (does, _described(given))} {kinds}"
        return cls(described, Template(template, given, own), tensors)

    def shapes(self) -> str:
        """The shapes of the tensors, for messages."""
        return ", ".join("×".join(map(str, tensor.shape)) or "1" for tensor in self.tensors)


class Flat(nn.Module):
    """A module as a function of the tensors of a call: what is traced.

    Half-precision tensors go in and out as float32, which every engine takes.
    """

    def __init__(self, module: nn.Module, template: Template, dtypes: list[torch.dtype]) -> None:
        super().__init__()
        self.module, self.template, self.dtypes = module, template, dtypes

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors that the module returns."""
        typed = [tensor.to(dtype) for tensor, dtype in zip(tensors, self.dtypes, strict=True)]
        with making_a_graph():
            return tuple(widened(tensor) for tensor in self.template.run(self.module, typed))


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32 if it is in half precision."""
    return tensor.float() if tensor.dtype in _HALF else tensor


def _described(value: Any) -> Any:
    """What calls with one signature share, as something with a `repr` that says all of it."""
    if isinstance(value, Slot):
        return value
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, *map(_described, value)]
    if isinstance(value, dict):
        return [(str(key), _described(inner)) for key, inner in sorted(value.items(), key=lambda item: str(item[0]))]
    if type(value) in _PLAIN:
        return (type(value).__name__, value)
    raise OpaqueError(f"a {type(value).__name__}")


def _outlined(value: Any, found: list[torch.Tensor]) -> Any:
    """What a module returned with slots in the places of its tensors, which go to `found`."""
    if isinstance(value, torch.Tensor):
        found.append(value)
        return Slot(len(found) - 1)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _outlined(getattr(value, field.name), found) for field in dataclasses.fields(value)}
        return _Made(type(value), fields)
    if isinstance(value, dict):
        return {key: _outlined(inner, found) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_outlined(inner, found) for inner in value)
    if type(value) in _PLAIN:
        return value
    raise OpaqueError(f"a {type(value).__name__} that is returned")


@dataclass(frozen=True)
class _Made:
    """An output class of diffusers or transformers with its fields."""

    kind: type
    fields: dict[str, Any]


def _filled(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, Slot):
        return tensors[value.number]
    if isinstance(value, _Made):
        return value.kind(**{name: _filled(inner, tensors) for name, inner in value.fields.items()})
    if isinstance(value, dict):
        return {key: _filled(inner, tensors) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_filled(inner, tensors) for inner in value)
    return value
