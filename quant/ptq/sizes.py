"""How many bytes a checkpoint will take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from diffusion_accel.quant.attention import quantizable_attention
from diffusion_accel.quant.buckets import Buckets
from diffusion_accel.quant.layers import quantized_like
from diffusion_accel.quant.model import DTYPES, TABLE_BITS, tables
from diffusion_accel.quant.spec import LayerSpec
from diffusion_accel.quant.stored import TensorWriter


def parameters(model: nn.Module) -> int:
    """How many numbers a model has."""
    return sum(p.numel() for p in model.parameters())


def stored_bytes(
    model: nn.Module, specs: Mapping[str, LayerSpec], timesteps: tuple[float, ...], softmax: bool = False
) -> int:
    """Bytes of the weights' file of a checkpoint, header included.

    Args:
        model: in full precision.
        specs: of its layers, by name; embedding tables are counted as they are quantized.
        timesteps: those with grids of their own.
        softmax: whether attention probabilities are quantized.
    """
    modules = dict(model.named_modules())
    every = dict(specs) | dict.fromkeys(tables(model), LayerSpec(TABLE_BITS))
    buckets = Buckets(timesteps if softmax or any(s.has_tables for s in every.values()) else ())
    tensors = {n: (DTYPES[t.dtype], tuple(t.shape)) for n, t in model.state_dict().items()}
    for name, spec in every.items():
        del tensors[f"{name}.weight"]
        made = quantized_like(modules[name], spec, buckets)
        stored = ((n, t) for n, t in made.named_buffers() if n[0] != "_")
        tensors |= {f"{name}.{n}": (DTYPES[t.dtype], tuple(t.shape)) for n, t in stored}
    if softmax:
        attentions = (n for n, m in modules.items() if quantizable_attention(m))
        tensors |= {f"{name}.softmax_scale": ("F32", (len(timesteps), 1)) for name in attentions}
    writer = TensorWriter(Path(), tensors)
    return 8 + len(writer.header) + sum(size for _, size in writer.places.values())
