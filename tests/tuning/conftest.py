"""The embedded model, and a clock that counts work."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffusion_accel.model_files.names import EMBEDDED


@pytest.fixture(scope="module")
def sticker() -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(EMBEDDED["sticker"].path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(autouse=True)
def work_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of these searches counts multiplications, so that no busy machine decides what a plan can reach."""
    done = [0]

    def count(module: Any, args: Any, output: Any) -> None:
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            done[0] += output.numel() * module.weight[0].numel()

    def seconds_of(work: Callable[[], Any]) -> float:
        done[0] = 0
        with torch.nn.modules.module.register_module_forward_hook(count):
            work()
        return done[0] / 1e9

    for module in ("measure", "by_rollouts", "result"):
        monkeypatch.setattr(f"diffusion_accel.tuning.{module}.seconds_of", seconds_of)
