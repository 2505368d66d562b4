"""Orders of layers that need no measured error, to compare allocations with.

Source: Dumitru et al., "Layer-Wise Quantization: A Pragmatic and Effective Method for Quantizing LLMs Beyond Integer
Bit-Levels" (2024), section 2.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from diffusion_accel.hooks import tensors_in
from diffusion_accel.quant.model import candidates

from .calibration import Rows


@torch.no_grad()
def layer_input_modification(model: nn.Module, parts: Iterable[Rows]) -> dict[str, float]:
    """LIM of each layer that can be quantized, -1 … 1: the negative cosine similarity between input and output, the
    mean over calls. The higher, the more a layer changes, and the more bits it is given.

    It is of the layer itself where input and output have one shape, else of the nearest module around it whose
    input and output have one (its block); where there is none but the model, the median of the others.
    """
    seen: dict[str, list[float]] = {}

    def note(name: str) -> Callable[..., None]:
        def look(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            given, found = tensors_in(args)[:1], tensors_in(output)[:1]
            if given and found and given[0].shape == found[0].shape and given[0].is_floating_point():
                before, after = (t.flatten(1).float() for t in (given[0], found[0]))
                similar = nn.functional.cosine_similarity(before, after, dim=1)
                seen.setdefault(name, []).append(-float(similar.mean()))

        return look

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    try:
        for rows in parts:
            rows.run(model)
    finally:
        for handle in handles:
            handle.remove()
    means = {name: statistics.fmean(values) for name, values in seen.items()}
    found = {layer: _nearest(layer, means) for layer in candidates(model)}
    middle = statistics.median([score for score in found.values() if score is not None] or [0.0])
    return {layer: middle if score is None else score for layer, score in found.items()}


def _nearest(layer: str, means: dict[str, float]) -> float | None:
    while layer:
        if layer in means:
            return means[layer]
        layer = layer.rpartition(".")[0]
    return None


def z_score_shares(model: nn.Module) -> dict[str, float]:
    """ZD of each layer that can be quantized, 0 … 1: the share of its weights that lie more than a standard deviation
    above their mean. The higher, the more bits a layer is given."""
    found = {}
    for name, layer in candidates(model).items():
        weight: torch.Tensor = layer.weight.detach().float()  # type: ignore[assignment,operator,union-attr]
        found[name] = float((weight > weight.mean() + weight.std()).float().mean())
    return found
