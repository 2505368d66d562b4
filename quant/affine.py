"""Affine quantization: integer codes on a grid of scale and zero point, and how the range of a grid is chosen.

A value x has the code clamp(round(x / scale) + zero_point, 0, 2^bits - 1) and is read back as
(code - zero_point) * scale. Zero is a grid point unless a margin says otherwise, so padding and ReLU-like zeros stay
exact.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .packing import pack
from .spec import PERCENTILES, LayerSpec

SEARCH_NORM = 2.4  # of the error that the range search minimises (QuEST's code, as Q-Diffusion's)
SEARCH_CANDIDATES = 80  # shrunk ranges that it tries, each 1% of the widest smaller
_SAMPLE = 1 << 20  # values of which percentiles and their errors are taken; of more, evenly spaced ones


def top(bits: int) -> int:
    """The largest code."""
    return (1 << bits) - 1


def grid(
    low: torch.Tensor, high: torch.Tensor, bits: int, symmetric: bool = False, margin: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of the grid with 2^bits levels over [low, high].

    Asymmetric: scale = (high - low) / (2^bits - 1), zero_point = round(-low / scale). Symmetric: scale =
    max(|low|, |high|) / (2^(bits-1) - 1), zero_point = 2^(bits-1). Both are float32 (zero points are whole numbers); an
    empty range gets scale 1.

    Args:
        margin: how many codes the zero point may lie outside 0 ... 2^bits - 1. A range that does not hold zero is
            widened towards it as far as that needs: with 0 until it holds zero, which is then a grid point.
    """
    low, high = low.float(), high.float()
    far = torch.maximum(-low, high)
    if symmetric:
        scale = far.clamp(min=0) / ((1 << (bits - 1)) - 1 or 1)
        zero = torch.full_like(scale, 1 << (bits - 1))
    else:
        scale = torch.maximum((high - low) / top(bits), far / (top(bits) + margin))
        zero = -low
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, zero if symmetric else (zero / scale).round().clamp(-margin, top(bits) + margin)


def dynamic_grid(x: torch.Tensor, spec: LayerSpec, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of a dynamic input, from minimum to maximum, shaped to broadcast over it.

    Args:
        x: the input, (..., C) of a linear layer or (N, C, H, W) of a convolution.
        spec: how it is quantized: bits, parts, groups.
        dim: of the channels, -1 or 1.
    """
    assert spec.activation_bits is not None
    dim %= x.dim()
    found = []
    for part in x.detach().float().split(spec.part_sizes(x.shape[dim]), dim):
        if spec.input_group:
            groups = part.unflatten(dim, (-1, spec.input_group))
            ends = groups.amin(dim + 1, keepdim=True), groups.amax(dim + 1, keepdim=True)
            pair = grid(*ends, spec.activation_bits)
            found.append([g.expand_as(groups).flatten(dim, dim + 1) for g in pair])
            continue
        over = (dim,) if dim == x.dim() - 1 else tuple(range(1, x.dim()))
        ends = part.amin(over, keepdim=True), part.amax(over, keepdim=True)
        whole = [-1] * x.dim()
        whole[dim] = part.shape[dim] if spec.split else -1
        found.append([g.expand(whole) for g in grid(*ends, spec.activation_bits)])
    scale, zero = zip(*found, strict=True)
    return (scale[0], zero[0]) if len(found) == 1 else (torch.cat(scale, dim), torch.cat(zero, dim))


def in_groups_of(values: torch.Tensor, group: int) -> torch.Tensor:
    """Rows (O, N) as (O, G, group), the last group filled up with zeros."""
    return torch.nn.functional.pad(values, (0, -values.shape[1] % group)).unflatten(1, (-1, group))


def half_scale(scale: torch.Tensor) -> torch.Tensor:
    """Scales as float16, to the nearest; what it cannot hold becomes its smallest normal number (6.1e-5) or its largest
    (65504).

    Subnormal numbers are not used: they have fewer digits, and some devices take them for zero.
    """
    limits = torch.finfo(torch.float16)
    return scale.clamp(limits.smallest_normal, limits.max).half()


def quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes of `x`, as whole float32 numbers in 0 … 2^bits - 1; scale and zero point broadcast."""
    return (x / scale).round_().add_(zero_point).clamp_(0, top(bits))


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """The values of codes."""
    return (codes - zero_point) * scale


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, bits: int) -> torch.Tensor:
    """`x` rounded to the grid, in its own dtype; no gradient flows (see `finetune` for that)."""
    return dequantize(quantize(x.float(), scale, zero_point, bits), scale, zero_point).to(x.dtype)


def _power(error: torch.Tensor, norm: float) -> torch.Tensor:
    return error.square_() if norm == 2 else error.abs_().pow_(norm)


