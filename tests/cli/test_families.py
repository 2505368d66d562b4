"""Families on the command line: chosen behind --reuse, shown by `inspect`, named in what an image keeps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command import call
from PIL import Image, ImageChops

from diffusion_accel.reuse.plan import Plan
from diffusion_accel.reuse.plan_family import PlanFamily
from diffusion_accel.reuse.plan_file import TunedPlan

PROMPT = "red apple, 3d style"
NUMBERS = {"psnr_median": 50.0, "psnr_worst_decile": 45.0, "psnr_floor": 44.5, "floor_share": 0.9}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A family for four steps of the embedded model."""
    shipped = TunedPlan.load("tuned:quality")
    plans = [
        replace(shipped, name="", plan=Plan.parse(tokens), measured={**NUMBERS, "time_ratio": speed})
        for speed, tokens in ((1.3, "full hold full full"), (2.0, "full hold full hold"))
    ]
    solver = {"config": {"n": 5}, "measured": {"evaluations": 5, "psnr_median": 44.25, "speedup": [1]}}
    PlanFamily.of(plans, ["slow"], {"five": solver}).save(tmp_path / "family.json")
    return tmp_path / "family.json"


def test_generate_chooses_and_says_what(file: Path, tmp_path: Path, capsys: Any) -> None:
    def drawn(name: str, plan: str) -> Image.Image:
        out = str(tmp_path / name)
        code, text, err = call(capsys, "generate", PROMPT, "--reuse", plan, "--steps", "4", "--seed", "1", "-o", out)
        assert not code, err
        if name == "a.png":
            assert f"reuse chose plan {file}:2, speedup 2" in text
        return Image.open(out).convert("RGB")

    chosen, given = drawn("a.png", f"{file},speedup=1.5"), drawn("b.png", f"{file}:2")
    assert ImageChops.difference(chosen, given).getbbox() is None
    assert ImageChops.difference(chosen, drawn("c.png", f"{file}:slow")).getbbox() is not None
    kept = json.loads(call(capsys, "metadata", str(tmp_path / "a.png"), "--json")[1])
    assert kept["settings"]["Accelerated by"] == "reuse(plan=family.json, speedup=1.5), its plan 2"
    data = kept["diffusion_accel"]
    assert data["features"]["reuse"]["plan"] == "family.json" and data["features"]["reuse"]["speedup"] == 1.5
    assert data["report"]["choices"]["reuse"]["plan"] == "family.json:2"


def test_what_no_plan_reaches_is_refused_before_a_model_is_loaded(file: Path, no_model: None, capsys: Any) -> None:
    for plan, words in (
        (f"{file},speedup=3", "is at least 3 times as fast; there are 1.3x 50 dB, 2x 50 dB"),
        (f"{file},min_psnr=60", "is at 60 dB or more"),
        ("hold:2,speedup=2", "speedup and min_psnr choose among tuned plans"),
        (f"{file}:quick", "has no plan quick; "),
        (f"{file},speedup=0.5", "speedup must be between 1 and 1000"),
        (f"{file},speed=2", "did you mean 'speedup'?"),
    ):
        code, _, err = call(capsys, "generate", PROMPT, "--reuse", plan, "--steps", "4", "-o", "x.png")
        assert code and words in err and err.count("\n") == 1


def test_inspect_shows_a_family_and_a_plan(file: Path, capsys: Any) -> None:
    code, out, _ = call(capsys, "inspect", str(file))
    table = [line.split() for line in out.splitlines()]
    assert code == 0
    assert ["slow", "1.30", "3", "50.0", "45.0", "44.5"] in table
    assert ["2", "2.00", "2", "50.0", "45.0", "44.5"] in table
    assert ["solver", "five", "–", "5", "44.2", "–", "–"] in table, "what is no number is no measurement"
    assert "is the plan 2;" in out and "at least 90% of cases" in out
    whole = json.loads(call(capsys, "inspect", str(file), "--json")[1])
    assert whole["plans"]["slow"]["speedup"] == 1.3 and whole["solvers"]["five"]["evaluations"] == 5
    assert whole["conditions"]["scheduler"] == "DPMSolverMultistepScheduler"
    out = call(capsys, "inspect", f"{file}:slow")[1]
    assert "1.30" in out and "2.00" not in out and "--reuse" not in out
    assert "fast" in call(capsys, "inspect", "tuned:ddim")[1]
    code, _, err = call(capsys, "inspect", "tuned:none")
    assert code and "shipped plans: tuned:ddim, tuned:dpm" in err
