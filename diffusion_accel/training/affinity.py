"""How well denoising tasks go together: the cosines between the gradients of their losses.

Source: Go et al. 2023, "Addressing Negative Transfer in Diffusion Models", section 3.2.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from .denoising import TIMESTEPS
from .diffusion_task import DenoisingTask
from .files import UsageError, read_json


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


def read_affinity(file: Path) -> np.ndarray:
    """The task affinities that `measure_affinity` found, as a file: cosines, (G, G).

    Raises:
        UsageError: the file holds something else.
    """
    found = read_json(file)
    values = found.get("affinity") if isinstance(found, dict) else None
    grid = len(values) if isinstance(values, list) else 0
    square = 1 <= grid <= TIMESTEPS and all(isinstance(row, list) and len(row) == grid for row in values or ())
    if not square or not all(type(x) in (int, float) and abs(x) <= 1.001 for row in values or () for x in row):
        raise UsageError(f"{file} holds no task affinities: a square table of cosines")
    return np.array(values, np.float64)
