"""Denoising tasks in groups: contiguous intervals of timesteps found by dynamic programming (ANT).

Source: Go et al. 2023, "Addressing Negative Transfer in Diffusion Models", section 4.1. Against the published code the
bounds are those of the optimum (it reports them one step early) and intervals share no step and leave none out.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from .denoising import TIMESTEPS, Process
from .files import UsageError, read_json

if TYPE_CHECKING:
    from .diffusion_task import DenoisingTask

CLUSTERINGS = ("timestep", "snr", "gradient")
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


def read_affinity(file: Path) -> np.ndarray:
    """The task affinities that `--measure-affinity` wrote: cosines, (G, G).

    Raises:
        UsageError: the file holds something else.
    """
    found = read_json(file)
    values = found.get("affinity") if isinstance(found, dict) else None
    grid = len(values) if isinstance(values, list) else 0
    square = 1 <= grid <= TIMESTEPS and all(isinstance(row, list) and len(row) == grid for row in values or ())
    if not square or not all(type(x) in (int, float) and abs(x) <= 1.001 for row in values or () for x in row):
        raise UsageError(f"{file} holds no task affinities: a square table of cosines, as --measure-affinity writes it")
    return np.array(values, np.float64)


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


def measure_affinity(task: DenoisingTask, grid: int = 20, samples: int = 32, seed: int = 0) -> list[list[float]]:
    """Cosines between the gradients of the loss at `grid` evenly spaced parts of the timesteps: (grid, grid).

    ANT's task affinity score (section 3.2) at the weights that `task.model` has now; all parts see the same `samples`
    images and noise. Holds `grid` gradients in memory.
    """
    rng, parameters = np.random.default_rng(seed), [p for p in task.model.parameters() if p.requires_grad]
    batch = task.draw(rng, samples)
    rows = []
    for part in range(grid):
        inside = (part + rng.random(samples)) / grid * TIMESTEPS
        error = task.errors(task.model, batch | {"timesteps": torch.from_numpy(inside.astype(np.int64))}).mean()
        found = torch.autograd.grad(error, parameters, allow_unused=True)
        flat = torch.cat([g.flatten() for g in found if g is not None])
        rows.append(flat / flat.norm().clamp(min=1e-12))
    vectors = torch.stack(rows)
    return (vectors @ vectors.T).tolist()
