"""The tuner: its files, its searches on the embedded model, and the command from end to end."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from zoo import ZOO, run, sd

from diffusion_accel import AccelerationError, ConfigurationError, Reuse, accelerate
from diffusion_accel.cli.main import main
from diffusion_accel.denoisers import fingerprint
from diffusion_accel.measure.sampler import Sampler
from diffusion_accel.model_files.names import EMBEDDED
from diffusion_accel.progress import silent
from diffusion_accel.reuse.conditions import conditions
from diffusion_accel.reuse.plan import Plan, Step
from diffusion_accel.reuse.plan_file import TunedPlan
from diffusion_accel.tuning import measure as calibration
from diffusion_accel.tuning.budget import Budget
from diffusion_accel.tuning.fit_weights import fit_weights, with_weights
from diffusion_accel.tuning.measure import Observations, Reference, measure_costs
from diffusion_accel.tuning.search import Rule, best_plans
from diffusion_accel.tuning.state import read_search
from diffusion_accel.tuning.target import Target
from diffusion_accel.tuning.trials import Trials
from diffusion_accel.tuning.tuner import Tuner, tune

TINY = sd()[0]


# ---------------------------------------------------------------------- files
def tuned(pipe: Any, tokens: str) -> TunedPlan:
    plan = Plan.parse(tokens)
    return TunedPlan(plan, conditions(pipe, len(plan)))


def test_a_plan_file_survives_and_says_where_it_does_not_hold(tmp_path: Path, caplog: Any) -> None:
    pipe, _ = sd()
    file = tmp_path / "plan.json"
    made = tuned(pipe, "full hold full hold@1")
    made.save(file)
    assert TunedPlan.load(str(file)) == made
    with pytest.raises(ConfigurationError, match="exists"):
        made.save(file)
    assert list(tmp_path.iterdir()) == [file]
    accelerate(pipe, Reuse(plan=str(file)))
    with caplog.at_level(logging.WARNING, "diffusion_accel"):
        made.check(pipe)
        assert not caplog.records
        pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
        made.check(pipe)
        assert "another scheduler" in caplog.text
        caplog.clear()
        next(iter(pipe.unet.parameters())).data.mul_(2)
        made.check(pipe)
        assert "other weights" in caplog.text
    with pytest.raises(AccelerationError, match="tuned for UNet2DConditionModel, this pipeline has UNet2DModel"):
        accelerate(ZOO["unet2d"]()[0], Reuse(plan=str(file)))


def test_the_fingerprint_follows_the_weights_not_the_dtype() -> None:
    pipe, _ = sd()
    first = fingerprint(pipe.unet)
    assert fingerprint(pipe.unet.to(torch.bfloat16)) == first
    pipe.unet.conv_out.weight.data[0, 0, 0, 0] += 1
    assert fingerprint(pipe.unet) != first


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a reuse plan"),
        ('{"format": "diffusion-accel reuse plan", "version": 99}', "version 99"),
        ('{"format": "diffusion-accel reuse plan", "version": 1, "plan": "full"}', "list of steps"),
        ('{"format": "diffusion-accel reuse plan", "version": 1, "plan": ["hold"], "conditions": {}}', "first step"),
    ],
)
def test_broken_plan_files_are_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(text)
    with pytest.raises(ConfigurationError, match=words):
        accelerate(sd()[0], Reuse(plan=str(file)))


WHOLE = {
    "format": "diffusion-accel reuse plan",
    "version": 1,
    "plan": ["full", "hold=0.9", "full", "hold@1"],
    "conditions": {
        "denoiser": "UNet2DConditionModel",
        "weights": "x",
        "scheduler": "y",
        "scheduler_config": {},
        "steps": 4,
    },
    "measured": {"psnr_median": 50.0},
    "search": {},
}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just("hold=" + "9" * 400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(key=st.sampled_from([*WHOLE, *WHOLE["conditions"]]), value=VALUES, cut=st.none() | st.integers(0, 300))
def test_no_content_of_a_plan_file_raises_anything_else(tmp_path_factory: Any, key: str, value: Any, cut: Any) -> None:
    changed = {**WHOLE, key: value} if key in WHOLE else {**WHOLE, "conditions": {**WHOLE["conditions"], key: value}}
    file = tmp_path_factory.getbasetemp() / "mutant.json"
    file.write_text(json.dumps(changed)[:cut])
    with contextlib.suppress(AccelerationError):
        feature = Reuse(plan=str(file))
        if feature.supports(TINY) is None:
            feature.source.check(TINY)


def test_deep_and_huge_plan_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    for text in ("[" * 10**5, json.dumps({**WHOLE, "measured": {"x": 1}}).replace("1}", "9" * 5000 + "}"), "\0", "NaN"):
        file.write_text(text)
        with pytest.raises(ConfigurationError) as refused:
            Reuse(plan=str(file))
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 500


def test_weights_that_were_changed_in_place_are_noticed(tmp_path: Path, caplog: Any) -> None:
    """Fusing a LoRA changes the parameters' values and nothing else."""
    from peft import LoraConfig

    pipe, call = sd()
    file = tmp_path / "plan.json"
    tuned(pipe, "full hold full hold").save(file)
    accelerate(pipe, Reuse(plan=str(file)))
    run(pipe, call, steps=4)
    assert "other weights" not in caplog.text
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    pipe.unet.fuse_lora()
    pipe.unet.unload_lora()
    caplog.clear()
    run(pipe, call, steps=4)
    assert "other weights" in caplog.text and "make one with diffusion-accel tune" in caplog.text


