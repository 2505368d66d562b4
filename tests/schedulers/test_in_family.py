"""Learned solvers within a family of plans: taken apart and put together again, and what is no such thing refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDIMScheduler
from solvers import odd

from diffusion_accel import ConfigurationError, LearnedMultistepScheduler, PlanFamily
from diffusion_accel.reuse.plan_family import PlanFamily as Family
from diffusion_accel.schedulers.in_family import apart, together
from diffusion_accel.schedulers.solver import evaluations_in, read_file

BASE = {"denoiser": "UNet2DModel", "guidance_scale": [3.0, 3.0]}
NUMBERS = {"2": {"psnr_median": 30.0}, "4": {"psnr_median": 40.5}}


@pytest.fixture
def scheduler() -> LearnedMultistepScheduler:
    base = DDIMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    made = odd(base, 2, 4, channels=3)
    made.register_to_config(made_for={**BASE, "towards": "converged", "measured": NUMBERS})
    return made


def family(solvers: Any = None) -> PlanFamily:
    return Family.of([PlanFamily.load("tuned:ddim").members[0]], solvers=solvers)


def test_a_family_gives_the_solver_back(scheduler: LearnedMultistepScheduler, tmp_path: Path) -> None:
    whole = family().with_solvers(scheduler)
    assert {n: s["measured"] for n, s in whole.solvers.items()} == {
        "2": {"evaluations": 2, "towards": "converged", "psnr_median": 30.0},
        "4": {"evaluations": 4, "towards": "converged", "psnr_median": 40.5},
    }
    whole.save(tmp_path / "all.json")
    read = PlanFamily.load(str(tmp_path / "all.json"))
    assert read == whole and read.members == family().members
    assert evaluations_in(tmp_path / "all.json") == [2, 4]
    again = LearnedMultistepScheduler.from_config(read_file(tmp_path / "all.json"))
    own = (
        "num_train_timesteps beta_start beta_end beta_schedule trained_betas prediction_type flow solvers "
        "rescale_betas_zero_snr"
    )
    for key in own.split():
        assert again.config[key] == scheduler.config[key], key
    assert {k: again.config.made_for[k] for k in BASE} == BASE
    assert again.config.made_for["measured"]["4"]["psnr_median"] == 40.5
    assert list(family(whole.solvers).with_solvers(scheduler).solvers) == ["2", "4"], "the same ones take their place"


def test_one_of_several_stays_usable(scheduler: LearnedMultistepScheduler, tmp_path: Path) -> None:
    solvers = apart(json.loads(scheduler.to_json_string()))
    family({"4": solvers["4"]}).save(tmp_path / "one.json")
    assert evaluations_in(tmp_path / "one.json") == [4]


def test_a_solver_of_dpm_solver_is_read_though_that_keeps_minus_infinity(tmp_path: Path) -> None:
    from diffusers import DPMSolverMultistepScheduler

    odd(DPMSolverMultistepScheduler(), 2).save_pretrained(tmp_path / "s")
    assert "-Infinity" in (tmp_path / "s" / "scheduler_config.json").read_text()
    assert evaluations_in(tmp_path / "s") == [2]


def test_what_is_no_solver_is_refused(scheduler: LearnedMultistepScheduler, tmp_path: Path) -> None:
    good = apart(json.loads(scheduler.to_json_string()))
    other = {**good["4"], "config": {**good["4"]["config"], "beta_end": 0.5}}
    for solvers, words in (
        ({}, "without solvers; tune makes some"),
        ([], "without solvers"),
        ({"2": good["2"], "4": other}, "for different models"),
        ({"2": good["2"], "two": good["2"]}, "two solvers are for '2' evaluations"),
        ({"2": {"measured": {}}}, "a solver's config must have solvers, got None"),
        ({"2": {"config": {"solvers": 3}}}, "must have solvers"),
        ({"2": 3}, "must have solvers"),
    ):
        with pytest.raises(ConfigurationError, match=f"^here.*{words}"):
            together(solvers, "here")
    file = tmp_path / "broken.json"
    values = family(good).to_dict()
    values["solvers"]["2"]["config"]["solvers"]["2"]["timesteps"] = [5.0, 900.0]
    file.write_text(json.dumps(values))
    with pytest.raises(ConfigurationError, match="broken.json: the solver for 2 evaluations: timesteps must fall"):
        evaluations_in(file)
