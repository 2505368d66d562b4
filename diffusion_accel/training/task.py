"""What is trained, as the loop sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

Batch = dict[str, torch.Tensor]


class Task(Protocol):
    """What a stage adds to the loop. `model` holds the weights that are trained; all its parameters take part."""

    model: nn.Module

    def draw(self, rng: np.random.Generator, size: int) -> Batch:
        """The data of one step: tensors whose first dimension is `size`, everything random taken from `rng`."""

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Mean loss over a slice of a batch; `model` is the (possibly wrapped) model to call.

        A task with a `weighting` (see `multitask`) returns one loss a task cluster, (k,). A task with `facts` has them
        in its saved state.
        """

    def evaluate(self) -> dict[str, Any]:
        """Numbers for the log, from `self.model` as it is (the loop has put the averaged weights in)."""

    def preview(self, path: Path) -> None:
        """Write an image that shows how far training is."""
