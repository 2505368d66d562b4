"""Muon on the matrices inside of blocks and AdamW on the rest: one optimizer, whose state is saved and loaded."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import arguments, log_of, trainer
from torch import nn

from diffusion_accel.training.files import UsageError
from diffusion_accel.training.optimizers import Muon, MuonWithAdamW, hidden_matrices, make_optimizer, orthogonalized
from diffusion_accel.training.settings import Settings

MUON = Settings(steps=1, batch=1, lr=1e-2, optimizer="muon", weight_decay=0.1)


class Model(nn.Module):
    """An embedding, blocks with a modulated norm, and a last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"norm": nn.Linear(4, 8), "up": nn.Linear(4, 6), "down": nn.Linear(6, 4, bias=False)})
            for _ in range(2)
        )
        self.last = nn.Linear(4, 2)


def gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_matrices_inside_of_blocks_are_muons() -> None:
    model = Model()
    ours = {id(matrix) for matrix in hidden_matrices(model)}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in ours]
    assert names == [f"blocks.{i}.{layer}.weight" for i in (0, 1) for layer in ("up", "down")]


def test_one_optimizer_is_both() -> None:
    torch.manual_seed(0)
    model, theirs = Model(), Model()
    theirs.load_state_dict(model.state_dict())
    ours = make_optimizer(model, MUON)
    matrices = hidden_matrices(theirs)
    rest = [p for p in theirs.parameters() if not any(p is m for m in matrices)]
    both = [
        Muon(matrices, lr=1e-2, weight_decay=0.1),
        torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.1, betas=(0.9, MUON.beta2), fused=True),
    ]
    for seed in range(3):
        gradients(model, seed), gradients(theirs, seed)
        ours.step()
        for one in both:
            one.step()
    for a, b in zip(model.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_orthogonalized_keeps_the_singular_vectors(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    left, values, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = values.clamp(min=0.1 * float(values.max()))  # tinier ones take more than five steps
    middle = left.T @ orthogonalized(left * values @ right) @ right.T
    found = middle.diagonal()
    assert float((middle - found.diag()).abs().max()) < 1e-5
    assert 0.6 < float(found.min()) and float(found.max()) < 1.25


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
def test_muon_is_torchs_but_for_the_rounding_of_its_products() -> None:
    torch.manual_seed(0)
    start = [torch.randn(16, 24), torch.randn(24, 16), torch.randn(8, 8)]
    ours, theirs = ([nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    both = [
        (ours, Muon(ours, 1e-2, 0.1)),
        (theirs, torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")),
    ]
    for seed in range(3):
        for matrices, optimizer in both:
            generator = torch.Generator().manual_seed(seed)
            for matrix in matrices:
                matrix.grad = torch.randn(matrix.shape, generator=generator)
            optimizer.step()
    for a, b, before in zip(ours, theirs, start, strict=True):
        assert float((a - b).detach().norm()) < 0.02 * float((b - before).detach().norm())


def test_a_saved_state_goes_on_the_same() -> None:
    torch.manual_seed(0)
    model = Model()
    optimizer = make_optimizer(model, MUON)
    gradients(model, 0)
    optimizer.step()
    other = Model()
    other.load_state_dict(model.state_dict())
    again = make_optimizer(other, MUON)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, its in ((model, optimizer), (other, again)):
        gradients(one, 1)
        its.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_parameters_that_are_added_are_adamws() -> None:
    model, extra = Model(), nn.Parameter(torch.ones(3))
    optimizer = make_optimizer(model, MUON)
    assert isinstance(optimizer, MuonWithAdamW)
    optimizer.add_param_group({"params": [extra], "lr": 0.1, "weight_decay": 0.0})
    gradients(model, 0)
    extra.grad = torch.tensor([1.0, -2.0, 0.0])
    optimizer.step()
    assert extra.tolist() == pytest.approx([0.9, 1.1, 1.0], abs=1e-4)


def test_what_muon_cannot_train_is_refused() -> None:
    with pytest.raises(UsageError, match="no linear layers inside of blocks"):
        make_optimizer(nn.Linear(2, 2), MUON)
    with pytest.raises(UsageError, match="must be one of adamw, muon, got 'sgd'"):
        make_optimizer(Model(), Settings(steps=1, batch=1, lr=1.0, optimizer="sgd"))


def test_a_run_is_resumed_exactly_and_with_its_own_optimizer(data: Path, tmp_path: Path, capsys: Any) -> None:
    switches = ["--optimizer", "muon", "--task-clusters", "3", "--task-loss", "uw", "--steps", "4"]
    assert trainer.main(arguments(data, tmp_path / "whole", "dit", *switches)) == 0
    work = tmp_path / "parts"
    assert trainer.main(arguments(data, work, "dit", *switches, "--minutes", "0")) == 0
    assert json.loads((work / "train" / "state.json").read_text())["step"] == 1
    assert trainer.main(arguments(data, work, "dit", *switches, "--optimizer", "adamw", "--resume")) == 2
    assert "was made with optimizer muon; resume it with the same" in capsys.readouterr().err
    assert trainer.main(arguments(data, work, "dit", *switches, "--resume")) == 0
    assert log_of(work)[-3:] == log_of(tmp_path / "whole")[-3:]
