"""Hooks that are installed and removed together, and the small tree helpers that hooks need."""

from __future__ import annotations

import functools
import inspect
import logging
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from diffusers.hooks import HookRegistry, ModelHook

from .diffusers_compat import drop_registry, hook_names, lowest_function, registry_of, set_registry, sink, unchain
from .errors import CallStateError
from .module_tree import parts_above, parts_of

if TYPE_CHECKING:
    from .changes import Changes

logger = logging.getLogger(__name__)

_WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
_OWN = "diffusion_accel."  # how the names of this toolkit's hooks begin
_COMPILED = "_torchdynamo_orig_callable"  # what torch.compile notes on what it returns
_CALLED = ("forward", "_compiled_call_impl")  # what a call of a module runs
_CALLS = "_diffusion_accel_calls"


def model_of(module: Any) -> Any:
    """The model itself: what torch.compile, a data-parallel wrapper or a `CallSite` has inside, else `module`.

    Whoever asks for the class, the configuration or the parameters of a model asks this first.
    """
    while True:
        if isinstance(module, CallSite):
            module = module.module
        elif (inside := vars(module).get("_modules", {}).get(_WRAPPERS.get(type(module).__name__, ""))) is not None:
            module = inside
        else:
            return module


def compiled_in_place(module: torch.nn.Module) -> bool:
    """Whether `module.compile()` was called: calls run a compiled function that has the module's forward inside."""
    return getattr(module, "_compiled_call_impl", None) is not None


class CallSite:
    """Stands for a module compiled in place where hooks are put around its calls, for hooks on its forward would be
    compiled with it. Everything else is the module's."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module

    @property
    def forward(self) -> Callable[..., Any]:
        """What runs when the module is called: the compiled function, or hooks around it."""
        call: Any = self.module._compiled_call_impl
        return call

    @forward.setter
    def forward(self, value: Callable[..., Any]) -> None:
        self.module._compiled_call_impl = value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


class HookSet:
    """Hooks installed together and removed together, leaving the modules exactly as they were found.

    Hooks are chained by diffusers' `HookRegistry`: the one added last runs first. They stand around whatever is called:
    also around a model that is compiled, whether by torch.compile or in place.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._modules: list[torch.nn.Module] = []

    @classmethod
    def within(cls, changes: Changes, name: str) -> HookSet:
        """A set that is removed when `changes` are undone."""
        hooks = cls(name)
        changes.add(hooks.remove)
        return hooks

    def add(self, module: torch.nn.Module, hook: ModelHook, innermost: bool = False) -> None:
        """Install `hook` on `module` under this set's name.

        Args:
            innermost: below the hooks that are there: what it sees is what the module itself is given. It has a
                `new_forward`.

        Raises:
            CallStateError: there is one of this name, so of a call in another thread, which goes on.
        """
        if self.name in (registry := _registry(module)).hooks:
            raise CallStateError(
                f"{type(module).__name__} is in use by another call; run one at a time, or give each pipeline its own"
            )
        self._modules.append(module)
        registry.register_hook(hook, self.name)
        if innermost:
            sink(registry)

    def __len__(self) -> int:
        return len(self._modules)

    def remove(self) -> None:
        """Remove every hook of this set. Safe to call twice, and again after an interrupt."""
        while self._modules:
            module = self._modules[-1]
            for registry in _registries(module):
                if registry is not None:
                    unchain(registry, self.name)
                    tidy(module)
            self._modules.pop()


def run_uncompiled(changes: Changes, models: list[Any]) -> None:
    """Let what is compiled and has hooks inside run uncompiled until `changes` are undone.

    Hooks are not for compiling: what they look up changes with every step. That concerns parts of models (blocks that
    were compiled each by itself), a ControlNet, a VAE and its methods; hooks around a compiled part do it no harm.
    """
    parts: dict[str, int] = {}
    for module in [part for model in models for part in parts_above(model, _is_hooked)]:
        compiled, inside = _compiled_functions(module), model_of(module)
        if compiled:
            parts[type(inside).__name__] = parts.get(type(inside).__name__, 0) + 1
            for owner, name, function in compiled:
                changes.set(owner, name, getattr(function, _COMPILED))
    if parts:
        which = ", ".join(f"{count} {name}" for name, count in parts.items())
        logger.warning("%s: run uncompiled in this call, because a feature has hooks inside", which)


