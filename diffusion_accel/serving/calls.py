"""Calls of a model as rows of a batch: which ones can be computed together, stacked, and taken apart again."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from diffusion_accel.denoisers import time_argument
from diffusion_accel.hooks import tensors_in, version_of
from diffusion_accel.reuse.rows import NOT_ROWS

_PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device)
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # of rows computed in a batch; other types round coarsely
_COARSE = 5e-2


class NotRowsError(Exception):
    """What a model returned cannot be taken apart into rows."""


@dataclass(frozen=True)
class Call:
    """One call of a method of a model, as its arguments' rows.

    Calls with one `key` can be one: the same model, method, names of arguments, shapes behind the first dimension and
    types; everything that has no rows is equal. Timesteps are rows: each call has its own.

    Attributes:
        key: see above; of a call that cannot share a batch it is a new object.
        rows: how many it has.
        names: of the arguments, positional ones first.
        values: the arguments, in the same order.
        positional: how many of them are.
    """

    key: Any
    rows: int
    names: tuple[str, ...]
    values: tuple[Any, ...]
    positional: int

    @classmethod
    def of(cls, model: torch.nn.Module, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The call `getattr(model, method)(*args, **kwargs)`."""
        own = _parameters(getattr(type(model), method))
        given = {own[i] if i < len(own) else f"argument {i}": value for i, value in enumerate(args)} | kwargs
        names, values = tuple(given), tuple(given.values())
        tensors = tensors_in(list(values))
        rows = tensors[0].shape[0] if tensors and tensors[0].dim() else 0
        time, described = time_argument(given), []
        for name, value in given.items():
            if name == time:
                value = _as_tensor(value)
                described.append((name, ("time", value.dim() > 1, value.device)))
                continue
            described.append((name, _described(value, rows if name not in NOT_ROWS else 0)))
        key = (id(model), method, len(args), tuple(described))
        shared = rows > 0 and not any(tensor.requires_grad for tensor in tensors)
        return cls(key if shared else object(), rows, names, values, len(args))

    @property
    def time(self) -> list[float]:
        """The timesteps of its rows, one for all or one each; reading them waits for an accelerator."""
        name = time_argument(self.names)
        return [] if name is None else _as_tensor(self.values[self.names.index(name)]).flatten().unique().tolist()

    @property
    def shape(self) -> str:
        """The shape of a row of its first tensor: 4x64x64."""
        return "x".join(map(str, tensors_in(list(self.values))[0].shape[1:]))

    def run(self, function: Callable[..., Any]) -> Any:
        """What the function returns for this call alone, with the very arguments that were given."""
        return _called(function, self.names, self.values, self.positional)


def run_together(function: Callable[..., Any], calls: Sequence[Call]) -> list[Any]:
    """What a function returns for calls with one key, computed as one batch.

    Raises:
        NotRowsError: what it returns has not a row for each row that it was given.
    """
    first, total = calls[0], sum(call.rows for call in calls)
    time = time_argument(first.names)
    values = []
    for place, name in enumerate(first.names):
        each = [call.values[place] for call in calls]
        if name == time:
            values.append(torch.cat([_per_row(value, call.rows) for value, call in zip(each, calls, strict=True)]))
        else:
            values.append(_stacked(each, first.rows if name not in NOT_ROWS else 0))
    output = _called(function, first.names, tuple(values), first.positional)
    made, start = [], 0
    for call in calls:
        made.append(mapped(functools.partial(_cut, start=start, rows=call.rows, total=total), output))
        start += call.rows
    return made


def near(a: Any, b: Any) -> bool:
    """Whether two outputs are the same but for rounding: 1e-4 of the largest value in float32, 5 % in half types."""
    ours: list[torch.Tensor] = []
    theirs: list[torch.Tensor] = []
    mapped(ours.append, a)
    mapped(theirs.append, b)
    return len(ours) == len(theirs) and all(map(_near, ours, theirs))


