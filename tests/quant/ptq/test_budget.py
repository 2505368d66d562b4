"""How much is done in the time there is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quantized import WHOLE, sampler

from diffusion_accel.quant.ptq.budget import plan_prompts, plan_report, shares
from diffusion_accel.quant.ptq.run import quantize_denoiser
from diffusion_accel.quant.ptq.settings import QuantizeSettings


@given(st.tuples(*[st.floats(0, 1e5)] * 3), st.floats(0, 2e5))
def test_time_is_shared_without_a_rest(wanted: tuple[float, ...], seconds: float) -> None:
    asked = dict(zip(("rounding", "time", "stage two"), wanted, strict=True))
    found = shares(asked, seconds)
    assert all(0 <= share <= 1 for share in found.values())
    used = sum(asked[k] * found[k] for k in asked)
    assert used == pytest.approx(min(seconds, sum(wanted)), rel=1e-9, abs=1e-9)
    assert asked["rounding"] * found["rounding"] >= min(asked["rounding"], 0.5 * seconds) * (1 - 1e-9) - 1e-12


def test_minutes_cut_the_work_down(tmp_path: Path) -> None:
    huge = QuantizeSettings(weight_bits=4, buckets=3)  # the published numbers of steps
    run = quantize_denoiser(sampler(), huge, tmp_path, minutes=0.1)
    assert run.plan["iterations"] < 20_000 and run.plan["epochs"] < 20


@pytest.mark.slow
def test_a_budget_that_is_over_leaves_the_least_to_measure(tmp_path: Path) -> None:
    """Counted in rows that the model sees, not in seconds."""
    seen: dict[float | None, int] = {}
    for minutes in (None, 1e-4):
        s, settings = sampler(16), replace(WHOLE, rounding=None, finetune=None, bits_budget=4.0)
        rows: list[int] = []

        def note(module: Any, args: Any, kwargs: Any, rows: list[int] = rows) -> None:
            rows.append(len(args[0] if args else kwargs["sample"]))

        s.pipe.unet.register_forward_pre_hook(note, with_kwargs=True)
        run = quantize_denoiser(s, settings, tmp_path / str(minutes), minutes)
        seen[minutes] = sum(rows)
    assert json.loads((tmp_path / "0.0001" / "probe.json").read_text()) == {"rows": 1, "timesteps": 1}
    assert (run.plan["error_rows"], run.plan["range_rows"]) == (1, 4)
    assert len(run.sampler.prompts) == 8 and run.spec.recipe and run.spec.recipe["prompts"] == 8
    drawn = {None: 16 * 4, 1e-4: (8 + 1) * 4}  # images and steps; one image is drawn to see how long it takes
    assert seen[1e-4] - drawn[1e-4] < 0.5 * (seen[None] - drawn[None])


def test_the_calibration_set_keeps_within_a_quarter_of_the_budget() -> None:
    assert plan_prompts(64, 1.0, 60.0) == 15 and plan_prompts(64, 1.0, 6000.0) == 64
    assert plan_prompts(64, 10.0, 60.0) == 8 and plan_prompts(5, 10.0, 60.0) == 5 and plan_prompts(64, 0.0, 1.0) == 64


@pytest.mark.parametrize(("seconds", "expected"), [(None, (16, 5)), (1000.0, (16, 5)), (50.0, (8, 3)), (0.0, (1, 1))])
def test_the_report_keeps_within_what_is_left(seconds: float | None, expected: tuple[int, int]) -> None:
    assert plan_report(16, 1.0, seconds, 60.0) == expected
    assert plan_report(0, 1.0, seconds, 60.0)[0] == 0
