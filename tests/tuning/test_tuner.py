"""The tuner: its searches on the embedded model, and the command from end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from diffusion_accel import ConfigurationError
from diffusion_accel.cli.main import main
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.progress import silent
from diffusion_accel.reuse.plan import Plan, Step
from diffusion_accel.reuse.search import Rule, best_plans
from diffusion_accel.tuning import measure as calibration
from diffusion_accel.tuning.budget import Budget
from diffusion_accel.tuning.by_trials import Tuner
from diffusion_accel.tuning.fit_weights import fit_weights, with_weights
from diffusion_accel.tuning.measure import Observations, Reference, measure_costs
from diffusion_accel.tuning.state import read_search
from diffusion_accel.tuning.target import Target
from diffusion_accel.tuning.trials import Trials
from diffusion_accel.tuning.tuner import tune

PROMPTS = [f"{name}, {style} style" for name in ("red apple", "panda", "rocket") for style in ("3d", "flat")]


CALL = {"guidance_scale": 3.0, "height": 96, "width": 96}


SMALL = CALL | {"height": 48, "width": 48}  # where it does not matter what the images look like


@pytest.mark.slow
def test_a_tuned_plan_is_nearer_than_the_uniform_one_of_equal_work(sticker: Any) -> None:
    from diffusion_accel.measure.fidelity import psnr

    sticker.scheduler = DDIMScheduler.from_config(sticker.scheduler.config)
    sampler = Sampler(sticker, tuple(PROMPTS[:3]), 8, 0, 6, CALL)
    with torch.inference_mode():
        trials = Trials(sampler, Reference.measure(sampler, sampler))
        forecasts = Observations.measure(sampler, trials.reference, silent).forecasts
        uniform = Plan(tuple(Step() if i % 2 == 0 else Step("hold", order=1) for i in range(8)))
        plain = best_plans(forecasts, 8, [Rule(1), Rule(2)])[4]
        fitted = best_plans(forecasts, 8, [Rule(1, True), Rule(2, True)])[4]
        assert np.median(trials.scores(plain)) > np.median(trials.scores(uniform)) + 3
        assert np.median(trials.scores(fitted)) > np.median(trials.scores(uniform)) + 5
        better = fit_weights(
            with_weights(plain, forecasts[0].times), trials.draw, trials.reference.images, lambda: True
        )
        assert better is not None and trials.mean(better) > trials.mean(plain) + 0.5
        assert getattr(sticker, "acceleration", None) is None, "tuning leaves the pipeline as it was"
        again = sampler.images()
    assert torch.isinf(psnr(again, trials.reference.images)).all()


@pytest.mark.slow
def test_a_machine_that_slows_down_changes_no_cost(sticker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every turn measures the baseline and the plans; turns may differ, as on a machine with other work."""
    sampler = Sampler(sticker, tuple(PROMPTS[:1]), 4, 0, 1, SMALL)
    with torch.inference_mode():
        reference = Reference.measure(sampler, sampler)
        costs = measure_costs(sampler, reference, 4, True, lambda: None)
        honest, turns = calibration.seconds_of, iter([1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 5, 5, 5, 5])
        monkeypatch.setattr(calibration, "seconds_of", lambda work: honest(work) * next(turns))
        busy = measure_costs(sampler, reference, 4, True, lambda: None)
    assert costs.speedup(Plan((Step(),) * 4)) == pytest.approx(1)
    assert busy.steps == pytest.approx(costs.steps) and busy.fixed == pytest.approx(costs.fixed)
    assert costs.steps["full"] > costs.steps["full/reuse"] > costs.steps["hold"] == 0


@pytest.mark.slow
def test_a_search_that_was_stopped_goes_on(sticker: Any, tmp_path: Path) -> None:
    state, drawn = tmp_path / "search", []

    class Noted(Trials):
        def scores(self, plan: Plan, at_least: float | None = None) -> list[float]:
            if str(plan) not in self.known:
                drawn.append(str(plan))
            return super().scores(plan, at_least)

    sampler = Sampler(sticker, tuple(PROMPTS[:2]), 4, 0, 6, SMALL)

    def go(reference: Reference, speedup: float) -> None:
        Tuner(Noted(sampler, reference, state), seen, Target(speedup=speedup), Budget(0.5)).search()

    with torch.inference_mode():
        reference = Reference.measure(sampler, sampler)
        seen = Observations.measure(sampler, reference, silent)
        go(reference, 1.2)
        first = [json.loads(line) for line in state.read_text().splitlines()]
        assert first[0]["prompts"] == PROMPTS[:2] and {line["plan"] for line in first[1:]} >= set(drawn) != set()
        drawn.clear()
        go(reference, 1.2)
    assert not {line["plan"] for line in first[1:]} & set(drawn), "nothing is evaluated twice"
    with state.open("a") as file:
        file.write('{"plan": "full full full full", "psn')  # a disk that was full
    for _ in range(2):
        drawn.clear()
        with torch.inference_mode():
            go(reference, 1.2)
        assert not {line["plan"] for line in first[1:]} & set(drawn)
        assert all(json.loads(line) for line in state.read_text().splitlines()), "it is whole again"
    before = state.read_text()
    for line in (
        '{"psnr": [1]}',
        '{"plan": "full", "psnr": "x"}',
        "[]",
        "{",
        '{"plan": "full", "psnr": [NaN]}',
        "[" * 9999,
    ):
        state.write_text(f"{before}{line}\n")
        with pytest.raises(ConfigurationError, match=f"line {before.count(chr(10)) + 1} of the search"):
            read_search(state)
    state.write_text(before)
    with torch.inference_mode(), pytest.raises(ConfigurationError, match="no plan is 900"):
        go(reference, 900)
    assert state.read_text() == before, "what cannot be reached changes no search"
    other = Trials(replace(sampler, prompts=tuple(PROMPTS[:1:-1])), reference, state)
    other.resume(4)
    assert not other.known and len(state.read_text().splitlines()) == 1, "other prompts begin again"