def search_grid(
    rows: torch.Tensor, bits: int, symmetric: bool = False, norm: float = SEARCH_NORM, shrink: Iterable[float] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """The grid of every row of `rows` (R, N) whose rounding error is least: scale and zero point, (R, 1) each.

    Tries the range of the row shrunk to 1, 0.99, 0.98 … of itself (or by the factors `shrink`) and takes the least
    sum of
    |error|^norm, so it is never worse than the whole range in that norm.

    Source: range initialisation of Q-Diffusion and QuEST, 80 candidates, norm 2.4.
    """
    rows = rows.float()
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    best = scale = zero = None
    for factor in shrink or (1 - 0.01 * j for j in range(SEARCH_CANDIDATES)):
        tried = grid(low * factor, high * factor, bits, symmetric)
        error = _power(fake_quantize(rows, *tried, bits) - rows, norm).sum(1, keepdim=True)
        if best is None or scale is None or zero is None:
            best, (scale, zero) = error, tried
            continue
        better = error < best
        best = torch.where(better, error, best)
        scale, zero = torch.where(better, tried[0], scale), torch.where(better, tried[1], zero)
    assert scale is not None and zero is not None
    return scale, zero


def weight_grid(
    weight: torch.Tensor, spec: LayerSpec, shrink: Iterable[float] = (), norm: float = SEARCH_NORM
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of a weight (O, I, …) by range search, (parts or groups, O), as they are stored.

    Rows of 8 bits are symmetric, so that they fit signed bytes; groups, which no integer product can take, are not.
    """
    bits, group = spec.weight_bits, spec.weight_group
    if group:
        groups = in_groups_of(weight.flatten(1).float(), group)
        scale, zero = search_grid(groups.flatten(0, 1), bits, norm=norm, shrink=shrink)
        scale, zero = (g.view(groups.shape[:2]).T.contiguous() for g in (scale, zero))
        return half_scale(scale).float(), zero
    parts = [part.flatten(1) for part in weight.split(spec.part_sizes(weight.shape[1]), 1)]
    found = [search_grid(part, bits, symmetric=bits == 8, norm=norm, shrink=shrink) for part in parts]
    return torch.stack([scale[:, 0] for scale, _ in found]), torch.stack([zero[:, 0] for _, zero in found])


def codes_of(rows: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
    """The codes of rows (O, N) to nearest, as whole float32 numbers, on the grids of `weight_grid` without parts."""
    if not spec.weight_group:
        return quantize(rows.float(), scale[0, :, None], zero_point[0, :, None], spec.weight_bits)
    groups = in_groups_of(rows.float(), spec.weight_group)
    codes = quantize(groups, scale.T[..., None], zero_point.T[..., None], spec.weight_bits)
    return codes.flatten(1)[:, : rows.shape[1]]


def values_of(codes: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
    """The inverse of `codes_of`, but for the rounding."""
    if not spec.weight_group:
        return dequantize(codes, scale[0, :, None], zero_point[0, :, None])
    groups = in_groups_of(codes, spec.weight_group)
    return dequantize(groups, scale.T[..., None], zero_point.T[..., None]).flatten(1)[:, : codes.shape[1]]


def stored_grid(scale: torch.Tensor, zero_point: torch.Tensor, spec: LayerSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of weights, (parts or groups, O), as a checkpoint has them."""
    if not spec.weight_group:
        return scale, zero_point.to(torch.uint8)
    return half_scale(scale), pack(zero_point.T, spec.weight_bits)


def value_range(
    values: torch.Tensor, bits: int, percentiles: Iterable[float] = PERCENTILES, margin: int = 0
) -> torch.Tensor:
    """Low and high end (R, 2) of a grid for each row of `values` (R, N): the percentile with the least squared error.

    Percentile p stands for the range between the (100 - p)-th and the p-th percentile of the row; 100 is its minimum
    and maximum. `margin`: of the grids, see `grid`.
    """
    values = values.float()
    if values.shape[1] > _SAMPLE:
        values = values[:, :: values.shape[1] // _SAMPLE]
    ordered = values.sort(1).values
    last = ordered.shape[1] - 1
    best = found = None
    for percentile in percentiles:
        place = min(last, round(percentile / 100 * last))
        ends = torch.stack([ordered[:, last - place], ordered[:, place]], 1)
        tried = grid(ends[:, :1], ends[:, 1:], bits, margin=margin)
        error = (fake_quantize(values, *tried, bits) - values).square_().sum(1, keepdim=True)
        if best is None or found is None:
            best, found = error, ends
            continue
        better = error < best
        best, found = torch.where(better, error, best), torch.where(better, ends, found)
    assert found is not None
    return found
