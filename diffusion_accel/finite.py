"""Numbers that are none: damaged weights, a broken schedule or a type too small for the values end in black images.

Looking costs one synchronisation at the first step and one after the last.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .changes import Changes
from .denoisers import called_denoisers
from .errors import CallStateError, ConfigurationError
from .hooks import compiled_anywhere, compiled_in_place

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

_CHECKED = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@contextmanager
def finite_call(pipeline: DiffusionPipeline, given: dict[str, Any]) -> Iterator[list[Any]]:
    """Around a call of a pipeline: no image that holds NaN or infinity comes out silently.

    Yields a list for the call's output. What was seen last of each kind is kept until the end of the call and looked at
    once.

    Args:
        pipeline: the pipeline.
        given: the arguments of the call by name.

    Raises:
        ConfigurationError: a number, tensor or array among the arguments is not finite.
        CallStateError: the first prediction is not finite.
    """
    for name, value in given.items():
        if not _all_finite(value):
            raise ConfigurationError(f"{name} holds numbers that are not finite (NaN or infinity)")
    here, seen = threading.get_ident(), dict[str, torch.Tensor]()

    def predicted(module: torch.nn.Module, _inputs: object, output: object) -> None:
        tensor = _first_tensor(output)
        if tensor is None or threading.get_ident() != here:
            return
        if "the last prediction" not in seen and not finite(tensor):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CallStateError(
                f"the first prediction of {type(module).__name__} is not finite (NaN or infinity): its weights or "
                f"inputs are damaged, or {kind} is too small for its values; try float32"
            )
        seen["the last prediction"] = tensor

    def decoded(_module: torch.nn.Module, _inputs: object, output: object) -> None:
        tensor = _first_tensor(output)
        if tensor is not None and threading.get_ident() == here:
            seen["what the VAE decoded"] = tensor

    vae = getattr(pipeline, "vae", None)
    decoder = getattr(vae, "decoder", None)
    pairs: list[tuple[torch.nn.Module, Callable[..., None]]] = [
        (module, predicted) for module in called_denoisers(pipeline)
    ]
    whole = isinstance(vae, torch.nn.Module) and not compiled_anywhere(vae)  # else the hook would be compiled with it
    if whole and isinstance(decoder, torch.nn.Module):
        pairs.append((decoder, decoded))
    output: list[Any] = []
    with Changes() as changes:
        for module, hook in pairs:
            if not compiled_in_place(module):
                changes.add(module.register_forward_hook(hook).remove)
        yield output
    result = _first_tensor(output)
    if result is not None:
        seen["the result"] = result
    for what, tensor in seen.items():
        if not finite(tensor):
            logger.warning(
                "the image is damaged: %s holds numbers that are not finite (NaN or infinity); the schedule, the "
                "weights or the type (%s) do not fit; try another scheduler or float32",
                what,
                str(tensor.dtype).removeprefix("torch."),
            )
            return


def finite(value: torch.Tensor) -> bool:
    """Whether all numbers of a tensor are finite, in one pass and without a copy; types that cannot tell are."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.dtype not in _CHECKED:
        return True
    if value.is_meta or not value.numel():
        return True
    low, high = torch.aminmax(value.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _all_finite(value: object) -> bool:
    """Whether an argument of a call, or what its lists hold, is finite; what is no number is."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, torch.Tensor):
        return finite(value)
    if isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return bool(np.isfinite(value).all())
    return all(map(_all_finite, value)) if isinstance(value, (list, tuple)) else True


def _first_tensor(value: object, depth: int = 3) -> torch.Tensor | None:
    if isinstance(value, torch.Tensor):
        return value
    inner: Iterable[Any] = ()
    if isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, (list, tuple)):
        inner = value
    elif hasattr(value, "shape") and hasattr(value, "dtype"):  # a numpy array
        return torch.as_tensor(value)
    for part in inner if depth else ():
        found = _first_tensor(part, depth - 1)
        if found is not None:
            return found
    return None
