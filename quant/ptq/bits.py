"""How many bits each layer gets, within a budget or as asked, and how it is quantized otherwise."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from diffusion_accel.denoisers import KEYS_VALUES, QUERIES, concatenated_inputs, edge_layers
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.quant.affine import codes_of, values_of, weight_grid
from diffusion_accel.quant.low_rank import largest, rank_within
from diffusion_accel.quant.model import candidates
from diffusion_accel.quant.packing import packed_bytes
from diffusion_accel.quant.spec import LayerSpec

from .finetune import matching
from .sizes import parameters, stored_bytes

if TYPE_CHECKING:
    from .settings import QuantizeSettings

PROBE_BITS = 4  # at which sensitivity is measured
CHOICES = (2, 3, 4, 5, 6, 8)  # bits that an allocation chooses from
ROTATION = 32  # channels that are mixed with each other, as many as share a grid of four-bit inputs
_ZERO_MARGIN = 8  # one bit more for each zero point of 4 bits


def layer_specs(
    denoiser: nn.Module,
    settings: QuantizeSettings,
    needs: Mapping[str, float],
    timesteps: tuple[float, ...] = (),
    scores: Mapping[str, float] | None = None,
) -> dict[str, LayerSpec]:
    """How each layer of a model is quantized, by name.

    Args:
        denoiser: the model.
        settings: what is asked for.
        needs: the sensitivity of each layer; may be empty where nothing is allocated by it.
        timesteps: those with grids of their own, for `size_ratio`.
        scores: of each layer, for the allocations by ranks.

    Raises:
        ConfigurationError: the budget of bits is below what the fewest bits take.
    """
    s = settings
    if s.bits_budget is None and s.size_ratio is None:
        edges = edge_layers(denoiser)
        grid = Grid(s.weight_bits, s.group_sizes[0])
        edge = Grid(s.edge_bits, s.group_sizes[0])
        return specs_of(denoiser, s, {n: edge if n in edges else grid for n in candidates(denoiser)}, needs)
    allocator = Allocator(denoiser, s, needs, timesteps, scores)
    if s.size_ratio is not None:
        return allocator.within_ratio(s.size_ratio)
    assert s.bits_budget is not None
    return allocator.within_bits(s.bits_budget)


def specs_of(
    denoiser: nn.Module, settings: QuantizeSettings, grids: Mapping[str, Grid], needs: Mapping[str, float]
) -> dict[str, LayerSpec]:
    """How each layer is quantized whose weights have these grids."""
    s, layers = settings, candidates(denoiser)
    edges = edge_layers(denoiser)
    split = concatenated_inputs(denoiser) if s.split else {}
    queries = matching(layers, (QUERIES, KEYS_VALUES)) if s.activation_bits and s.attention_bits else []
    specs = {}
    for name, layer in layers.items():
        inputs = s.activation_bits if name not in edges else max(s.edge_bits, s.activation_bits or 0)
        by_channel = s.by_channel and name not in edges
        spec = LayerSpec(
            weight_bits=grids[name].bits,
            weight_group=grids[name].group,
            rank=0 if name in edges else rank_within(s.rank, _weight(layer).shape),
            activation_bits=inputs if s.activation_bits else None,
            dynamic=s.inputs == "dynamic",
            per_channel=by_channel,
            compact_grids=by_channel and s.activation_bits is not None,
            zero_margin=_ZERO_MARGIN if by_channel and s.activation_bits else 0,
            split=split.get(name, 0),
            output_bits=s.attention_bits if name in queries else None,
            sensitivity=float(f"{needs[name]:.4g}") if name in needs else None,
        )
        if s.rotate and name not in edges:
            spec = replace(spec, rotate=rotation_within(spec.part_sizes(_weight(layer).shape[1])))
        whole = s.input_groups and not any(n % s.input_groups for n in spec.part_sizes(_weight(layer).shape[1]))
        specs[name] = replace(spec, input_group=s.input_groups) if whole and name not in edges else spec
    return specs


def rotation_within(sizes: Iterable[int]) -> int:
    """The largest power of two, at most `ROTATION`, that divides all of these numbers of channels; 0 instead of 1."""
    block = math.gcd(ROTATION, *sizes)
    return block if block > 1 else 0


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


class Allocator:
    """Spreads bits over the layers of a model, by how much each is needed.

    Args:
        denoiser: the model, in full precision.
        settings: bits of the edges, groups, and how inputs are quantized.
        needs: the sensitivity of each layer; may be empty for the allocations by ranks.
        timesteps: those with grids of their own.
        scores: of each layer, what the allocations by ranks order layers by; None: allocate by sensitivity.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        settings: QuantizeSettings,
        needs: Mapping[str, float],
        timesteps: tuple[float, ...] = (),
        scores: Mapping[str, float] | None = None,
    ) -> None:
        self.denoiser, self.settings, self.needs, self.timesteps = denoiser, settings, needs, timesteps
        self.scores = scores
        self.weights = {name: _weight(layer) for name, layer in candidates(denoiser).items()}
        edges = edge_layers(denoiser)
        edge = Grid(settings.edge_bits, settings.group_sizes[0])
        grids = [Grid(bits, group) for group in settings.group_sizes for bits in CHOICES]
        self.grids = {name: [edge] if name in edges else grids for name in self.weights}

    @functools.cached_property
    def options(self) -> dict[str, list[Option]]:
        """What each layer can be, with the error of the prediction that it would bring."""
        found: dict[str, list[Option]] = {}
        for name, grids in self.grids.items():
            weight, probe = self.weights[name], Grid(PROBE_BITS)
            if len(grids) == 1:
                found[name] = [Option(grids[0], grids[0].cost(weight), 0.0)]
                continue
            rank = rank_within(self.settings.rank, weight.shape)
            rest = weight - largest(weight, rank) if rank else weight
            errors = rounding_errors(rest, dict.fromkeys(grids))
            scale = self.needs[name] / max(rounding_errors(weight, [probe])[probe], 1e-30)
            found[name] = [Option(grid, grid.cost(weight), scale * errors[grid]) for grid in grids]
        return found

    def costs(self, most: bool = False) -> dict[str, Grid]:
        """The cheapest grid of each layer, or the most expensive one."""
        pick = max if most else min
        return {name: pick(grids, key=lambda g: g.cost(self.weights[name])) for name, grids in self.grids.items()}

    def check_bits(self, bits: float) -> None:
        """Raise `ConfigurationError` if `bits` a weight are fewer than the cheapest grids take on average."""
        total = sum(weight.numel() for weight in self.weights.values())
        codes = sum(grid.cost(self.weights[name]) for name, grid in self.costs().items())
        least = (codes + self.branches()) / total
        if least > bits:
            raise ConfigurationError(
                f"bits_budget {bits:g} is not enough: the fewest bits take {least:.2f} a weight on average"
            )

    def check_ratio(self, ratio: float) -> None:
        """Raise `ConfigurationError` if the smallest checkpoint is larger than `ratio` of float32."""
        if (least := self.ratio(self.specs(self.costs()))) > ratio:
            raise ConfigurationError(
                f"size_ratio {ratio:g} is not enough: the smallest checkpoint takes {math.ceil(least * 1e4) / 1e4:g} "
                "of float32"
            )

    def within_bits(self, bits: float) -> dict[str, LayerSpec]:
        """The allocation of at most `bits` a weight on average, with their grids. Raises as `check_bits`."""
        self.check_bits(bits)
        total = sum(weight.numel() for weight in self.weights.values())
        return self.specs(self._allocate(bits * total - self.branches()))

    def branches(self) -> int:
        """Bits that the branches of low rank take."""
        ranks = {name: spec.rank for name, spec in self.specs(self.costs()).items()}
        return sum(16 * ranks[name] * (len(w) + w[0].numel()) for name, w in self.weights.items())

    def within_ratio(self, ratio: float) -> dict[str, LayerSpec]:
        """The allocation whose checkpoint is at most `ratio` of float32. Raises as `check_ratio`."""
        self.check_ratio(ratio)
        spent = sum(grid.cost(self.weights[name]) for name, grid in self.costs().items())
        specs = self.specs(self.costs())
        left = ratio - self.ratio(specs)
        while True:  # what the header of the file takes is known once the grids are
            found = self.specs(self._allocate(spent + left * 32 * parameters(self.denoiser)))
            over = self.ratio(found) - ratio
            if over <= 0 or left <= 0:
                return found if over <= 0 else specs
            left -= over

    def specs(self, grids: Mapping[str, Grid]) -> dict[str, LayerSpec]:
        """How the layers are quantized whose weights have these grids."""
        return specs_of(self.denoiser, self.settings, grids, self.needs)

    def ratio(self, specs: Mapping[str, LayerSpec]) -> float:
        """Size of a checkpoint with these layers, as a share of float32."""
        softmax = self.settings.softmax_bits is not None and self.settings.activation_bits is not None
        return stored_bytes(self.denoiser, specs, self.timesteps, softmax) / (4 * parameters(self.denoiser))

    def _allocate(self, budget: float) -> dict[str, Grid]:
        if self.scores is None:
            return allocate(self.options, budget)
        costs = {name: {grid: grid.cost(self.weights[name]) for grid in grids} for name, grids in self.grids.items()}
        return allocate_by_rank(costs, self.scores, budget)


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


def allocate_by_rank(
    costs: Mapping[str, Mapping[Grid, int]], scores: Mapping[str, float], budget: float
) -> dict[str, Grid]:
    """Two widths: the largest that all layers can have within `budget` bits, and the next larger one for the layers
    with the highest scores, as many of them as fit. Layers with one grid to choose from keep it.

    Source: Dumitru et al., "Layer-Wise Quantization" (2024), section 3.
    """
    levels = sorted({grid for grids in costs.values() if len(grids) > 1 for grid in grids})
    at = {
        name: dict.fromkeys(levels, next(iter(g))) if len(g) == 1 else {x: x for x in levels}
        for name, g in costs.items()
    }
    totals = [sum(costs[name][at[name][level]] for name in costs) for level in levels]
    low = max((i for i, total in enumerate(totals) if total <= budget), default=0)
    taken, spent = {name: at[name][levels[low]] for name in costs}, totals[low]
    for name in sorted(costs, key=lambda name: -scores[name]):
        higher = at[name][levels[min(low + 1, len(levels) - 1)]]
        more = costs[name][higher] - costs[name][taken[name]]
        if spent + more > budget:
            break
        taken[name], spent = higher, spent + more
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
