"""Weights made better by trying them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from diffusion_accel.reuse.plan import Plan
from diffusion_accel.tuning.fit_weights import adjustable, fit_weights, with_weights


def test_weights_written_out_are_the_polynomial() -> None:
    times = [900.0, 700.0, 600.0, 300.0]
    plan = with_weights(Plan.parse("full full hold@1 hold"), times)
    assert plan.steps[2].weights == pytest.approx((1.5, -0.5)) and plan.steps[3].weights == (1.0,)
    assert plan.steps[2].order == 1 and with_weights(plan, times) == plan


def test_gauss_newton_finds_the_weights_of_a_linear_problem() -> None:
    values = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    plan = Plan.parse("full hold=1,0 hold=1,0 full hold:sample=0.5,0.5,0")
    assert [(list(run), place) for run, place in adjustable(plan)] == [
        ([1, 2], 0), ([1, 2], 1), ([4], 0), ([4], 1), ([4], 2)
    ]  # fmt: skip

    def draw(plan: Plan) -> torch.Tensor:
        first, last = plan.steps[1].weights, plan.steps[4].weights
        mixed = torch.tensor([first[0] + last[0], first[1] + last[1], last[2]])
        return (mixed @ values)[None]

    wanted = torch.tensor([0.9, 0.7, -0.3]) @ values
    better = plan
    for _ in range(3):
        better = fit_weights(better, draw, wanted[None], lambda: True) or better
    assert (draw(better) - wanted).abs().max() < 1e-3
    assert fit_weights(Plan.parse("full full"), draw, wanted[None], lambda: True) is None
    assert fit_weights(plan, draw, wanted[None], lambda: False) is None
    same = replace(plan.steps[1], weights=(1.0, 0.0))
    assert plan.steps[1] == same, "the plan given is left as it was"
