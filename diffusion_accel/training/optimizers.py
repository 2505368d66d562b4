"""The optimizers of the training loop: AdamW, and Muon for what Muon is for."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from .files import UsageError
from .settings import OPTIMIZERS, Settings


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """The optimizer that the settings name, for all parameters of a model that are trained.

    Raises:
        UsageError: there is no such optimizer, or this version of torch has none.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if settings.optimizer == "adamw":
        return _adamw(parameters, settings)
    if settings.optimizer != "muon":
        raise UsageError(f"the optimizer must be one of {', '.join(OPTIMIZERS)}, got {settings.optimizer!r}")
    if not hasattr(torch.optim, "Muon"):
        raise UsageError(f"torch {torch.__version__} has no Muon: take torch 2.9 or newer, or the optimizer adamw")
    matrices = hidden_matrices(model)
    if not matrices:
        raise UsageError("the model has no linear layers inside of blocks, which Muon is for: take the optimizer adamw")
    return MuonWithAdamW(matrices, parameters, settings)


def hidden_matrices(model: nn.Module) -> list[torch.Tensor]:
    """The weights of linear layers inside of numbered blocks, the modulations of their norms excepted.

    Muon is for matrices between hidden states; embeddings, first and last layers and vectors are left to AdamW.
    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks".
    """
    return [
        layer.weight
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and layer.weight.requires_grad
        and any(part.isdigit() for part in name.split("."))
        and not any("norm" in part for part in name.split("."))
    ]


class MuonWithAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` on some matrices and AdamW on all other parameters, as one optimizer with one state.

    Muon's update is scaled to the size of AdamW's, so both take the same learning rate.
    Source: Liu et al. 2025, "Muon is scalable for LLM training", section 2.2.
    """

    def __init__(
        self, matrices: Iterable[torch.Tensor], parameters: Iterable[nn.Parameter], settings: Settings
    ) -> None:
        matrices = [*matrices]
        known = {id(matrix) for matrix in matrices}
        rest = [parameter for parameter in parameters if id(parameter) not in known]
        self._muon = torch.optim.Muon(
            matrices, lr=settings.lr, weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        self._adamw = _adamw(rest, settings)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], self._adamw.defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nothing here evaluates a loss again
        """One step of both, on the gradients that are there."""
        assert closure is None
        for part, groups in ((self._muon, self.param_groups[:1]), (self._adamw, self.param_groups[1:])):
            part.param_groups, part.state = groups, self.state  # a state that is loaded replaces both
            part.step()


def _adamw(parameters: list[nn.Parameter], settings: Settings) -> torch.optim.AdamW:
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    betas = (0.9, settings.beta2)
    return torch.optim.AdamW(parameters, lr=settings.lr, betas=betas, weight_decay=settings.weight_decay, fused=fused)