def test_the_warning_names_the_plans_that_fit(sticker: Any, caplog: Any) -> None:
    sticker.scheduler = DDIMScheduler.from_config(sticker.scheduler.config)
    TunedPlan.load("tuned:balanced").check(sticker)
    assert "another scheduler ('DPMSolverMultistepScheduler', here 'DDIMScheduler')" in caplog.text
    assert "plans for what is here: tuned:ddim-balanced, tuned:ddim-fast, tuned:ddim-quality" in caplog.text
    caplog.clear()
    TunedPlan.load("tuned:ddim-balanced").check(sticker)
    assert not caplog.text


# ---------------------------------------------------------------------- end to end
@pytest.fixture(scope="module")
def sticker() -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(EMBEDDED["sticker"].path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PROMPTS = [f"{name}, {style} style" for name in ("red apple", "panda", "rocket") for style in ("3d", "flat")]


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

    monkeypatch.setattr("diffusion_accel.tuning.measure.seconds_of", seconds_of)


CALL = {"guidance_scale": 3.0, "height": 96, "width": 96}
SMALL = CALL | {"height": 48, "width": 48}  # where it does not matter what the images look like


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


def test_a_search_that_was_stopped_goes_on(sticker: Any, tmp_path: Path) -> None:
    state, drawn = tmp_path / "search", []

    class Noted(Trials):
        def scores(self, plan: Plan, at_least: float | None = None) -> list[float]:
            if str(plan) not in self.known:
                drawn.append(str(plan))
            return super().scores(plan, at_least)

    sampler = Sampler(sticker, tuple(PROMPTS[:4]), 4, 0, 6, SMALL)

    def go(reference: Reference, speedup: float) -> None:
        seen = Observations.measure(sampler, reference, silent)
        Tuner(Noted(sampler, reference, state), seen, Target(speedup=speedup), Budget(1.0)).search()

    with torch.inference_mode():
        reference = Reference.measure(sampler, sampler)
        go(reference, 1.2)
        first = [json.loads(line) for line in state.read_text().splitlines()]
        assert first[0]["prompts"] == PROMPTS[:4] and {line["plan"] for line in first[1:]} >= set(drawn) != set()
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
    for options, words in (({}, "either"), ({"speedup": 0.5}, "above 1"), ({"min_psnr": 200}, "5 to 80")):
        with pytest.raises(ConfigurationError, match=words):
            tune(sticker, PROMPTS, steps=4, **options)
    with pytest.raises(ConfigurationError, match="at least 6 prompts"):
        tune(sticker, PROMPTS[:3], steps=4, speedup=2)


def test_the_command_tunes_and_generate_takes_the_plan(tmp_path: Path, capsys: Any) -> None:
    def cli(*arguments: str) -> int:
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        return int(stop.value.code or 0)

    plan = tmp_path / "fast.json"
    common = ["tune", "-o", str(plan), "--count", "6", "--steps", "5", "--budget", "2", "--device", "cpu", "--quiet"]
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


def test_fewer_steps_and_another_scheduler_may_be_tried(sticker: Any) -> None:
    own = sticker.scheduler = DDIMScheduler.from_config(sticker.scheduler.config)
    other = DPMSolverMultistepScheduler.from_config(own.config)
    options = {"steps": 5, "seconds": 2.0, "try_steps": (4,), "try_schedulers": (other,), **SMALL}
    plan = tune(sticker, PROMPTS, speedup=1.5, **options)
    assert sticker.scheduler is own and len(plan.plan) == plan.conditions["steps"] in (4, 5)
    assert plan.conditions["scheduler"] in ("DDIMScheduler", "DPMSolverMultistepScheduler")
    assert plan.search["baseline"] == {"steps": 5, "scheduler": "DDIMScheduler"}
    assert plan.measured["flop_ratio"] > 1.4
