"""Weights that can be read and not written: what a quantized layer shows of its codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.hooks import map_tensors, tensors_in

REASON = (
    "the weights of a quantized layer are whole numbers on a grid and cannot be written; a LoRA works beside them "
    "without fusing (load_lora_weights, set_adapters); to change the weights themselves, fuse or load into the "
    "full-precision model and quantize that"
)
_IN_PLACE = frozenset(
    f"__i{n}__" for n in "add and floordiv lshift matmul mod mul or pow rshift sub truediv xor".split()
) | {"__setitem__", "__delitem__"}
_HARMLESS = frozenset({"requires_grad_", "share_memory_"})  # end like functions that write
_FLAGS = tuple(vars(torch._C.TensorBase)[name].__set__ for name in ("grad", "requires_grad"))
_SHARING = frozenset({"numpy", "__array__", "__dlpack__"})  # hand out memory that could be written unseen


class SealedWeight(torch.Tensor):
    """Floating-point weights that refuse to be written; what shares their memory does, too, all else is plain.

    Without it, `fuse_lora()` and its like would change numbers that nothing computes with, or nothing saves.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _writes(func, args, kwargs):
            raise ConfigurationError(REASON)
        with torch._C.DisableTorchFunctionSubclass():
            stores = {_storage(t) for t in tensors_in([list(args), kwargs]) if isinstance(t, cls)}
            args, kwargs = map_tensors(_plain, args), map_tensors(_plain, kwargs)
            if getattr(func, "__name__", "") in _SHARING:
                args = (args[0].clone(), *args[1:])
            found = func(*args, **kwargs)
            return map_tensors(lambda t: t.as_subclass(cls) if _storage(t) in stores else t, found)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(torch.Tensor).clone().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.as_subclass(torch.Tensor).clone()


def sealed(weight: torch.Tensor) -> torch.Tensor:
    """`weight` as a tensor that refuses to be written."""
    return weight.detach().as_subclass(SealedWeight)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(torch.Tensor) if isinstance(tensor, SealedWeight) else tensor


def _storage(tensor: torch.Tensor) -> int | None:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and the like
        return None


def _writes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a torch function would write into a sealed weight among its arguments."""

    def holds(value: Any) -> bool:
        return any(isinstance(t, SealedWeight) for t in tensors_in(value))

    if holds(kwargs.get("out")):
        return True
    name = getattr(func, "__name__", "")
    written = args[0] if args else next((kwargs[k] for k in ("tensor", "self", "input") if k in kwargs), None)
    if name == "__set__":
        return func not in _FLAGS and holds(written)
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__") and name not in _HARMLESS)
    return (in_place or kwargs.get("inplace") is True) and holds(written)
