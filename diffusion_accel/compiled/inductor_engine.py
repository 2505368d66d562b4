"""torch.compile. Weights are inputs of its graphs, and its guards notice whatever else changes; not so where there are
hooks inside of the module."""

from __future__ import annotations

import functools
import logging
import types
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from diffusion_accel.io import first_line

from .engine import Engine, Graph, Target

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .calls import Flat

logger = logging.getLogger(__name__)

_REPLAYED = ("reduce-overhead", "max-autotune")  # CUDA graphs: what they return is written over by the next call


class _Compiled:
    """Does not hold the module: it is an argument of what is compiled."""

    def __init__(self, flat: Flat, tensors: list[torch.Tensor], target: Target, fullgraph: bool) -> None:
        import torch  # heavy: torch
        from torch.fx.experimental.proxy_tensor import make_fx  # heavy: torch

        template, precision = flat.template, getattr(torch, target.precision)

        def call(module: nn.Module, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            if precision is torch.float32:
                return tuple(template.run(module, list(tensors)))
            with torch.autocast(tensors[0].device.type, precision):
                return tuple(template.run(module, list(tensors)))

        # Dynamo counts what it compiles by code object: each signature has one of its own
        own: Any = types.FunctionType(
            call.__code__.replace(), call.__globals__, call.__name__, call.__defaults__, call.__closure__
        )
        self.traced = template.inside is not None
        if (
            self.traced
        ):  # Dynamo would compile again for the hooks of each call of the pipeline, which are other objects
            own = make_fx(functools.partial(call, flat.module))(*tensors)
        self.function = torch.compile(own, fullgraph=fullgraph, dynamic=False, mode=target.mode or None)
        self.replayed = target.mode in _REPLAYED

    def __call__(self, module: nn.Module, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        returned = self.function(*tensors) if self.traced else self.function(module, *tensors)
        return [tensor.clone() for tensor in returned] if self.replayed else list(returned)


def _compile(flat: Flat, tensors: list[torch.Tensor], target: Target) -> Graph:
    graph = _Compiled(flat, tensors, target, fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Dynamo, about code of others
        try:
            graph(flat.module, tensors)
        except Exception as error:  # something in it cannot be traced: several graphs with Python between them
            logger.info("%s is not one graph: %s", type(flat.module).__name__, first_line(error))
            graph = _Compiled(flat, tensors, target, fullgraph=False)
            graph(flat.module, tensors)
    return graph


def _compile_block(block: nn.Module, target: Target) -> Callable[..., object]:
    import torch  # heavy: torch

    call: Any = torch.compile(block.forward, mode=target.mode or None)
    return call


INDUCTOR = Engine(
    "inductor",
    _compile,
    compile_block=_compile_block,
    machines=("cpu", "cuda", "xpu"),
    precisions=("float32", "bfloat16", "float16"),
    modes=("", "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
)
