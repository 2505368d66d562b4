"""What a model computes, as a hash of all of it: weights, classes, settings of its parts. Names a graph on disk."""

from __future__ import annotations

import enum
import functools
import hashlib
import types
from typing import Any

import torch
from torch import nn

from diffusion_accel.diffusers_compat import ORIGIN_ENTRIES
from diffusion_accel.snapshot import NOT_STATE

# classes and functions whose code is told by the version of their package
_KNOWN = ("torch", "diffusers", "transformers", "peft", "accelerate", "diffusion_accel", "builtins", "collections")
_LOADERS = ("hf_quantizer", "quantization_config")  # how quantized layers came here; what they compute is in them
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


class _UnknownError(Exception):
    """Something of which it is not known what it computes."""


def digest(model: nn.Module) -> str | None:
    """The SHA-256 of everything that a model's calls depend on; None if that is not known, such as code of one's own.

    All bytes of all weights are read, at about a gigabyte a second.
    """
    found = hashlib.sha256()
    try:
        for name, module in model.named_modules():
            found.update(f"\n{name} {_code(type(module))} {module.training}".encode())
            for key, value in sorted(vars(module).items()):
                if key not in NOT_STATE and key not in ("_parameters", "_buffers", "_modules", *_LOADERS):
                    _feed(found, key, value, frozenset())
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            _feed(found, name, tensor, frozenset())
    except _UnknownError:
        return None
    return found.hexdigest()


def _feed(found: Any, key: str, value: object, within: frozenset[int]) -> None:
    """Add a named value, with all that is in it."""
    found.update(f"\n{key}:".encode())
    if isinstance(value, torch.Tensor):
        _feed_tensor(found, value)
    elif isinstance(value, enum.Enum) or type(value) in _PLAIN:
        found.update(f"{type(value).__name__} {value!r}".encode())
    elif isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        found.update(_code(value).encode())
    elif id(value) in within:
        found.update(b"itself")
    elif isinstance(value, (dict, list, tuple, set, frozenset)):
        _feed_items(found, value, within | {id(value)})
    elif isinstance(value, functools.partial):
        _feed(found, "partial", [value.func, value.args, value.keywords], within | {id(value)})
    elif isinstance(value, nn.Module):
        found.update(_code(type(value)).encode())  # one of the model's own, which is there by its name
    elif hasattr(value, "__dict__"):
        found.update(_code(type(value)).encode())
        _feed_items(found, vars(value), within | {id(value)})
    elif type(value).__module__.startswith("diffusion_accel."):  # with slots, for caches
        found.update(_code(type(value)).encode())
    else:
        raise _UnknownError


def _feed_items(found: Any, items: Any, within: frozenset[int]) -> None:
    found.update(f"{type(items).__name__} {len(items)}".encode())
    if isinstance(items, dict):
        for key, value in items.items():
            if key not in ORIGIN_ENTRIES and key not in _LOADERS:
                _feed(found, repr(key), value, within)
    else:
        for value in sorted(items, key=repr) if isinstance(items, (set, frozenset)) else items:
            _feed(found, "-", value, within)


def _feed_tensor(found: Any, tensor: torch.Tensor) -> None:
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_meta:
        raise _UnknownError
    found.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    if tensor.numel():
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def _code(value: Any) -> str:
    """The name of a class or function of a known package."""
    module, name = getattr(value, "__module__", None) or "", getattr(value, "__qualname__", "")
    if module.partition(".")[0] not in _KNOWN or "<" in name:  # <lambda>, <locals>: the name does not say what it does
        raise _UnknownError
    return f"{module}.{name}"
