"""Layers with grids that fit their inputs, for tests of quantized layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffusion_accel.quant.layers import Buckets, QuantizedLayer
from diffusion_accel.quant.ptq.trainable_layer import TrainableLayer
from diffusion_accel.quant.spec import LayerSpec

TIMES = (900.0, 500.0, 100.0)


def conv(**changes: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(**{"in_channels": 12, "out_channels": 9, "kernel_size": 3, "padding": 1, **changes})


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(12, 10)


LAYERS = {
    "linear": linear,
    "conv": conv,
    "conv 1x1": lambda: conv(kernel_size=1, padding=0),
    "conv with stride, dilation and uneven padding": lambda: conv(
        stride=2, dilation=(1, 2), padding=(2, 1), bias=False
    ),
}


def made(layer: nn.Module, **spec: Any) -> QuantizedLayer:
    """A quantized layer with grids that fit inputs of about -3 … 3, others in each bucket."""
    trainable = trainable_layer(layer, **spec)
    return trainable.finished(trainable.buckets)


def trainable_layer(layer: nn.Module, **spec: Any) -> TrainableLayer:
    """What `made` is made of."""
    values = LayerSpec(**{"weight_bits": 4, "activation_bits": 8, **spec})
    trainable = TrainableLayer(layer, values, Buckets(TIMES))
    if values.activation_bits and not values.dynamic:
        top = 2**values.activation_bits - 1
        ranges = torch.tensor([5.0, 6.0, 8.0])[:, None]
        channels = 1 + 0.1 * torch.arange(trainable.input_scale.shape[1])
        trainable.input_scale.data.copy_(ranges * channels / top)
        trainable.input_zero_point.copy_(
            (torch.tensor([0.4, 0.5, 0.6])[:, None] * top).round().expand(-1, len(channels))
        )
    if values.output_bits:
        trainable.output_scale.data.fill_(8 / (2**values.output_bits - 1))
        trainable.output_zero_point.fill_(2 ** (values.output_bits - 1))
    return trainable


def inputs(layer: nn.Module, count: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 12, 7, 6) if isinstance(layer, nn.Conv2d) else (count, 5, 12)
    return torch.randn(*shape, generator=generator)


def on_grid(layer: QuantizedLayer, x: torch.Tensor) -> torch.Tensor:
    return layer.round_input(x)