def test_impossible_targets_are_refused(sticker: Any) -> None:
    with pytest.raises(ConfigurationError, match="no plan is 900 times as fast"):
        tune(sticker, PROMPTS, steps=4, speedup=900, seconds=1, **SMALL)
    for options, words in (
        ({"speedup": 2, "min_psnr": 40}, "either"),
        ({"generator": None}, r"tune\(\) draws an image for each prompt, .* says generator itself"),
        ({"computed_steps": (0,)}, "computed_steps must be a whole number"),
        ({"speedup": 0.5}, "above 1"),
        ({"speedup": "2"}, "speedup must be a number"),
        ({"min_psnr": 200}, "5 to 80"),
        ({"min_psnr": "a"}, "min_psnr must be a number"),
        ({"speedup": 2, "steps": "a"}, "steps must be a whole number"),
        ({"speedup": 2, "seed": -1}, "seed must be a whole number"),
        ({"speedup": 2, "seconds": "a"}, "seconds must be a number, got 'a'"),
        ({"speedup": 2, "try_steps": 5}, "try_steps must be a list"),
        ({"speedup": 2, "try_steps": ("a",)}, "try_steps must be a whole number"),
        ({"speedup": 2, "batch": 0}, "batch must be a whole number"),
        ({"speedup": 2, "guidance_scale": "x"}, "guidance_scale must be a number"),
        ({"speedup": 2, "prompts": 5}, "prompts must be a text or a list of texts, got 5"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            tune(sticker, **{"prompts": PROMPTS, "steps": 4, **options})
    with pytest.raises(ConfigurationError, match="at least 6 prompts"):
        tune(sticker, PROMPTS[:3], steps=4, speedup=2)


def test_the_command_tunes_and_generate_takes_the_plan(tmp_path: Path, capsys: Any) -> None:
    def cli(*arguments: str) -> int:
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        return int(stop.value.code or 0)

    plan = tmp_path / "fast.json"
    common = ["tune", "-o", str(plan), "--count", "6", "--steps", "5", "--budget", "1", "--device", "cpu", "--quiet"]
    assert cli(*common, "--speedup", "2", "--json") == 0
    measured = json.loads(capsys.readouterr().out)["measured"]
    assert measured["pictures"] == 2 and measured["flop_ratio"] > 1.9
    assert [path.name for path in tmp_path.iterdir()] == ["fast.json"]
    assert cli(*common, "--speedup", "2") == 1
    assert "exists" in capsys.readouterr().err
    assert cli(*common, "--overwrite", "--speedup", "90") == 2
    assert "limits it to" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["fast.json"], "no state of a search is left"
    generate = ["generate", "red apple, 3d style", "--device", "cpu", "--quiet", "--seed", "1", "--reuse", str(plan)]
    assert cli(*generate, "--steps", "5", "-o", str(tmp_path / "a.png")) == 0
    assert cli(*generate, "--steps", "9", "-o", str(tmp_path / "b.png")) == 2
    assert "for 5 steps, this call has 9" in capsys.readouterr().err
    assert not (tmp_path / "b.png").exists()
    assert cli("tune", "-o", str(tmp_path / "x.json"), "--speedup", "2", "--min-psnr", "40") == 2
    assert "either" in capsys.readouterr().err


@pytest.mark.slow
def test_fewer_steps_and_another_scheduler_may_be_tried(sticker: Any) -> None:
    own = sticker.scheduler = DDIMScheduler.from_config(sticker.scheduler.config)
    other = DPMSolverMultistepScheduler.from_config(own.config)
    options = {"steps": 5, "seconds": 0.1, "try_steps": (4,), "try_schedulers": (other,), **SMALL}
    plan = tune(sticker, PROMPTS[:6], speedup=1.5, **options)
    assert sticker.scheduler is own and len(plan.plan) == plan.conditions["steps"] in (4, 5)
    assert plan.conditions["scheduler"] in ("DDIMScheduler", "DPMSolverMultistepScheduler")
    assert plan.search["baseline"] == {"steps": 5, "scheduler": "DDIMScheduler"}
    assert plan.measured["flop_ratio"] > 1.4
