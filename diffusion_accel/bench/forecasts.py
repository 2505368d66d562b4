"""Other people's forecasts as pure functions: what the steps that were computed say about one that is not.

Each takes the numbers of the computed steps, oldest first, and the number of the step asked for. All but one are linear
in the values: they return a weight for each computed step, which `combined` applies. Dynamic mode decomposition needs
the values themselves. None of this is the project's own method; it is here to be compared with.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch

Steps = Sequence[int]


def combined(weights: Sequence[float], values: Sequence[torch.Tensor]) -> torch.Tensor:
    """The weighted sum of values of one shape, as the dtype of the newest (the last)."""
    newest = values[-1]
    total = torch.zeros_like(newest, dtype=torch.promote_types(newest.dtype, torch.float32))
    for weight, value in zip(weights, values, strict=True):
        if weight:
            total.add_(value.to(total.dtype), alpha=weight)
    return total.to(newest.dtype)


def differences(steps: Steps, order: int) -> list[list[float]]:
    """TaylorSeer's estimates of derivatives at the newest computed step, as weights (Liu et al., ICCV 2025, eq. 3).

    The i-th is the difference of the (i − 1)-th here and at the computed step before, divided by the steps between
    these two, whatever lies before them. Returns those of order 0 to `order`, or fewer where there are fewer steps.
    """
    last = len(steps) - 1
    rows = [[float(i == j) for i in range(len(steps))] for j in range(len(steps))]  # of order 0, at each computed step
    found = [rows[last]]
    for degree in range(1, min(order, last) + 1):
        rows = [
            [(a - b) / (steps[degree + j] - steps[degree + j - 1]) for a, b in zip(rows[j + 1], rows[j], strict=True)]
            for j in range(len(rows) - 1)
        ]
        found.append(rows[-1])
    return found


def hold(steps: Steps, _at: int) -> list[float]:
    """The newest value."""
    return [0.0] * (len(steps) - 1) + [1.0]


def taylor(steps: Steps, at: int, order: int = 1) -> list[float]:
    """TaylorSeer (Liu et al., ICCV 2025): Taylor's series with finite differences in the place of the derivatives.

    Of order 1 it is the straight line through two values. Of order 2 and above it is not the polynomial through the
    values: a backward difference is the derivative half a step before, and the published series takes it as it is.
    """
    ahead = at - steps[-1]
    terms = [ahead**i / math.factorial(i) for i in range(order + 1)]
    return _summed(terms, differences(steps, order))


def hermite(steps: Steps, at: int, order: int = 2, sigma: float = 0.5) -> list[float]:
    """HiCache (Feng et al. 2025, arXiv 2508.16984): the powers of Taylor's series become scaled Hermite polynomials.

    The i-th term has σ^i · H_i(σ · ahead), of the physicists' polynomials, which damps it for σ < 1 / √2.
    """
    ahead = at - steps[-1]
    terms, before, now = [1.0], 0.0, 1.0
    for i in range(1, order + 1):
        before, now = now, 2 * sigma * ahead * now - 2 * (i - 1) * before
        terms.append(sigma**i * now / math.factorial(i))
    return _summed(terms, differences(steps, order))


def foca(steps: Steps, at: int) -> list[float]:
    """FoCa (Zheng et al. 2025, arXiv 2508.16211): a predictor and a corrector, one step after the other.

    Each step goes on from the last two values, whether computed or forecast: twice the newest minus the one before (BDF
    2 in steps of one), and half of how much more the last two computed values differ, per step, than these two (Heun).
    Decided here: per step, as the paper's derivatives are; cache-dit's code leaves the division out, which is the same
    only where two neighbouring steps were computed last.
    """
    computed = {step: [float(i == j) for j in range(len(steps))] for i, step in enumerate(steps)}
    new, old, trend, last = computed[steps[0]], list[float](), list[float](), steps[0]
    for step in range(steps[0] + 1, at + 1):
        if step in computed:
            before = computed[last]
            trend = [(a - b) / (step - last) for a, b in zip(computed[step], before, strict=True)]
            new, old, last = computed[step], new, step
        elif old:
            new, old = [2 * a - b + 0.5 * (c - (a - b)) for a, b, c in zip(new, old, trend, strict=True)], new
    return new


def spectrum(steps: Steps, at: int, total: int, degree: int = 4, ridge: float = 0.1, mix: float = 0.5) -> list[float]:
    """Spectrum (Han et al., CVPR 2026, arXiv 2603.01623): Chebyshev polynomials fitted to all that was computed.

    Args:
        steps, at: as everywhere here.
        total: steps of the whole call, over which the polynomials reach.
        degree: of the polynomials.
        ridge: added to the diagonal of the normal equations.
        mix: the share of the fit; the rest is the straight line through the last two values.
    """
    places = 2 * np.asarray([*steps, at], dtype=np.float64) / total - 1
    basis = np.polynomial.chebyshev.chebvander(places, degree)
    design = basis[:-1]
    normal = design.T @ design + ridge * np.eye(degree + 1)
    fitted = basis[-1] @ np.linalg.solve(normal, design.T)
    return [mix * float(a) + (1 - mix) * b for a, b in zip(fitted, taylor(steps, at, 1), strict=True)]


def spectrum_schedule(total: int, window: float = 2.0, growth: float = 0.75, warmup: int = 5) -> frozenset[int]:
    """The steps that Spectrum computes: the first `warmup`, then one behind ever more that it forecasts.

    The whole part of `window` is the distance to the next computed step; it grows by `growth` at each. 14 of 50 steps.
    """
    found, held = set(range(min(warmup, total))), 0
    for step in range(warmup, total):
        held += 1
        if held % math.floor(window) == 0:
            found.add(step)
            window, held = window + growth, 0
    return frozenset(found | {0})


def dmd(steps: Steps, values: Sequence[torch.Tensor], at: int, snapshots: int = 6, least: int = 4) -> torch.Tensor:
    """Dynamic mode decomposition (Schmid 2010) as cache-dit forecasts with it: a sum of exponentials.

    A linear map that leads from each value to the next is found in the space that the values span, for every row of the
    batch by itself; its powers, also broken ones, go on from the newest value.

    Args:
        steps, at: as everywhere here.
        values: of the computed steps, (B, …).
        snapshots: how many of the newest values count, of those that are equally far apart.
        least: with fewer of these the straight line through the last two values stands in.

    Returns:
        The forecast; the newest value where the map has no finite powers.
    """
    tail = _uniform(steps, snapshots)
    if tail < least:
        return combined(taylor(steps, at, 1), values)
    ahead = (at - steps[-1]) / (steps[-1] - steps[-2])
    newest = values[-1]
    rows = torch.stack([value.flatten(1) for value in values[-tail:]], -1).double()  # (B, D, snapshots)
    found = torch.stack([_mode_powers(row, ahead) for row in rows]).to(newest.dtype).view_as(newest)
    return found if bool(found.isfinite().all()) else newest


def _mode_powers(series: torch.Tensor, ahead: float) -> torch.Tensor:
    """What follows `ahead` steps behind the last column of (D, n), whose columns follow one another linearly."""
    before, after = series[:, :-1], series[:, 1:]
    left, sizes, right = torch.linalg.svd(before, full_matrices=False)
    kept = sizes > sizes[0] * 1e-4
    if not bool(kept.any()):
        return series[:, -1]
    carried = after @ right[kept].T / sizes[kept]  # (D, rank)
    powers, vectors = torch.linalg.eig(left[:, kept].T @ carried)
    modes = carried.to(vectors.dtype) @ vectors
    amounts = torch.linalg.lstsq(modes, series[:, -1:].to(modes.dtype)).solution[:, 0]
    return (modes @ (powers**ahead * amounts)).real


def _uniform(steps: Steps, most: int) -> int:
    """How many of the newest steps, at most `most`, are equally far apart."""
    gaps = [b - a for a, b in itertools.pairwise(steps)][::-1]
    same = next((i for i, gap in enumerate(gaps) if gap != gaps[0]), len(gaps))
    return min(most, same + 1) if gaps else len(steps)


def _summed(terms: Sequence[float], rows: Sequence[Sequence[float]]) -> list[float]:
    """The sum of weights, each times its term; terms without weights are left out."""
    return [sum(t * w for t, w in zip(terms, column, strict=False)) for column in zip(*rows, strict=True)]
