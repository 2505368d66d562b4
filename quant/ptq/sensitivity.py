"""Which layers suffer most from few bits, and how many bits each should get."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from diffusion_accel.errors import ConfigurationError
from diffusion_accel.quant.affine import fake_quantize, search_grid

from .calibration import Rows
from .finetune import relative_error
from .trainable_layer import Draft, rounding

PROBE_BITS = 4  # at which sensitivity is measured
CHOICES = (2, 3, 4, 5, 6, 8)  # bits that an allocation chooses from


def sensitivity(model: nn.Module, draft: Draft, rows: list[Rows]) -> float:
    """The relative squared error of the model's output when the weights of `draft` alone are rounded (to nearest)."""
    rounding({"": draft}, True, False)
    error = relative_error(model, rows)
    rounding({"": draft}, False, False)
    return error


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
            f"--bits-budget {budget:g} is not enough: the fewest bits take {spent / total:.2f} a weight on average"
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
