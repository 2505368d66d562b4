"""Numbers that run away end a run with one line; what is saved are the numbers from before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from diffusion_accel.training.files import TrainingError
from diffusion_accel.training.log import log_lines
from diffusion_accel.training.loop import train
from diffusion_accel.training.settings import Settings
from diffusion_accel.training.state import load_average, read_counters
from diffusion_accel.training.task import Batch

SETTINGS = Settings(steps=8, batch=4, lr=1e-2, log_every=1, eval_every=0, grid_every=0, save_every=0, cooldown=0)


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)


class Runaway:
    """A line to fit, whose loss or whose gradient is no number from one step on."""

    def __init__(self, at: int, what: str, value: float) -> None:
        self.model, self.at, self.what, self.value = Line(), at, what, value
        self.drawn = 0

    def draw(self, rng: np.random.Generator, batch: int) -> Batch:
        self.drawn += 1
        return {"x": torch.from_numpy(rng.standard_normal((batch, 3), np.float32))}

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        each = (model.layer(batch["x"])[:, 0] - 1) ** 2
        if self.drawn < self.at:
            return each
        if self.what == "loss":
            return each * self.value
        each.register_hook(lambda gradient: gradient * self.value)
        return each

    def evaluate(self) -> dict[str, Any]:
        return {}

    def preview(self, path: Path) -> None:
        raise AssertionError("not asked for")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("at", [1, 5])
def test_a_run_that_ran_away_ends_and_keeps_the_state_before(at: int, what: str, value: float, tmp_path: Path) -> None:
    folder, task = tmp_path / "run", Runaway(at, what, value)
    with pytest.raises(TrainingError) as caught:
        train(task, folder, SETTINGS, Accelerator(cpu=True))
    said = str(caught.value)
    assert len(said.splitlines()) == 1 and f"at step {at};" in said, said
    assert ("a loss of" in said) == (what == "loss") and "a gradient norm of nan" in said, said
    if at == 1:
        assert "no state was saved" in said and not folder.joinpath("state.json").exists()
        return
    assert (
        f"the state of step {at - 1} is saved, and the run can be resumed from there" in said
        and read_counters(folder)["step"] == at - 1
    )
    assert [line["step"] for line in log_lines(folder / "log.jsonl")] == list(range(1, at))
    short = Settings(**{**SETTINGS.__dict__, "steps": at - 1})
    other = Runaway(100, what, value)
    train(other, tmp_path / "other", short, Accelerator(cpu=True))
    kept, right = Line(), Line()
    load_average(folder, kept, "run"), load_average(tmp_path / "other", right, "other")
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), right.parameters(), strict=True))


def test_weights_that_overflowed_are_not_saved(tmp_path: Path) -> None:
    settings = Settings(**{**SETTINGS.__dict__, "steps": 1, "lr": 3e38, "warmup": 0})
    with pytest.raises(TrainingError, match="weights that are no numbers at step 1; no state was saved"):
        train(Runaway(100, "loss", 1.0), tmp_path / "run", settings, Accelerator(cpu=True))
