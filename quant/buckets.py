"""Which of the calibrated timesteps a running call is at: what layers with grids for each of them share."""

from __future__ import annotations

import copy
import inspect
import weakref
from typing import Any, Protocol

import torch
from torch import nn

from diffusion_accel.hooks import bind_forward
from diffusion_accel.inside import is_traced

from .packing import unpack
from .spec import LayerSpec


class Buckets:
    """Which bucket of calibrated timesteps the running call of the denoiser is in; all layers of a model share one.

    A timestep belongs to the nearest calibrated one, to the noisier of two equally near ones. A batch may hold rows of
    several timesteps.

    Attributes:
        timesteps: the calibrated timesteps, noisiest first.
        index: (1,) or (N,), the bucket of each row, on the device of the model.
        number: the bucket, where it is one for all rows and known without waiting for a device.
    """

    __slots__ = ("__dict__", "__weakref__", "index", "number")  # the latter two are no settings: see `snapshot`

    def __init__(self, timesteps: tuple[float, ...]) -> None:
        self.timesteps = timesteps
        self.index = torch.zeros(1, dtype=torch.long)
        self.number: int | None = 0
        self._table = torch.tensor(timesteps, dtype=torch.float32)

    def select(self, timestep: torch.Tensor | float) -> None:
        """Go to the bucket of `timestep`, a number or (N,)."""
        times = torch.as_tensor(timestep).float().reshape(-1)
        if self._table.device != times.device:
            self._table = self._table.to(times.device)
        index = (times[:, None] - self._table).abs().argmin(1)
        if is_traced():  # a graph is for all timesteps
            self.index, self.number = index, None
            return
        if times.device.type == "cpu" and len({*index.tolist()}) == 1:
            index = index[:1]
        self.index = index
        self.number = int(index) if len(index) == 1 and times.device.type == "cpu" else None

    def rows(self, count: int) -> torch.Tensor:
        """The bucket of each of `count` rows, (1,) or (count,): a module may see the first rows only, or several
        (frames) for each row of the denoiser."""
        index = self.index
        if len(index) in (1, count):
            return index
        return index[:count] if count < len(index) else index.repeat_interleave(count // len(index))


class SelectBucket:
    """The `forward` of a denoiser with quantized layers: tells them the timestep, then runs the model's own.

    It stands where diffusers' hooks wrap it, so that it sees the arguments that reach the model (which a hook may have
    stacked from several steps), and is copied together with the model.
    """

    goes_into_graphs = True  # as a part of the model's forward

    def __init__(self, module: nn.Module, buckets: Buckets, own: Any = None) -> None:
        """`own`: what was put on the instance in place of its class's `forward`."""
        self._module, self.buckets, self.own = weakref.ref(module), buckets, own  # weak, so that no cycle keeps a model
        self.__signature__ = inspect.signature(type(module).forward.__get__(module) if own is None else own)

    @property
    def module(self) -> nn.Module:
        """The denoiser."""
        found = self._module()
        assert found is not None
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> SelectBucket:
        twin = memo.get(id(self.module), self.module)
        return SelectBucket(twin, copy.deepcopy(self.buckets, memo), copy.deepcopy(self.own, memo))

    def __reduce__(self) -> Any:
        return SelectBucket, (self.module, self.buckets, self.own)

    def __call__(self, *args: object, **kwargs: object) -> Any:
        """Go to the bucket of the call's timestep, then do what the model does."""
        self.buckets.select(bind_forward(self.module, args, kwargs)["timestep"])
        if self.own is not None:
            return self.own(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)

    @classmethod
    def install(cls, module: nn.Module, buckets: Buckets) -> None:
        """Put it on `module`."""
        module.forward = cls(module, buckets, vars(module).get("forward"))

    @staticmethod
    def uninstall(module: nn.Module) -> None:
        """Take it off again."""
        ours = vars(module).get("forward")
        if isinstance(ours, SelectBucket):
            vars(module).pop("forward")
            if ours.own is not None:
                vars(module)["forward"] = ours.own


class Gridded(Protocol):
    """What has grids of inputs or outputs for each bucket of timesteps.

    Attributes:
        spec: how it is quantized.
        buckets: which timestep the running call is at.
    """

    spec: LayerSpec
    buckets: Buckets

    @property
    def channel_dim(self) -> int:
        """The dimension of the channels in an input."""
        ...


def grid_at(layer: Gridded, table: torch.Tensor, x: torch.Tensor, packed: int = 0) -> torch.Tensor:
    """Scales or zero points of the running call from a table (buckets, K), shaped to broadcast over `x`.

    Args:
        layer: whose table it is.
        table: a row for each bucket, of one value, one for each part of the channels, or one for each channel.
        x: an input or output of the layer.
        packed: the table has a row of packed zero points of so many bits for each bucket.
    """
    number, dim, spec = layer.buckets.number, layer.channel_dim, layer.spec
    found = table[number : number + 1] if number is not None else table[layer.buckets.rows(len(x))]
    if packed:
        found = unpack(found, packed, x.shape[dim])
    if found.is_floating_point():
        found = found.float()
    if 1 < found.shape[1] == spec.parts != x.shape[dim]:
        parts = zip(found.split(1, 1), spec.part_sizes(x.shape[dim]), strict=True)
        found = torch.cat([column.expand(-1, size) for column, size in parts], 1)
    shape = [1] * x.dim()
    shape[0], shape[dim] = len(found), found.shape[1]
    return found.view(shape)