def mapped(fn: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """What a model returned with `fn` applied to every tensor in it.

    Raises:
        NotRowsError: it holds something that is neither a tensor, nor made of them, nor a plain value.
    """
    if isinstance(value, torch.Tensor):
        return fn(value)
    if type(value) in _PLAIN:
        return value
    if type(value) in (list, tuple):
        return type(value)(mapped(fn, inner) for inner in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return type(value)(**{name: mapped(fn, inner) for name, inner in fields.items()})
    if isinstance(value, dict):
        return {name: mapped(fn, inner) for name, inner in value.items()}
    if all(
        isinstance(inner, torch.Tensor) or type(inner) in _PLAIN
        for inner in getattr(value, "__dict__", {"": value}).values()
    ):
        made = copy.copy(value)  # a distribution, for example
        vars(made).update({name: mapped(fn, inner) for name, inner in vars(value).items()})
        return made
    raise NotRowsError(f"a {type(value).__name__}")


# ---------------------------------------------------------------------- arguments
@functools.lru_cache(maxsize=256)
def _parameters(method: Callable[..., Any]) -> tuple[str, ...]:
    """The names of positional parameters, without self."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in inspect.signature(method).parameters.values() if p.kind in kinds)[1:]


def _called(function: Callable[..., Any], names: tuple[str, ...], values: tuple[Any, ...], positional: int) -> Any:
    keywords = dict(zip(names[positional:], values[positional:], strict=True))
    return function(*values[:positional], **keywords)


def _described(value: Any, rows: int) -> Any:
    """What calls of one key have in common in an argument, as something that can be compared."""
    if isinstance(value, torch.Tensor):
        kind = (tuple(value.shape), value.dtype, value.device)
        return (kind[0][1:], *kind[1:]) if _has_rows(value, rows) else ("one", *kind, _digest(value))
    if rows and len(_generators(value)) == rows:
        return torch.Generator
    if isinstance(value, (list, tuple)):
        return (type(value), *(_described(inner, rows) for inner in value))
    if isinstance(value, dict):
        return tuple((name, _described(inner, rows)) for name, inner in value.items())
    return (type(value), value if type(value) in _PLAIN else id(value))


def _generators(value: Any) -> list[torch.Generator]:
    """The random generators that an argument is, one a row; none if it is something else."""
    listed = value if isinstance(value, list) else [value]
    return listed if all(isinstance(one, torch.Generator) for one in listed) else []


def _has_rows(value: torch.Tensor, rows: int) -> bool:
    return rows > 0 and value.dim() > 0 and value.shape[0] == rows


def _stacked(each: list[Any], rows: int) -> Any:
    """An argument of several calls as one of their batch; `rows` are those of the first call."""
    first = each[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(each) if _has_rows(first, rows) else first
    if _generators(first):
        return [generator for value in each for generator in _generators(value)]
    if isinstance(first, (list, tuple)):
        return type(first)(_stacked(list(inner), rows) for inner in zip(*each, strict=True))
    if isinstance(first, dict):
        return {name: _stacked([value[name] for value in each], rows) for name in first}
    return first


def _as_tensor(timestep: Any) -> torch.Tensor:
    """A timestep as a tensor, as models make one of a number."""
    return timestep if isinstance(timestep, torch.Tensor) else torch.tensor(timestep)


def _per_row(timestep: Any, rows: int) -> torch.Tensor:
    """A timestep for each row."""
    value = _as_tensor(timestep)
    if value.dim() < 2 and value.numel() == 1:
        return value.reshape(1).expand(rows)
    return value


_digests = WeakTensorKeyDictionary()
_digests_lock = threading.Lock()


def _digest(value: torch.Tensor) -> Any:
    """The contents of a tensor in short. Pipelines give the same tensor at every step: it is read once."""
    version = version_of(value)
    with _digests_lock:
        known = _digests.get(value)
        if known is not None and known[0] == version:
            return known[1]
    content = value.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy().tobytes()
    with _digests_lock:
        _digests[value] = (version, hash(content))
        return _digests[value][1]


# ---------------------------------------------------------------------- outputs
def _cut(tensor: torch.Tensor, start: int, rows: int, total: int) -> torch.Tensor:
    """The rows of one call, in memory of their own: a view would keep those of all others."""
    if not tensor.dim() or tensor.shape[0] != total:
        raise NotRowsError(f"a tensor of shape {tuple(tensor.shape)} for {total} rows")
    return tensor[start : start + rows].clone()


def _near(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return bool((a == b).all())
    allowed = _TOLERANCE.get(a.dtype, _COARSE)
    largest = float(b.abs().max()) if b.numel() else 0.0
    return not b.numel() or not float((a - b).abs().max()) > allowed * max(largest, 1e-6)
