"""How many bits each layer gets, within a budget or as asked, and how it is quantized otherwise."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from diffusion_accel.denoisers import KEYS_VALUES, QUERIES, concatenated_inputs, edge_layers
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.quant.affine import codes_of, values_of, weight_grid
from diffusion_accel.quant.model import candidates
from diffusion_accel.quant.packing import packed_bytes
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
    grids = {name: Grid(s.edge_bits if name in edges else s.weight_bits, s.groups[0]) for name in layers}
    if s.bits_budget is not None:
        grids = allocate_bits(denoiser, s, needs, choices(s))
    queries = matching(layers, (QUERIES, KEYS_VALUES)) if s.activation_bits and s.attention_bits else []
    specs = {}
    for name, layer in layers.items():
        inputs = s.activation_bits if name not in edges else max(s.edge_bits, s.activation_bits or 0)
        by_channel = s.by_channel and name not in edges
        spec = LayerSpec(
            weight_bits=grids[name].bits,
            weight_group=grids[name].group,
            activation_bits=inputs if s.activation_bits else None,
            dynamic=s.inputs == "dynamic",
            per_channel=by_channel,
            compact_grids=by_channel and s.activation_bits is not None,
            zero_margin=_ZERO_MARGIN if by_channel and s.activation_bits else 0,
            split=split.get(name, 0),
            output_bits=s.attention_bits if name in queries else None,
            sensitivity=float(f"{needs[name]:.4g}") if name in needs else None,
        )
        whole = s.input_groups and not any(n % s.input_groups for n in spec.part_sizes(_weight(layer).shape[1]))
        specs[name] = replace(spec, input_group=s.input_groups) if whole and name not in edges else spec
    return specs


class Grid(NamedTuple):
    """Bits of a weight, and how many share a grid (0: a row)."""

    bits: int
    group: int = 0

    def cost(self, weight: torch.Tensor) -> int:
        """Bits that a weight (O, …) takes with it: codes, scales and zero points."""
        rows, columns = len(weight), weight[0].numel()
        if not self.group:
            return rows * (8 * packed_bytes(columns, self.bits) + 40)
        grids = -(-columns // self.group)
        return rows * 8 * (packed_bytes(columns, self.bits) + packed_bytes(grids, self.bits) + 2 * grids)


def choices(settings: QuantizeSettings) -> list[Grid]:
    """The grids that an allocation chooses from."""
    return [Grid(bits, group) for group in settings.groups for bits in CHOICES]


def allocate_bits(
    denoiser: nn.Module, settings: QuantizeSettings, needs: Mapping[str, float], grids: Sequence[Grid]
) -> dict[str, Grid]:
    """The grid of each layer of a model within the settings' budget, by how much it is needed; see `allocate`."""
    assert settings.bits_budget is not None
    weights = {name: _weight(layer) for name, layer in candidates(denoiser).items()}
    edges = {name: Grid(settings.edge_bits, settings.groups[0]) for name in edge_layers(denoiser) if name in weights}
    options: dict[str, list[Option]] = {}
    for name, weight in weights.items():
        if name in edges:
            options[name] = [Option(edges[name], edges[name].cost(weight), 0.0)]
            continue
        probe = Grid(PROBE_BITS)
        errors = rounding_errors(weight, [probe, *grids]) if len(grids) > 1 else dict.fromkeys([probe, *grids], 1.0)
        scale = needs[name] / max(errors[probe], 1e-30)
        options[name] = [Option(grid, grid.cost(weight), scale * errors[grid]) for grid in grids]
    total = sum(weight.numel() for weight in weights.values())
    try:
        return allocate(options, settings.bits_budget * total)
    except ConfigurationError as error:
        least = sum(min(o.cost for o in each) for each in options.values()) / total
        raise ConfigurationError(
            f"bits_budget {settings.bits_budget:g} is not enough: the fewest bits take {least:.2f} a weight on average"
        ) from error


@torch.no_grad()
def rounding_errors(weight: torch.Tensor, grids: Iterable[Grid]) -> dict[Grid, float]:
    """Mean squared rounding error of a weight (O, I, …) on each of some grids."""
    shrink = tuple(1 - 0.05 * j for j in range(8))  # a coarse search is enough to compare
    rows = weight.detach().float().flatten(1)
    found = {}
    for grid in grids:
        spec = LayerSpec(grid.bits, grid.group)
        found_grid = weight_grid(rows, spec, shrink)
        error = values_of(codes_of(rows, *found_grid, spec), *found_grid, spec) - rows
        found[grid] = float(error.square().mean())
    return found


class Option(NamedTuple):
    """One way to quantize a layer: what it is, the bits it takes, and the error of the model's output with it."""

    grid: Grid
    cost: int
    error: float


def allocate(options: Mapping[str, Sequence[Option]], budget: float) -> dict[str, Grid]:
    """The option of each layer that together cost at most `budget` bits, with the least sum of errors.

    Every layer begins with the cheapest one; again and again the step that removes most error a bit is taken, along the
    lower convex hull of each layer's errors. That is the best allocation up to one step of one layer.

    Raises:
        ConfigurationError: the cheapest options cost more.
    """
    steps: list[tuple[float, int, str, int, Option]] = []
    taken, places = {}, dict.fromkeys(options, 0)
    for name, each in options.items():
        hull = _hull(sorted(each, key=lambda option: (option.cost, option.error)))
        taken[name] = hull[0].grid
        for place, (low, high) in enumerate(itertools.pairwise(hull)):
            cost = high.cost - low.cost
            steps.append(((low.error - high.error) / cost, cost, name, place, high))
    spent = sum(min(option.cost for option in each) for each in options.values())
    if spent > budget:
        raise ConfigurationError(f"the budget of {budget:.0f} bits is below the {spent} that the cheapest options cost")
    for _, cost, name, place, option in sorted(steps, key=lambda step: -step[0]):
        if places[name] == place and spent + cost <= budget:
            places[name], taken[name] = place + 1, option.grid
            spent += cost
    return taken


def _hull(options: list[Option]) -> list[Option]:
    """The lower convex hull of errors by cost, decreasing."""
    hull: list[Option] = []
    for option in options:
        _, x, y = option
        if hull and y >= hull[-1].error:
            continue
        while len(hull) > 1:
            (_, x0, y0), (_, x1, y1) = hull[-2], hull[-1]
            if (y1 - y0) * (x - x0) >= (y - y0) * (x1 - x0):
                hull.pop()
            else:
                break
        hull.append(option)
    return hull


def _weight(layer: nn.Module) -> torch.Tensor:
    return layer.weight  # type: ignore[return-value]
