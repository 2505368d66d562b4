#!/usr/bin/env python3
"""How near a step's time is to the floor: its operations over what a large matrix product reaches, by type of layer.

    OMP_NUM_THREADS=1 python scripts/measure_engine_floor.py --precisions float32 bfloat16
    OMP_NUM_THREADS=1 python scripts/measure_engine_floor.py --shape sd15 --latent 32

The rate of each precision is that of a square matrix product in OpenVINO on the same machine. Times by type of layer
are OpenVINO's own profile; `torch` and `whole` are whole calls, in turn.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from measuring import head, line
from shapes import sd15_unet
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffusion_accel.compiled import openvino_engine
from diffusion_accel.compiled.calls import Call, Flat
from diffusion_accel.compiled.engine import Target
from diffusion_accel.flops import count_flops
from diffusion_accel.hooks import bind_forward
from diffusion_accel.measure.timing import interleaved
from diffusion_accel.model_files.names import EMBEDDED

SIDE = 2048  # of the matrices
PRODUCTS = "linear, attention"
KINDS = {"Convolution": "convolution"} | dict.fromkeys(
    ("FullyConnected", "MatMul", "ScaledDotProductAttention"), PRODUCTS
)
OTHER = "other (norms, activations, copies)"


class Product(nn.Module):
    """A matrix product, as a model."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(SIDE, SIDE), requires_grad=False)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        """(N, SIDE) to (N, SIDE)."""
        return sample @ self.weight


def graph(module: nn.Module, arguments: dict[str, Any], precision: str) -> tuple[Any, list[torch.Tensor]]:
    """A call of a module as OpenVINO's graph, which keeps a profile, and its tensors."""
    call = Call.of(bind_forward(module, (), arguments))
    flat = Flat(module, call.template, [tensor.dtype for tensor in call.tensors])
    settings = openvino_engine._settings
    openvino_engine._settings = lambda target: {**settings(target), "PERF_COUNT": True}
    try:
        target = Target(precision, threads=torch.get_num_threads())
        return openvino_engine.OPENVINO.compile(flat, call.tensors, target), call.tensors
    finally:
        openvino_engine._settings = settings


def spent(made: Any) -> dict[str, float]:
    """Seconds of the last run of a graph by type of layer."""
    found: dict[str, float] = defaultdict(float)
    for node in made.request.profiling_info:
        found[KINDS.get(node.node_type, OTHER)] += node.real_time.total_seconds()
    return found


def operations(module: nn.Module, arguments: dict[str, Any]) -> dict[str, float]:
    """Floating-point operations of a call by type of layer."""
    with count_flops() as count, FlopCounterMode(display=False) as counter:
        module(**arguments)
    counts = counter.get_flop_counts()["Global"]
    convolution = float(sum(flops for operator, flops in counts.items() if "convolution" in str(operator)))
    return {"convolution": convolution, PRODUCTS: count.total - convolution}


def table(model: nn.Module, arguments: dict[str, Any], precision: str, rounds: int) -> None:
    """Measure one precision, and print its rows."""
    product, matrix = graph(Product(), {"sample": torch.randn(SIDE, SIDE)}, precision)
    step, tensors = graph(model, arguments, precision)
    flops, parts = operations(model, arguments), list[dict[str, float]]()
    calls = {
        "product": lambda: product(None, matrix),
        "whole": lambda: step(None, tensors),
        "torch": lambda: model(**arguments),
    }

    @contextmanager
    def profiled(name: str) -> Iterator[None]:
        yield
        if name == "whole":
            parts.append(spent(step))

    times = interleaved(calls, rounds, around=profiled)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    rate = 2 * SIDE**3 / seconds["product"]
    for name in (*flops, OTHER, "whole", "torch"):
        count = sum(flops.values()) if name in ("whole", "torch") else flops.get(name, 0.0)
        took = seconds.get(name) or statistics.median(part.get(name, 0.0) for part in parts)
        share = f"{count / rate / took:.0%}" if count and took else ""
        line(precision, name, f"{count / 1e9:.3f}", f"{count / rate * 1e3:.2f}", f"{took * 1e3:.2f}", share)


@torch.no_grad()
def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["sticker", "sd15"], default="sticker")
    parser.add_argument("--latent", type=int, default=12)
    parser.add_argument("--precisions", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    if options.shape == "sd15":
        model: Any = sd15_unet()
    else:
        model = UNet2DConditionModel.from_pretrained(EMBEDDED["sticker"].path / "unet")
    width, tokens = model.config.cross_attention_dim, 77 if options.shape == "sd15" else 24
    sample = torch.randn(2, model.config.in_channels, options.latent, options.latent)
    arguments = {
        "sample": sample,
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(2, tokens, width),
    }
    head("precision", "part", "GFLOP", "floor ms", "ms", "of the rate of a matrix product")
    for precision in options.precisions:
        table(model, arguments, precision, options.rounds)


if __name__ == "__main__":
    main()
