"""Denoising tasks in groups: contiguous intervals of timesteps found by dynamic programming (ANT).

Source: Go et al. 2023, "Addressing Negative Transfer in Diffusion Models", section 4.1. Against the published code the
bounds are those of the optimum (it reports them one step early) and intervals share no step and leave none out.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch

from .denoising import TIMESTEPS, Process
from .files import UsageError

Interval = tuple[int, int]  # first timestep, last timestep + 1


def timestep_distance(count: int = TIMESTEPS) -> np.ndarray:
    """|t - c|, float64 (count, count), row = centre c."""
    steps = np.arange(count, dtype=np.float64)
    return np.abs(steps[:, None] - steps[None])


def snr_distance(process: Process) -> np.ndarray:
    """|log SNR(t) - log SNR(c)|, float64 (1000, 1000). A flow's last step, whose SNR is 0, counts as its neighbour."""
    snr = process.snr().numpy()
    log = np.log(np.maximum(snr, snr[snr > 0].min()))
    return np.abs(log[:, None] - log[None])


def gradient_distance(affinity: np.ndarray) -> np.ndarray:
    """-TAS(c, t) for all timesteps from the task affinity score (mean cosine of gradients) on a grid (G, G)."""
    grid = np.arange(TIMESTEPS) * len(affinity) // TIMESTEPS
    return -np.asarray(affinity, np.float64)[np.ix_(grid, grid)]


def cluster(distance: np.ndarray, k: int) -> list[Interval]:
    """The k intervals [a, b) that partition 0 ... T-1 with the smallest sum of distances to their middle steps.

    The cost of [a, b) is the sum over its t of distance[c, t] with c = (a + b - 1) // 2. Exact, O(k T²).

    Raises:
        UsageError: k is not in 1 ... T.
    """
    count = len(distance)
    if not 1 <= k <= count:
        raise UsageError(f"the number of task clusters must be in 1..{count}, got {k}")
    prefix = np.zeros((count, count + 1))
    np.cumsum(distance, axis=1, out=prefix[:, 1:])

    def costs(end: int) -> np.ndarray:  # of [a, end) for a in 0 ... end-1
        starts = np.arange(end)
        centres = (starts + end - 1) // 2
        return prefix[centres, end] - prefix[centres, starts]

    best = np.full((k + 1, count + 1), np.inf)
    cut = np.zeros((k + 1, count + 1), int)
    best[0, 0] = 0
    for end in range(1, count + 1):
        total = best[:k, :end] + costs(end)  # (clusters before, start of the last one)
        cut[1:, end] = total.argmin(1)
        best[1:, end] = total.min(1)
    bounds = [count]
    for clusters in range(k, 0, -1):
        bounds.append(int(cut[clusters, bounds[-1]]))
    bounds.reverse()
    return list(itertools.pairwise(bounds))


def draw_clustered(rng: np.random.Generator, size: int, intervals: list[Interval]) -> tuple[torch.Tensor, torch.Tensor]:
    """Timesteps int64 (size,) and their cluster int64 (size,): sample i is in cluster i mod k, t uniform inside it.

    So every cluster gets the same share of a batch (ANT, section 4.2), and every timestep can be drawn.
    """
    clusters = np.arange(size) % len(intervals)
    first, last = np.array(intervals).T
    timesteps = first[clusters] + (rng.random(size) * (last - first)[clusters]).astype(np.int64)
    return torch.from_numpy(timesteps), torch.from_numpy(clusters)
