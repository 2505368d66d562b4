"""A branch of low rank beside the codes of a layer: weight = grid(weight - left · right) + left · right.

Source: Li et al., "SVDQuant" (arXiv 2411.05007), which takes the largest singular values out of the weights; how the
two parts are found in turns is that of "LoftQ" (Li et al., arXiv 2310.08659).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .affine import codes_of, values_of, weight_grid
from .rotation import rotated
from .spec import LayerSpec

ROUNDS = 5  # of finding the branch and the codes in turns
_OVERSAMPLING, _ITERATIONS = 12, 4  # of the randomized decomposition
_SHRINK = tuple(1 - 0.04 * j for j in range(10))  # of ranges that are tried meanwhile


def rank_within(rank: int, shape: torch.Size) -> int:
    """The rank of a layer's branch: the one asked for, but at most half of what the weight (O, I, …) can have."""
    return min(rank, min(shape[0], shape[1:].numel()) // 2)


@torch.no_grad()
def low_rank(weight: torch.Tensor, spec: LayerSpec, rounds: int = ROUNDS) -> tuple[torch.Tensor, torch.Tensor]:
    """The branch of a weight (O, I, …): left (O, rank) and right (rank, N), float32 numbers that float16 holds.

    It begins with the largest singular values of the weight, so that what is left to the grids is small and so is what
    rounded inputs do to it. Then in turns: round what the branch leaves, find the branch of what the codes leave. The
    round with the least squared error is kept. Where inputs are rotated, all that is done to rotated weights; the
    branch is of the weights as they were.
    """
    shape = weight.shape
    rows = rotated(weight.detach().float(), 1, spec.rotate).flatten(1)
    rest, best = rows, None
    for _ in range(rounds):
        left, right = _decompose(rest, spec.rank)
        outer = rotated(right.view(-1, *shape[1:]), 1, spec.rotate).half().float()
        right = rotated(outer, 1, spec.rotate).flatten(1)
        base = rows - left @ right
        rounded = _rounded(base.view(shape), spec).flatten(1)
        error = float((rounded - base).square().sum())
        if best is None or error < best[0]:
            best = error, left, outer.flatten(1)
        rest = rows - rounded
    assert best is not None
    return best[1], best[2]


@torch.no_grad()
def largest(weight: torch.Tensor, rank: int) -> torch.Tensor:
    """The part of a weight (O, I, …) with its largest singular values: where `low_rank` begins."""
    left, right = _decompose(weight.detach().float().flatten(1), rank)
    return (left @ right).view_as(weight)


def _rounded(weight: torch.Tensor, spec: LayerSpec) -> torch.Tensor:
    """A weight to nearest on its grids."""
    plain, found = replace(spec, split=0), []
    for part in [weight] if spec.weight_group else weight.split(spec.part_sizes(weight.shape[1]), 1):
        rows = part.flatten(1)
        grid = weight_grid(rows, plain, _SHRINK, norm=2.0)
        found.append(values_of(codes_of(rows, *grid, plain), *grid, plain).view_as(part))
    return torch.cat(found, 1)


def _decompose(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The two factors of the best approximation of this rank, each with the roots of the singular values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix, min(rank + _OVERSAMPLING, *matrix.shape), _ITERATIONS)
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).half().float(), root[:, None] * v.T[:rank]
