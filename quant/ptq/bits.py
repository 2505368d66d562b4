"""How many bits each layer gets, within a budget or as asked, and how it is quantized otherwise."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from diffusion_accel.denoisers import KEYS_VALUES, QUERIES, concatenated_inputs, edge_layers
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.quant.affine import fake_quantize, search_grid
from diffusion_accel.quant.model import candidates
from diffusion_accel.quant.spec import LayerSpec

from .finetune import matching

if TYPE_CHECKING:
    from .settings import QuantizeSettings

PROBE_BITS = 4  # at which sensitivity is measured
CHOICES = (2, 3, 4, 5, 6, 8)  # bits that an allocation chooses from
_ZERO_MARGIN = 8  # one bit more for each zero point of 4 bits


def layer_specs(denoiser: nn.Module, settings: QuantizeSettings, needs: Mapping[str, float]) -> dict[str, LayerSpec]:
    """How each layer of a model is quantized, by name.

    Args:
        denoiser: the model.
        settings: what is asked for.
        needs: the sensitivity of each layer; may be empty without a budget of bits.

    Raises:
        ConfigurationError: the budget of bits is below what the fewest bits take.
    """
    s, layers = settings, candidates(denoiser)
    edges = edge_layers(denoiser)
    split = concatenated_inputs(denoiser) if s.split else {}
    bits = {name: s.edge_bits if name in edges else s.weight_bits for name in layers}
    if s.bits_budget is not None:
        bits = allocate_bits(denoiser, s, needs, CHOICES)
    queries = matching(layers, (QUERIES, KEYS_VALUES)) if s.activation_bits and s.attention_bits else []
    specs = {}
    for name in layers:
        inputs = s.activation_bits if name not in edges else max(s.edge_bits, s.activation_bits or 0)
        by_channel = s.by_channel and name not in edges
        specs[name] = LayerSpec(
            weight_bits=bits[name],
            activation_bits=inputs if s.activation_bits else None,
            per_channel=by_channel,
            compact_grids=by_channel and s.activation_bits is not None,
            zero_margin=_ZERO_MARGIN if by_channel and s.activation_bits else 0,
            split=split.get(name, 0),
            output_bits=s.attention_bits if name in queries else None,
            sensitivity=float(f"{needs[name]:.4g}") if name in needs else None,
        )
    return specs


def allocate_bits(
    denoiser: nn.Module, settings: QuantizeSettings, needs: Mapping[str, float], choices: tuple[int, ...]
) -> dict[str, int]:
    """Bits of each layer of a model within the settings' budget, by how much they are needed; see `allocate`."""
    assert settings.bits_budget is not None
    weights = {name: _weight(layer) for name, layer in candidates(denoiser).items()}
    errors = {}
    for name, weight in weights.items():
        table = rounding_errors(weight, choices) if len(choices) > 2 else dict.fromkeys(choices, 1.0)
        errors[name] = {b: needs[name] * e / max(table[PROBE_BITS], 1e-30) for b, e in table.items()}
    fixed = {n: settings.edge_bits for n in edge_layers(denoiser) if n in weights}
    return allocate(errors, {n: weight.numel() for n, weight in weights.items()}, settings.bits_budget, fixed)


@torch.no_grad()
def rounding_errors(weight: torch.Tensor, choices: Iterable[int] = CHOICES) -> dict[int, float]:
    """Mean squared rounding error of a weight for each number of bits, one grid an output channel."""
    rows = weight.detach().flatten(1)
    shrink = tuple(1 - 0.05 * j for j in range(8))  # a coarse search is enough to compare
    found = {}
    for bits in choices:
        scale, zero = search_grid(rows, bits, symmetric=bits == 8, shrink=shrink)
        found[bits] = float((fake_quantize(rows, scale, zero, bits) - rows.float()).square().mean())
    return found


def allocate(
    errors: Mapping[str, Mapping[int, float]],
    sizes: Mapping[str, int],
    budget: float,
    fixed: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Bits of each layer that keep the average a weight within `budget` with the least sum of errors.

    Every layer begins with the fewest bits; again and again the step up that removes most error a bit is taken,
    along the lower convex hull of each layer's errors. That is the best allocation up to one step of one layer.

    Args:
        errors: for each layer the error of the model's output by number of bits.
        sizes: weights of each layer.
        budget: average bits a weight over all layers, `fixed` ones included.
        fixed: layers whose bits are decided already.

    Raises:
        ConfigurationError: the budget is below what the fewest bits take.
    """
    fixed = dict(fixed or {})
    total = sum(sizes.values())
    steps: list[tuple[float, int, str, int, int]] = []
    bits = dict(fixed)
    for name, table in errors.items():
        if name in fixed:
            continue
        hull = _hull(sorted(table.items()))
        bits[name] = hull[0][0]
        for (low, bad), (high, good) in itertools.pairwise(hull):
            cost = (high - low) * sizes[name]
            steps.append(((bad - good) / cost, cost, name, low, high))
    spent: float = sum(bits[n] * sizes[n] for n in sizes)
    if spent > budget * total:
        raise ConfigurationError(
            f"bits_budget {budget:g} is not enough: the fewest bits take {spent / total:.2f} a weight on average"
        )
    for _, cost, name, low, high in sorted(steps, key=lambda s: -s[0]):
        if bits[name] == low and spent + cost <= budget * total:
            bits[name] = high
            spent += cost
    return bits


def _hull(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """The lower convex hull of errors by bits, decreasing."""
    hull: list[tuple[int, float]] = []
    for x, y in points:
        if hull and y >= hull[-1][1]:
            continue
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2], hull[-1]
            if (y1 - y0) * (x - x0) >= (y - y0) * (x1 - x0):
                hull.pop()
            else:
                break
        hull.append((x, y))
    return hull


def _weight(layer: nn.Module) -> torch.Tensor:
    return layer.weight  # type: ignore[return-value]
