"""The contract of an engine: what it needs, as data, and the function that compiles one graph."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .calls import Flat


@dataclass(frozen=True)
class Target:
    """What a graph is compiled for.

    Attributes:
        precision: "float32", "bfloat16" or "float16": the type in which float32 values may be computed.
        device: the engine's own name of a device; "" its usual one.
        mode: of torch.compile; "" its usual one.
        threads: CPU threads.
    """

    precision: str
    device: str = ""
    mode: str = ""
    threads: int = 1


class Graph(Protocol):
    """A compiled call of one signature."""

    def __call__(self, module: nn.Module, tensors: list[torch.Tensor], /) -> list[torch.Tensor]:
        """What the call returns for these tensors; `module` is what it was compiled from."""


@dataclass(frozen=True)
class Engine:
    """One way to compile graphs.

    Attributes:
        name: as it is written in settings.
        package: what must be importable; "" nothing more than torch.
        extra: the extra of this package that installs it.
        machines: the kinds of devices on which the pipeline's models may lie.
        precisions: what it can compute in, as far as a device allows.
        modes: names that `Target.mode` may have.
        compile_block: a module's call, compiled by itself and left in the module's place; None if it cannot do that.
        keeps_weights: whether a graph has its own copy of the weights, so that other weights need another one.
        compile: one graph of a call.
        fuses_grids: whether it makes 8-bit products of quantized layers.
        follows_model: whether a model in bfloat16 is computed in that, whatever precision is asked for.
        refusal: why it cannot compile for a target, asked once the package is known to be there; None if it can.
        devices: the names of its devices here, with what each can compute in.
        identity: what else a stored graph depends on: versions, the name of the device.
        store, restore: a graph as bytes, and again a graph; None where the engine keeps its own store.
    """

    name: str
    compile: Callable[[Flat, list[torch.Tensor], Target], Graph]
    package: str = ""
    extra: str = ""
    machines: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ("float32",)
    modes: tuple[str, ...] = ("",)
    takes_device: bool = False
    compile_block: Callable[[nn.Module, Target], Callable[..., object]] | None = None
    keeps_weights: bool = False
    fuses_grids: bool = False
    follows_model: bool = False
    refusal: Callable[[Target], str | None] = lambda _: None
    devices: Callable[[], list[str]] = list
    identity: Callable[[Target], dict[str, str]] = lambda _: {}
    store: Callable[[Graph], bytes] | None = None
    restore: Callable[[bytes, Target], Graph] | None = None

    def missing(self) -> str | None:
        """That its package is not installed, and how it is; None if it is there."""
        if self.package and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed (pip install 'diffusion-accel[{self.extra}]')"
        return None
