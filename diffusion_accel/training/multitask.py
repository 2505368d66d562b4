"""How the losses of several task clusters become one update: the multi-task methods that ANT compares.

Source: Go et al. 2023, "Addressing Negative Transfer in Diffusion Models", section 4.2, and the papers named below.
A `Weighting` gets one loss a cluster. `UncertaintyWeighting` turns them into one loss; the others into one gradient.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from .files import UsageError

TASK_LOSSES = ("none", "uw", "pcgrad", "nash")


class Weighting(nn.Module):
    """Plain mean of the clusters' losses; the base of the other methods.

    `on_gradients` says which of the two the loop asks for: `total(losses)`, or `combine(gradients)`.
    """

    on_gradients = False
    lr = 0.0  # of the parameters of this module, which have no weight decay

    def total(self, losses: torch.Tensor) -> torch.Tensor:
        """Losses (k,) -> the loss to differentiate."""
        return losses.mean()

    def combine(self, gradients: torch.Tensor, _rng: np.random.Generator, _step: int) -> torch.Tensor:
        """Flat gradients of the clusters' losses (k, P) -> one gradient (P,)."""
        return gradients.mean(0)


class UncertaintyWeighting(Weighting):
    """½ Σ (exp(-s_i) L_i / k + s_i) with one learned s_i a cluster (Kendall et al. 2018; s from 0, rate 0.025).

    For a constant loss s_i comes to rest at ln(L_i / k). The total may be negative.
    """

    lr = 0.025

    def __init__(self, k: int) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.zeros(k))

    def total(self, losses: torch.Tensor) -> torch.Tensor:
        """Losses (k,) -> their sum, each weighted by what was learnt of its uncertainty."""
        return 0.5 * (torch.exp(-self.s) * losses / len(losses) + self.s).sum()


class PCGrad(Weighting):
    """Each gradient loses its component against every other gradient that it opposes (Yu et al. 2020, algorithm 1).

    The others come in random order and count as they were before the projections. The result is the mean.
    """

    on_gradients = True

    def combine(self, gradients: torch.Tensor, rng: np.random.Generator, _step: int) -> torch.Tensor:
        """Gradients (k, P) -> the mean of what is left of them, (P,)."""
        # Every projection is a combination of the gradients: work on coefficients and the k x k products.
        k, products = len(gradients), (gradients @ gradients.T).double().cpu().numpy()
        weights = np.eye(k)
        for i in range(k):
            for j in rng.permutation(k):
                against = weights[i] @ products[:, j]
                if j != i and against < 0 and products[j, j] > 0:
                    weights[i, j] -= against / products[j, j]
        mean = torch.from_numpy(weights.mean(0)).to(gradients)
        return mean @ gradients


class NashMTL(Weighting):
    """Σ α_i g_i with the bargaining solution GᵀG α = 1/α (Navon et al. 2022, claim 3.1), α solved every 25 steps.

    The solution is the minimum of ½ αᵀGᵀGα - Σ ln α_i, found by damped Newton steps. The gradients are first divided by
    their mean norm, and the result is multiplied by it, so the learning rate keeps its meaning.
    """

    on_gradients = True
    every = 25
    alpha: torch.Tensor

    def __init__(self, k: int) -> None:
        super().__init__()
        self.register_buffer("alpha", torch.ones(k, dtype=torch.float64))

    def combine(self, gradients: torch.Tensor, _rng: np.random.Generator, step: int) -> torch.Tensor:
        """Gradients (k, P) -> their bargaining solution, (P,)."""
        products = (gradients @ gradients.T).double().cpu().numpy()
        scale = np.sqrt(np.diag(products)).mean()
        if step % self.every == 0 and scale > 0:
            self.alpha.copy_(torch.from_numpy(bargain(products / scale**2)))
        return (self.alpha.to(gradients) / len(gradients)) @ gradients


def bargain(products: np.ndarray, iterations: int = 100) -> np.ndarray:
    """α > 0 with products @ α = 1/α, for a positive semi-definite (k, k) matrix with a positive diagonal."""
    k = len(products)
    matrix = products + 1e-9 * np.trace(products) / k * np.eye(k)

    def value(alpha: np.ndarray) -> float:
        return float(0.5 * alpha @ matrix @ alpha - np.log(alpha).sum())

    alpha = 1 / np.sqrt(np.maximum(np.diag(matrix), 1e-12))
    for _ in range(iterations):
        gradient = matrix @ alpha - 1 / alpha
        if np.abs(gradient * alpha).max() < 1e-10:
            break
        direction = np.linalg.solve(matrix + np.diag(1 / alpha**2), gradient)
        length, before = 1.0, value(alpha)
        while length > 1e-12:
            moved = alpha - length * direction
            if (moved > 0).all() and value(moved) <= before - 1e-4 * length * float(gradient @ direction):
                alpha = moved
                break
            length /= 2
        else:
            break
    return alpha


def weighting(kind: str, k: int) -> Weighting:
    """The method called `kind` for k clusters."""
    kinds: dict[str, Any] = {"none": lambda _: Weighting(), "uw": UncertaintyWeighting}
    kinds |= {"pcgrad": lambda _: PCGrad(), "nash": NashMTL}
    if kind not in kinds:
        raise UsageError(f"unknown task loss {kind!r}; the methods are: {', '.join(TASK_LOSSES)}")
    return kinds[kind](k)
