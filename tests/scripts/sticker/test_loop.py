"""The training loop on the tasks of the recipe: resuming, micro-batches, what may not change."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from recipe import denoiser_task, log_of, settings, tensors_of
from sticker.tasks import DecoderTask, TextTask

from diffusion_accel.training.files import UsageError
from diffusion_accel.training.loop import train


def test_learning_rate_depends_on_the_step_alone() -> None:
    linear = settings(steps=100, warmup=10, cooldown=0.4, minutes=1)
    assert linear.rate(0) == pytest.approx(1e-4) and linear.rate(30) == 1e-3
    assert linear.rate(80) == pytest.approx(5e-4) and 0 < linear.rate(99) < 1e-4
    cosine = settings(steps=100, warmup=10, cooldown=1.0, curve="cosine")
    assert cosine.rate(50) == pytest.approx(1e-3 * 0.5 * (1 - math.cos(math.pi / 2)))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("make", [DecoderTask, TextTask, denoiser_task])
def test_resumed_run_equals_an_uninterrupted_one(make: Any, work: Path, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    assert train(make(work), tmp_path / "whole", settings(), accelerator).finished

    task = make(work)
    draw, calls = task.draw, []

    def interrupted(rng: np.random.Generator, size: int) -> Any:
        calls.append(size)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(rng, size)

    task.draw = interrupted
    outcome = train(task, tmp_path / "parts", settings(), accelerator)
    assert (outcome.step, outcome.finished, outcome.signal) == (3, False, signal.SIGTERM)
    with pytest.raises(UsageError, match="can be resumed"):
        train(make(work), tmp_path / "parts", settings(), accelerator)
    assert train(make(work), tmp_path / "parts", settings(), accelerator, resume=True).finished

    assert log_of(tmp_path / "parts") == log_of(tmp_path / "whole")
    whole, parts = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert {part.split(".")[0] for part in whole} == {"model", "average", "optimizer"}


def test_accumulation_changes_only_rounding(work: Path, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    for parts in (1, 2):
        train(TextTask(work), tmp_path / str(parts), settings(steps=2, log_every=1, accumulation=parts), accelerator)
    losses = [[line["loss"] for line in log_of(tmp_path / part)] for part in "12"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_changed_seed_is_refused_on_resume(work: Path, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    train(TextTask(work), tmp_path, settings(steps=1), accelerator)
    with pytest.raises(UsageError, match="seed 0"):
        train(TextTask(work), tmp_path, settings(seed=1), accelerator, resume=True)
    with pytest.raises(UsageError, match="cannot be divided"):
        train(TextTask(work), tmp_path / "new", settings(batch=3, accumulation=2), accelerator)
