"""What a process does, operation by operation, as torch tells it while a model runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from diffusion_accel.hooks import tensors_in
from diffusion_accel.measure.timing import timed

_ALLOCATES = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "lift_fresh")


@dataclass(frozen=True)
class Operation:
    """One operation of torch.

    Attributes:
        layer: the innermost layer that it belongs to.
        flops: floating-point operations, 2 for a multiply-add; 0 where only memory counts.
        bytes: read and written.
        itemsize: bytes of a value, which says how fast a machine multiplies.
        seconds: that it took here; None on the meta device.
    """

    layer: str
    flops: float
    bytes: int
    itemsize: int
    seconds: float | None


@dataclass(frozen=True)
class Sent:
    """Messages that left together, and those that are expected with them; `Waited` says when they are needed."""

    number: int
    sent: int
    received: int


@dataclass(frozen=True)
class Waited:
    """The messages `number` are needed here."""

    number: int


Event = Operation | Sent | Waited


class Recorder(TorchDispatchMode):
    """Notes the operations that run inside it; views and allocations are none."""

    def __init__(self, names: dict[int, str], timed: bool) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.timed = timed
        self._names, self._layers = names, [""]
        self._paused = False
        self._attention = _Attention(self)

    @contextmanager
    def into(self, events: list[Event]) -> Iterator[None]:
        """Note what runs inside in a list."""
        self.events = events
        with self:
            yield

    def __enter__(self) -> Any:
        def enter(module: nn.Module, _: Any) -> None:
            self._layers.append(self._names.get(id(module), self._layers[-1]))

        def leave(*_: object) -> None:
            self._layers.pop()

        self._handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
        self._attention.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._attention.__exit__(*error)
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What runs inside is not noted."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output, seconds = timed(lambda: func(*args, **kwargs), "cpu")
        if self._paused or not _moves_data(func):
            return output
        count = flop_registry.get(func.overloadpacket)
        flops = float(count(*args, **kwargs, out_val=output)) if count is not None else 0.0
        self.note([*tensors_in((args, kwargs)), *tensors_in(output)], flops, seconds)
        return output

    def note(self, tensors: list[torch.Tensor], flops: float, seconds: float) -> None:
        """Add an operation that reads and writes `tensors`."""
        size = sum(t.numel() * t.element_size() for t in tensors)
        itemsize = max((t.element_size() for t in tensors if t.is_floating_point()), default=4)
        self.events.append(Operation(self._layers[-1], flops, size, itemsize, seconds if self.timed else None))


class _Attention(TorchFunctionMode):
    """Takes attention as one operation: how torch splits it up depends on the device."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value = (*args, *(kwargs[k] for k in ("query", "key", "value") if k in kwargs))[:3]
        with self.recorder.paused():
            if query.device.type == "meta":
                # laid out as the fused kernels do, heads inside positions
                shape = *query.shape[:-3], *query.shape[-2:-4:-1], value.shape[-1]
                output, seconds = query.new_empty(shape).transpose(-2, -3), 0.0
            else:
                output, seconds = timed(lambda: func(*args, **kwargs), "cpu")
        shapes = (t.reshape(-1, 1, *t.shape[-2:]).shape for t in (query, key, value))
        self.recorder.note([query, key, value, output], float(sdpa_flop_count(*shapes)), seconds)
        return output


def _moves_data(func: Any) -> bool:
    if func.overloadpacket.__name__ in _ALLOCATES:
        return False
    return not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
