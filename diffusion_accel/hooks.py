"""Hooks that are installed and removed together, and the small tree helpers that hooks need."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook


class HookSet:
    """Hooks installed together and removed together, leaving the modules exactly as they were found.

    Hooks are chained by diffusers' `HookRegistry`: the one added last runs first.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._modules: list[torch.nn.Module] = []

    def add(self, module: torch.nn.Module, hook: ModelHook) -> None:
        """Install `hook` on `module` under this set's name."""
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, self.name)
        self._modules.append(module)

    def __len__(self) -> int:
        return len(self._modules)

    def remove(self) -> None:
        """Remove every hook of this set. Safe to call twice."""
        while self._modules:
            module = self._modules.pop()
            registry = getattr(module, "_diffusers_hook", None)
            if registry is None:
                continue
            _unchain(registry, self.name)
            tidy(module)


def _unchain(registry: Any, name: str) -> None:
    """Remove a hook, also from between others.

    diffusers' `remove_hook` connects the hook that was added next to the function below the removed one, but for a
    hook with a `new_forward` of its own in the wrong place: it would no longer run, and its removal would bring the
    removed hook back.
    """
    if name not in registry.hooks:
        return
    place = registry._hook_order.index(name)
    removed, following = registry._fn_refs[place], registry._fn_refs[place + 1 : place + 2]
    below = removed.forward if removed.original_forward is None else removed.original_forward
    kept = [(ref, ref.forward) for ref in following if ref.original_forward is not None]
    registry.remove_hook(name, recurse=False)
    for ref, forward in kept:
        ref.forward, ref.original_forward = forward, below


def remove_hooks(model: torch.nn.Module, prefix: str) -> None:
    """Remove all hooks whose name begins with `prefix` from the layers of a model, whoever installed them."""
    for module in model.modules():
        registry = module.__dict__.get("_diffusers_hook")
        for name in [n for n in getattr(registry, "_hook_order", ()) if n.startswith(prefix)]:
            _unchain(registry, name)
            tidy(module)


def tidy(module: torch.nn.Module, keep_registry: bool = False) -> None:
    """Remove what an empty `HookRegistry` leaves on a module; not the registry itself if it was there before."""
    registry = module.__dict__.get("_diffusers_hook")
    if registry is not None and not registry.hooks and not keep_registry:
        del module._diffusers_hook
    # The registry puts back the bound method it found as an instance attribute; drop that trace as well.
    forward: Any = module.__dict__.get("forward")
    if getattr(forward, "__func__", None) is type(module).forward and forward.__self__ is module:
        del module.__dict__["forward"]


@functools.lru_cache(maxsize=256)
def _signature(method: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(method)
    return signature.replace(parameters=list(signature.parameters.values())[1:])  # without self


def bind_forward(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `module` by the parameter names of its class's `forward`."""
    return bind_method(type(module).forward, args, kwargs)


def bind_method(method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a class's `method` by name, without self; raises `TypeError` as the call would."""
    named = dict(_signature(method).bind(*args, **kwargs).arguments)
    for parameter in _signature(method).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name, {}))
    return named


def forward_parameters(module: torch.nn.Module) -> tuple[str, ...]:
    """The parameter names of `module`'s own `forward`, in order."""
    return tuple(_signature(type(module).forward).parameters)


def map_tensors(fn: Callable[[Any], Any], value: Any, kind: type = torch.Tensor) -> Any:
    """`value` with `fn` applied to every tensor (or `kind`) in it: nested lists, tuples and dicts; the rest stays."""
    if isinstance(value, kind):
        return fn(value)
    if isinstance(value, dict):
        return {k: map_tensors(fn, v, kind) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map_tensors(fn, v, kind) for v in value)
    return value


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Every tensor in a nested value, in order."""
    found: list[torch.Tensor] = []
    map_tensors(found.append, value)
    return found


def tensor_bytes(value: Any) -> int:
    """The bytes of all tensors in a nested value, each tensor object counted once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors_in(value)}.values())
