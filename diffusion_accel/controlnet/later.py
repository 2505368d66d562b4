"""Tensors that are still being computed: whoever first looks at one waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch

from diffusion_accel.hooks import map_tensors

#: what pipelines do with a ControlNet's residuals on the way to the U-Net (guess mode); no reason to wait yet
_ON_THE_WAY = (torch.zeros_like, torch.cat)


class Later(torch.Tensor):
    """A tensor whose values come later. Any function of torch that is given one waits for it, and raises what the
    computing raised; the result is a plain tensor.

    The tensor that this object itself is, has no elements: nothing may take it for the one that it stands for.
    """

    _get: Callable[[], torch.Tensor]

    @classmethod
    def of(cls, get: Callable[[], torch.Tensor]) -> Self:
        """The tensor that `get` returns, or waits for; it is called at each use."""
        made = torch.empty(0).as_subclass(cls)
        made._get = get
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function with the tensors themselves, or note that it is to be called."""
        if func in _ON_THE_WAY:
            return cls.of(lambda: _called(func, args, kwargs))
        return _called(func, args, kwargs)


def resolved(value: Any) -> Any:
    """A nested value with the tensors themselves in it; waits for them."""
    return map_tensors(lambda later: later._get(), value, Later)


def _called(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Any:
    return func(*resolved(args), **resolved(kwargs or {}))
