"""Whether anything of a model that its calls read has changed since a certain moment.

Everything that is no tensor is compared by value (scales of adapters, switches, hooks, processors put in the place of
others); tensors by identity, by their version, which every write in place raises, and by some of their values, for
writes through `.data` raise nothing. What an object holds in slots beside its `__dict__` is not looked at: so do
caches, and what only belongs to the running call.
"""

from __future__ import annotations

import operator
import types
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .diffusers_compat import LEFT_BY_HOOKS, has_registry
from .inside import CALL

SAMPLES = 64  # values of each tensor of a model that are compared
_OF_HOOKS = LEFT_BY_HOOKS | {CALL}
#: of a module: what hooks leave there, and what torch keeps for itself
NOT_STATE = _OF_HOOKS | (frozenset(nn.Module().__dict__) - {"_parameters", "_buffers", "_modules", "training"})
TORCH_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)
_LEAVES = (type, types.FunctionType, types.MethodType, types.ModuleType, torch.dtype, torch.device, torch.Generator)


class Snapshot:
    """What a model is at one moment; `holds` says whether it still is.

    Args:
        model: the model.
        hooks: whether hooks of diffusers count, on the model and on its parts; those of torch on its parts always do.

    Attributes:
        untouched: whether at the last look hooks of diffusers on its parts were those of the beginning, too.
    """

    def __init__(self, model: nn.Module, hooks: bool = True) -> None:
        self._root = None if hooks else model.__dict__
        self._own = None if hooks else _without_hooks(model.__dict__)
        self.untouched = True
        self._containers: list[Any] = []
        self._copies: list[Any] = []  # what they held
        self._bare: list[Any] = []  # where hooks of torch would be
        self._handles = RemovableHandle.next_id
        self._tensors: list[torch.Tensor] = []
        self._seen: set[int] = set()
        self._note(model)
        self._counted = [t for t in self._tensors if not t.is_inference()]  # those of inference mode have no version
        self._state = self._places(), self._versions()
        self._views = [_samples(t) for t in self._tensors if t.numel() and t.is_contiguous()]
        self._values = _by_kind(self._views)

    def holds(self, values: bool = True) -> bool:
        """Whether nothing has changed; without `values` a write through `.data` is not seen, which takes a quarter of
        the time."""
        try:
            same = self.untouched = all(map(operator.eq, self._containers, self._copies))
            if self._root is not None:
                same = same or all(map(_alike, self._containers, self._copies))
                same = same and _without_hooks(self._root) == self._own
        except RuntimeError:  # another tensor in the place of one cannot be compared by ==
            return False
        return (
            same
            and self._still_bare()
            and self._state == (self._places(), self._versions())
            and (not values or all(torch.equal(a, b) for a, b in zip(self._values, _by_kind(self._views), strict=True)))
        )

    def _still_bare(self) -> bool:
        """Whether no hook of torch is where none was. That is 1,400 places in a small U-Net, looked at only once a hook
        was put on any module of the process, which torch numbers."""
        now = RemovableHandle.next_id
        if now != self._handles:
            if any(self._bare):
                return False
            self._handles = now
        return True

    def _places(self) -> list[int]:
        return list(map(torch.Tensor.data_ptr, self._tensors))

    def _versions(self) -> list[int]:
        return [tensor._version for tensor in self._counted]

    def _note(self, value: object) -> None:
        if isinstance(value, torch.Tensor):
            if id(value) not in self._seen and value.layout == torch.strided and not value.is_meta:
                self._tensors.append(value)
                self._seen.add(id(value))
            return
        live = value if isinstance(value, (dict, list, tuple, set)) else _attributes(value)
        if live is None or id(live) in self._seen:
            return
        self._seen.add(id(live))
        if live is not self._root:
            self._keep(live)
        if not isinstance(live, dict):
            parts: Any = live
        elif isinstance(value, nn.Module):
            parts = [part for key, part in live.items() if key not in NOT_STATE]
            # which hooks there are, not what they hold: one that counts calls changes nothing that is computed
            if live is not self._root:
                for hooks in map(live.get, TORCH_HOOKS):
                    self._keep(hooks) if hooks else self._bare.append(hooks)
        else:
            parts = live.values()
        for part in parts:
            self._note(part)

    def _keep(self, live: Any) -> None:
        self._containers.append(live)
        self._copies.append(live if isinstance(live, tuple) else live.copy())


def _without_hooks(attributes: dict[str, Any]) -> dict[str, Any]:
    """What a module holds, but for what hooks leave there."""
    return {key: value for key, value in attributes.items() if key not in _OF_HOOKS}


def _alike(live: Any, copy: Any) -> bool:
    """Whether a container is as it was, but for hooks of diffusers on a module."""
    if live == copy:
        return True
    hooked = isinstance(live, dict) and (has_registry(live) or has_registry(copy))
    return hooked and _without_hooks(live) == _without_hooks(copy)


def _samples(tensor: torch.Tensor) -> torch.Tensor:
    """A view of at most `SAMPLES` values, evenly spread."""
    flat = tensor.detach().view(-1)
    return flat[:: max(1, -(-flat.numel() // SAMPLES))]


def _by_kind(views: list[torch.Tensor]) -> list[torch.Tensor]:
    """The values of all views, one tensor for each dtype and device."""
    kinds: dict[Any, list[torch.Tensor]] = {}
    for view in views:
        kinds.setdefault((view.dtype, view.device), []).append(view)
    return [torch.cat(same) for same in kinds.values()]


def _attributes(value: object) -> dict[str, Any] | None:
    """What an object holds, if it may hold something that changes."""
    return None if isinstance(value, _LEAVES) else getattr(value, "__dict__", None)
