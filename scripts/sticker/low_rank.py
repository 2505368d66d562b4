"""Low-rank updates of a frozen model: training them, and what an adapter file holds of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from diffusion_accel.training.files import UsageError


class LowRank(nn.Module):
    """A weight plus the product of two factors (Hu et al. 2022), as a parametrization: up begins at zero."""

    def __init__(self, weight: torch.Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.flatten(1).shape
        rank = min(rank, rows, columns)
        self.down = nn.Parameter(torch.randn(rank, *weight.shape[1:]) / math.sqrt(columns))
        self.up = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight with the update."""
        return weight + (self.up @ self.down.flatten(1)).view_as(weight)


def add_low_rank(model: nn.Module, rank: int) -> None:
    """Freeze `model` and give every linear layer and convolution a low-rank update; their biases are trained whole."""
    model.requires_grad_(False)
    for module in list(model.modules()):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank))
            if module.bias is not None:
                module.bias.requires_grad_(True)


@torch.no_grad()
def set_low_rank(model: nn.Module, changes: dict[str, torch.Tensor]) -> None:
    """Put what `low_rank_changes` gave into the updates of a model whose weights are still the plain ones.

    Raises:
        UsageError: they are of another rank, or of another model.
    """
    for name, module in model.named_modules():
        if not parametrize.is_parametrized(module, "weight"):
            continue
        update: Any = module.parametrizations.weight[0]
        try:
            update.down.copy_(changes[f"{name}.lora_A.weight"])
            update.up.copy_(changes[f"{name}.lora_B.weight"].view_as(update.up))
            if module.bias is not None:
                module.bias += changes[f"{name}.bias"]
        except (KeyError, RuntimeError) as error:
            raise UsageError(f"the adapter to begin with does not fit {name} and the rank: {error}") from error


def low_rank_changes(model: nn.Module, plain: nn.Module) -> dict[str, torch.Tensor]:
    """What `add_low_rank` trained, as an adapter file holds it: factors of weights, differences of biases."""
    biases, changes = dict(plain.named_parameters()), {}
    for name, module in model.named_modules():
        if not parametrize.is_parametrized(module, "weight"):
            continue
        update: Any = module.parametrizations.weight[0]
        changes[f"{name}.lora_A.weight"] = update.down
        changes[f"{name}.lora_B.weight"] = update.up if module.weight.dim() == 2 else update.up[..., None, None]
        if module.bias is not None:
            changes[f"{name}.bias"] = module.bias - biases[f"{name}.bias"]
    return {name: value.detach().half().contiguous() for name, value in changes.items()}
