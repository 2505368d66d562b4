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
        UsageError: there is no such optimizer, or nothing in the model that it is for.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if settings.optimizer == "adamw":
        return _adamw(parameters, settings)
    if settings.optimizer != "muon":
        raise UsageError(f"the optimizer must be one of {', '.join(OPTIMIZERS)}, got {settings.optimizer!r}")
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


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix (m, n) with the same singular vectors and all singular values near 1 (0.7 to 1.2), by Newton-Schulz.

    Source: Jordan et al. 2024: five steps of the quintic iteration. On a GPU in bfloat16 as there and in
    `torch.optim.Muon`; on a CPU in float32, since CPUs without bfloat16 products take a hundred times as long.
    """
    found = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    tall = len(found) > found.shape[1]
    found = found.T if tall else found
    found = found / found.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), found, beta=3.4445)
    return (found.T if tall else found).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose every update of a matrix is `orthogonalized`, with the size of AdamW's updates.

    `torch.optim.Muon(nesterov=True, adjust_lr_fn="match_rms_adamw")` of torch 2.9, but for `orthogonalized`.
    Source: Jordan et al. 2024; Liu et al. 2025, "Muon is scalable for LLM training", section 2.2.
    """

    def __init__(
        self, matrices: Iterable[torch.Tensor], lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nothing here evaluates a loss again
        """One step on the gradients that are there."""
        assert closure is None
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                kept = state.setdefault("momentum_buffer", torch.zeros_like(matrix))
                kept.lerp_(matrix.grad, 1 - momentum)
                update = orthogonalized(matrix.grad.lerp(kept, momentum))
                matrix.mul_(1 - lr * group["weight_decay"])
                matrix.sub_(update, alpha=0.2 * lr * max(matrix.shape) ** 0.5)


class MuonWithAdamW(torch.optim.Optimizer):
    """`Muon` on some matrices and AdamW on all other parameters, as one optimizer with one state.

    Both take the same learning rate.
    """

    def __init__(
        self, matrices: Iterable[torch.Tensor], parameters: Iterable[nn.Parameter], settings: Settings
    ) -> None:
        matrices = [*matrices]
        known = {id(matrix) for matrix in matrices}
        rest = [parameter for parameter in parameters if id(parameter) not in known]
        self._muon = Muon(matrices, settings.lr, settings.weight_decay)
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
