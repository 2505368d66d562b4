"""Presets beside a tuned plan: which are tried, and that none of them is better than what comes out."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_accel.measure.fidelity import psnr, spread
from diffusion_accel.reuse.history import weights
from diffusion_accel.reuse.plan import FULL, Plan
from diffusion_accel.reuse.preset import Preset
from diffusion_accel.reuse.search import Forecasts
from diffusion_accel.reuse.step import Step
from diffusion_accel.tuning import by_rollouts
from diffusion_accel.tuning.measure import reusing
from diffusion_accel.tuning.presets import damped, presets

from .test_by_rollouts import dit, searching

STEPS = 6


def computed(plan: Plan) -> int:
    return sum(step.mode == "full" for step in plan.steps)


def nearness(tuner: Any, plan: Plan) -> float:
    """By the rule that plans are chosen by, straight from the images."""
    with reusing(tuner.reference.sampler.pipe, plan):
        return statistics.mean(spread(psnr(tuner.reference.images, tuner.reference.sampler.images()), 80.0))


def brute_force(tuner: Any, most: int) -> list[float]:
    """All presets of at most so many computed steps, by their names."""
    plans = [Preset.parse(f"hold:{n}@{order}").for_steps(STEPS) for n in range(1, STEPS + 1) for order in range(3)]
    return [nearness(tuner, plan) for plan in plans if computed(plan) <= most]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("poor", [False, True])
def test_no_preset_of_as_few_computed_steps_is_nearer(poor: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        tuner = searching(dit())
        monkeypatch.setattr(tuner, "largest", lambda _: 3)
        monkeypatch.setattr(by_rollouts, "RIVALS", 100)
        if poor:  # a search that went wrong
            monkeypatch.setattr(tuner, "plan", lambda _: Plan((FULL, *(Step("hold"),) * (STEPS - 1))))
        plan, nodes = tuner.one(2.0)
        assert computed(plan) == len(nodes) <= 3 and [i for i in nodes if plan.steps[i].mode != "full"] == []
        found, rivals = nearness(tuner, plan), brute_force(tuner, 3)
        assert found >= max(rivals) - 1e-6
        assert any(step.fit is not None for step in plan.steps) != poor
        assert min(rivals) < max(rivals) - 3, "there is something to choose"
        first = presets(tuner.recording, 3)
        assert nearness(tuner, first[0]) > max(rivals) - 1, "what is predicted to be near is near"


def test_presets_are_those_with_names_and_damped_ones() -> None:
    with torch.inference_mode():
        recording = searching(dit()).recording
        found = presets(recording, 3)
    assert all(1 <= computed(plan) <= 3 for plan in found)
    named = [Preset("hold", n, order=order).for_steps(STEPS) for n in range(2, STEPS + 1) for order in range(3)]
    assert all(plan in found for plan in named) and len(found) == len(named) * 5 // 3
    assert presets(recording, STEPS)[0] == Plan((FULL,) * STEPS)


def test_damped_is_half_of_the_way() -> None:
    times = [990.0, 800.0, 610.0, 405.0, 200.0, 20.0]
    own = Forecasts(times, np.eye(6), np.ones(6))
    steps = damped(Preset("hold", 2, order=1).for_steps(6), own).steps
    assert steps[1].weights == (1.0,), "one value is all there is"
    for i in (3, 5):
        line = weights([times[i - 1], times[i - 3]], times[i])
        halfway = (line[0] + 1) / 2, line[1] / 2
        assert steps[i].weights == pytest.approx(halfway, abs=1e-4)
    assert [str(step) for step in steps[::2]] == ["full"] * 3