def _compiled_functions(module: torch.nn.Module) -> list[tuple[Any, str, Any]]:
    """Compiled functions on one module in the place of its forward, its call or other methods: where, name, function.

    Below hooks it is in their chain.
    """
    functions = [name for name, value in vars(module).items() if type(value) is types.FunctionType]
    registries = _registries(module)
    if not functions and registries == (None, None):
        return []
    places = [(module, name) for name in functions if name not in _CALLED]
    for name, registry in zip(_CALLED, reversed(registries), strict=True):
        places.append(lowest_function(registry) or (module, name))
    found = [(owner, name, vars(owner).get(name)) for owner, name in places]
    return [(owner, name, function) for owner, name, function in found if is_compiled(function)]


def is_compiled(function: object) -> bool:
    """Whether torch.compile made a function; not one that somebody put around such a function."""
    original = getattr(function, _COMPILED, None)
    return original is not None and getattr(function, "__wrapped__", original) == original


def compiled_anywhere(model: torch.nn.Module) -> bool:
    """Whether a model, one of its parts or one of their methods is compiled."""
    return any(map(_compiled_functions, parts_of(model)))


def _is_hooked(module: torch.nn.Module) -> bool:
    registries = (registry for registry in _registries(module) if registry is not None)
    return any(name.startswith(_OWN) for registry in registries for name in registry.hooks)


def _registries(module: torch.nn.Module) -> tuple[Any, Any]:
    """The registries of the hooks around a module's compiled call, and of those on its forward; None where none is."""
    return vars(module).get(_CALLS), registry_of(module)


def _registry(module: torch.nn.Module) -> Any:
    """The registry of the hooks around the calls of a module. Made here, it is removed with the last of its hooks."""
    attributes, around_call = vars(module), compiled_in_place(module)
    found = attributes.get(_CALLS) if around_call else registry_of(module)
    if found is not None:
        return found
    registry: Any = HookRegistry(CallSite(module) if around_call else module)
    registry._own_forward = attributes.get("forward")  # what the instance has in place of its class's
    if around_call:
        attributes[_CALLS] = registry
    else:
        set_registry(module, registry)
    return registry


def own_forward(module: torch.nn.Module) -> Any:
    """What stands below all hooks in the place of a module's forward: its own, or what was put on the instance."""
    place = lowest_function(registry_of(module))
    found = vars(module).get("forward") if place is None else getattr(*place)
    return functools.partial(type(module).forward, module) if found is None else found


def remove_hooks(model: torch.nn.Module, prefix: str) -> None:
    """Remove all hooks whose name begins with `prefix` from the layers of a model, whoever installed them."""
    for module in parts_of(model):
        registry: Any = registry_of(module)
        for name in [n for n in hook_names(registry) if n.startswith(prefix)]:
            unchain(registry, name)
            tidy(module)


def tidy(module: torch.nn.Module, keep_registry: bool = False) -> None:
    """Remove what an empty `HookRegistry` leaves on a module; not the registry itself if it was there before."""
    attributes = vars(module)
    calls, registry = _registries(module)
    if calls is not None and not calls.hooks:
        del attributes[_CALLS]
    # The registry puts back the bound method it found as an instance attribute; drop that trace as well, and first: an
    # interrupt in between leaves the registry, by which this is done again.
    found = getattr(registry, "_own_forward", None)
    forward: Any = attributes.get("forward")
    if forward is not found and _is_own(forward, module):
        del attributes["forward"]
    if registry is not None and not registry.hooks and not keep_registry:
        drop_registry(module)


def _is_own(forward: Any, module: torch.nn.Module) -> bool:
    """Whether an instance attribute only says what the class says."""
    return getattr(forward, "__func__", None) is type(module).forward and forward.__self__ is module


class _Parameters:
    """What a function takes, to bind its arguments by name."""

    def __init__(self, signature: inspect.Signature) -> None:
        self.signature, several = signature, list(signature.parameters.values())
        self.names = tuple(signature.parameters)
        self._known = frozenset(self.names)
        self._required = frozenset(p.name for p in several if p.default is p.empty)
        self._plain = all(p.kind is p.POSITIONAL_OR_KEYWORD for p in several)
        self._others = next((p.name for p in several if p.kind is p.VAR_KEYWORD), None)

    def bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments by name, in the order of the parameters, with those that `**kwargs` takes among them.

        A hook does so in every step, and `Signature.bind` takes 30 microseconds, so where nothing is left to it to
        decide or to refuse it is not asked.
        """
        if self._plain and len(args) <= len(self.names):
            given = dict(zip(self.names, args, strict=False))
            keys = given.keys() | kwargs.keys()
            if len(keys) == len(given) + len(kwargs) and self._required <= keys <= self._known:
                given |= kwargs
                return {name: given[name] for name in self.names if name in given}
        named = dict(self.signature.bind(*args, **kwargs).arguments)
        if self._others is not None:
            named.update(named.pop(self._others, {}))
        return named


@functools.lru_cache(maxsize=256)
def _parameters(method: Callable[..., Any]) -> _Parameters:
    signature = inspect.signature(method)
    return _Parameters(signature.replace(parameters=list(signature.parameters.values())[1:]))  # without self


def bind_forward(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `module` by the parameter names of its class's `forward`."""
    return bind_method(type(model_of(module)).forward, args, kwargs)


def bind_method(method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a class's `method` by name, without self; raises `TypeError` as the call would."""
    return _parameters(method).bound(args, kwargs)


def bind_bound(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of what an object has, by name: a method, perhaps with something in its place that wraps
    it; raises `TypeError` as the call would."""
    inner = inspect.unwrap(call)
    method = getattr(inner, "__func__", None)
    parameters = _Parameters(inspect.signature(inner)) if method is None else _parameters(method)
    return parameters.bound(args, kwargs)


def call_arguments(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What a method is called with, by name and with its defaults; empty if it does not take that."""
    try:
        bound = inspect.signature(call).bind_partial(None, *args, **kwargs)
    except TypeError:
        return {}  # the call itself says why
    bound.apply_defaults()
    return dict(bound.arguments)


def as_given(
    module: torch.nn.Module, args: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments by name as positional ones and keywords, in the way in which `args` were: what is compiled need not be
    compiled again, and a forward that was put on the instance gets what it expects."""
    first = forward_parameters(module)[: len(args)]
    return tuple(named[name] for name in first), {name: value for name, value in named.items() if name not in first}


def forward_parameters(module: torch.nn.Module) -> tuple[str, ...]:
    """The parameter names of `module`'s own `forward`, in order."""
    return _parameters(type(model_of(module)).forward).names


def first_argument(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call gives for the first parameter of `module`, or of the module that it hands its arguments to."""
    if args:
        return args[0]
    wrapped: Any = module
    while "args" in forward_parameters(wrapped)[:1] and isinstance(getattr(wrapped, "module", None), torch.nn.Module):
        wrapped = wrapped.module
    return kwargs[forward_parameters(wrapped)[0]]


def map_tensors(fn: Callable[[Any], Any], value: Any, kind: type = torch.Tensor) -> Any:
    """`value` with `fn` applied to every tensor (or `kind`) in it: nested lists, tuples and dicts; the rest stays."""
    if isinstance(value, kind):
        return fn(value)
    if isinstance(value, dict):
        return {k: map_tensors(fn, v, kind) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map_tensors(fn, v, kind) for v in value)
    return value


def tensors_in(value: object) -> list[torch.Tensor]:
    """Every tensor in a nested value, in order."""
    found: list[torch.Tensor] = []
    map_tensors(found.append, value)
    return found


def version_of(tensor: torch.Tensor) -> int:
    """How many times a tensor was changed in place; 0 where that is not counted (torch.inference_mode)."""
    return 0 if tensor.is_inference() else tensor._version


def tensor_bytes(value: object) -> int:
    """The bytes of all tensors in a nested value, each tensor object counted once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors_in(value)}.values())
