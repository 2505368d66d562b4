"""`make_fast`: what it takes, what it writes, and that it goes on where it was interrupted or killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any
from unittest import mock

import forks
import making_tools
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from making_tools import CALL, STAGES, STEPS, run
from model_folder import draw, write_folder
from transparency_weights import write_weights

from diffusion_accel import AcceleratedPipeline, ConfigurationError, OutputError
from diffusion_accel.errors import DamagedStateError, UnsupportedPipelineError
from diffusion_accel.making import make_fast as module
from diffusion_accel.making.candidates import in_order, left_for_plans
from diffusion_accel.making.report import FastReport
from diffusion_accel.model_files.index_notes import notes_of
from diffusion_accel.pipelines.loading import load_pipeline
from diffusion_accel.recipes.recipe import read_recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_folder(tmp_path_factory.mktemp("model") / "m")
    write_weights(folder / "transparency", load_pipeline(str(folder)).unet)
    return folder


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """What comes of it uninterrupted."""
    folder = tmp_path_factory.mktemp("made") / "fast"
    return folder, run(model, folder)


def contents(folder: Path) -> dict[str, bytes]:
    """All that it wrote but for times."""
    files = {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
    files.pop("report.html")
    report = json.loads(files.pop("report.json"))
    return {**files, "report": repr({k: v for k, v in report.items() if k not in ("seconds", "folder")}).encode()}


def test_the_fastest_that_keeps_it_is_taken_and_draws_so(made: tuple[Path, Any]) -> None:
    folder, report = made
    assert {*report.tried} == {
        "every step",
        "plan slow",
        "plan fast",
        "solver of 2 evaluations",
        "solver of 3 evaluations",
    }
    near = {name: found["psnr_median"] >= 10 for name, found in report.tried.items()}
    assert near[report.taken] and report.size == 0.25
    assert all(not near[n] or f["flop_ratio"] <= report.measured["flop_ratio"] for n, f in report.tried.items())
    assert report.prompts == {"to check": 2, "to choose": 2, "to fit": 8}
    assert not folder.with_name("fast.work").exists()
    recipe = read_recipe(folder)
    assert recipe.call["steps"] in (2, 3, STEPS) and recipe.measured["size"] == 0.25
    assert {"plans.json", "report.html", "report.json", "transparency"} <= {p.name for p in folder.iterdir()}
    page = (folder / "report.html").read_text()
    assert all(name in page for name in report.tried) and "<img" in page
    pipe: Any = AcceleratedPipeline.from_pretrained(str(folder))
    assert recipe.with_model and notes_of(folder)["recipe"], "it is the folder's own"
    options = {**CALL, "num_inference_steps": recipe.call["steps"], "steps": None}
    options.pop("steps")
    wanted = load_pipeline(str(folder))
    assert getattr(pipe.unet, "is_quantized", False) and getattr(wanted.unet, "is_quantized", False)
    image = draw(pipe, **options)
    pipe.acceleration.disable()
    wanted.scheduler = pipe.scheduler
    assert torch.equal(draw(pipe, **options), draw(wanted, **options)) and image.isfinite().all()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("stage", ["plans", "writing"])
def test_an_interrupted_call_goes_on(stage: str, model: Path, made: tuple[Path, Any], tmp_path: Path) -> None:
    def stop(reached: str) -> None:
        if reached == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "fast", stop)
    assert not (tmp_path / "fast").exists()
    stages: list[str] = []
    run(model, tmp_path / "fast", stages.append)
    done = STAGES[: STAGES.index(stage)]
    assert not {*stages} & {*done} - {"judge", "plans" if stage == "judge" else ""}, "nothing is done twice"
    assert contents(tmp_path / "fast") == contents(made[0])
    assert os.listdir(tmp_path) == ["fast"]


@pytest.mark.slow
def test_a_killed_process_leaves_what_is_needed_to_go_on(model: Path, made: tuple[Path, Any], tmp_path: Path) -> None:
    process = forks.start(making_tools.stay, model, tmp_path / "fast", "solvers")
    try:
        limit = time.monotonic() + 120
        while not (tmp_path / "arrived").exists():
            assert process.is_alive() and time.monotonic() < limit
            time.sleep(0.02)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join(60)
    finally:
        process.kill()
    stages: list[str] = []
    run(model, tmp_path / "fast", stages.append)
    assert "quantize" not in stages and "plans" not in stages and "solvers" in stages
    assert contents(tmp_path / "fast") == contents(made[0])


@pytest.mark.slow
def test_another_fidelity_only_chooses_anew(model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigurationError, match=r"min_psnr 80 dB cannot be kept at max_size 0.3: .* it keeps \d+\.\d dB"
    ):
        run(model, tmp_path / "fast", min_psnr=80.0)
    stages: list[str] = []
    report = run(model, tmp_path / "fast", stages.append, min_psnr=5.0)
    assert "quantize" not in stages and report.asked["min_psnr"] == 5.0
    shutil.rmtree(tmp_path / "fast")
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "fast", mock.Mock(side_effect=[None, None, None, KeyboardInterrupt]))
    with pytest.raises(ConfigurationError, match=r"holds a run with other settings .*max size .0\.3 then, 0\.5 now"):
        run(model, tmp_path / "fast", max_size=0.5)
    assert run(model, tmp_path / "fast", max_size=0.5, restart=True).asked["max_size"] == 0.5


@pytest.mark.slow
def test_without_a_size_nothing_is_quantized(model: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    report = run(model, tmp_path / "fast", stages.append, max_size=None, min_psnr=5.0, seconds=10.0)
    assert "quantize" not in stages and "solvers" not in stages and report.size == 1.0
    assert report.taken == "plan fast" and (tmp_path / "fast" / "transparency").is_dir()
    pipe: Any = AcceleratedPipeline.from_pretrained(str(tmp_path / "fast"))
    assert not getattr(pipe.unet, "is_quantized", False) and "reuse" in pipe.acceleration.features
    with pytest.raises(OutputError, match="exists"):
        run(model, tmp_path / "fast")
    assert run(model, tmp_path / "fast", max_size=None, seconds=10.0, overwrite=True).size == 1.0


def test_what_cannot_be_tuned_is_said_and_the_rest_is_made(model: Path, tmp_path: Path) -> None:
    def none(stage: str) -> None:
        if stage in ("plans", "solvers"):
            raise UnsupportedPipelineError(f"no {stage} here")

    report = run(model, tmp_path / "fast", none)
    assert report.taken == "every step" and report.notes == ["no plan: no plans here", "no solver: no solvers here"]
    assert "no solver: no solvers here" in report.text() and read_recipe(tmp_path / "fast").quantize


@pytest.mark.parametrize("error", [DamagedStateError("line 1 of the search is damaged"), OutputError("no space left")])
@pytest.mark.parametrize("damaged", ["plans", "solvers"])
def test_what_says_nothing_of_the_model_ends_the_run(
    damaged: str, error: Exception, model: Path, tmp_path: Path
) -> None:
    def broken(stage: str) -> None:
        if stage == damaged:
            raise error

    with pytest.raises(type(error), match=str(error)):
        run(model, tmp_path / "fast", broken)
    assert os.listdir(tmp_path) == ["fast.work"], "what was done before is kept"


def test_what_is_beside_it_stays(model: Path, tmp_path: Path) -> None:
    (tmp_path / "fast.work").mkdir()
    (tmp_path / "fast.work" / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, words in (("fast", "holds mine, which is of no run"), ("link", "is a link to what is not there")):
        with pytest.raises(OutputError, match=words):
            run(model, tmp_path / name, lambda stage: pytest.fail(stage))
    assert (tmp_path / "fast.work" / "mine").read_text() == "mine"


def test_where_no_family_is_to_be_had_one_plan_is_tuned_for_what_is_left(model: Path, tmp_path: Path) -> None:
    asked = []
    real = module.make_fast

    def spy(*given: Any, **named: Any) -> Any:
        family = module.tune

        def tune(*given: Any, **call: Any) -> Any:
            asked.append(call.get("min_psnr"))
            if "min_psnr" not in call:
                raise ConfigurationError("give a speed-up or a lowest PSNR")
            call.pop("min_psnr")
            return family(*given, **call).members[1]

        with mock.patch.object(module, "tune", tune):
            return real(*given, **named)

    with mock.patch.object(module, "make_fast", spy):
        report = run(model, tmp_path / "fast", min_psnr=20.0, seconds=10.0)
    assert asked[0] is None and asked[1] > 20 and {*report.tried} == {"every step", "plan for what is left"}
    assert "no family of plans: give a speed-up or a lowest PSNR" in report.text()


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({"min_psnr": 4.0}, "min_psnr must be from 5 to 80 dB, got 4"),
        ({"min_psnr": float("nan")}, "min_psnr must be from 5 to 80"),
        ({"max_size": 0.0}, "max_size"),
        ({"max_size": 2.0}, "max_size"),
        ({"seconds": 0.0}, "seconds must be above 0"),
        ({"steps": 3}, "steps must be at least 4"),
        ({"min_psn": 40.0}, "did you mean min_psnr"),
    ],
)
def test_bad_wishes_are_refused(model: Path, tmp_path: Path, wish: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        run(model, tmp_path / "fast", lambda stage: pytest.fail(stage), **wish)
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_what_keeps_less_on_other_prompts_is_passed_by(model: Path, tmp_path: Path) -> None:
    judged = module.Judge.of

    def of(self: Any, candidate: Any, rounds: int) -> Any:
        numbers, images = judged(self, candidate, rounds)
        lucky = rounds and candidate.name == "plan fast"
        return {**numbers, "psnr_median": 9.0 if lucky else 60.0}, images

    with mock.patch.object(module.Judge, "of", of):
        report = run(model, tmp_path / "fast", max_size=None, seconds=10.0)
    assert report.taken == "plan slow" and report.measured["psnr_median"] == 60.0
    assert report.notes == ["not taken: plan fast kept 60.0 dB where it was chosen, 9.0 dB elsewhere"]


NUMBERS = st.fixed_dictionaries({"psnr_median": st.floats(5, 80), "flop_ratio": st.floats(0.5, 9)})


@given(tried=st.dictionaries(st.text(max_size=3), NUMBERS, max_size=6), least=st.floats(5, 80))
def test_the_order_is_that_of_least_work_among_those_that_keep_it(tried: dict[str, Any], least: float) -> None:
    found = in_order(tried, least)
    assert {*found} == {name for name, numbers in tried.items() if numbers["psnr_median"] >= least}
    work = [tried[name]["flop_ratio"] for name in found]
    assert work == sorted(work, reverse=True)


@given(together=st.floats(10, 60), more=st.floats(0.5, 40))
def test_what_is_left_for_plans_adds_up(together: float, more: float) -> None:
    """Squares of errors of both causes are that of the wish."""
    plan = left_for_plans(together, together + more)
    assert 10 ** (-plan / 10) + 10 ** (-(together + more) / 10) == pytest.approx(10 ** (-together / 10), rel=1e-3)


def test_where_nothing_is_near_enough_the_nearest_is_named() -> None:
    kept = {"time_ratio": 1.0, "flop_ratio": 1.0, "psnr_median": 200.0, "psnr_worst_decile": 200.0, "images": 2}
    tried = {"every step": kept, "plan 1": {**kept, "psnr_median": 24.2}, "plan 2": {**kept, "psnr_median": 21.0}}
    report = FastReport("x", {"min_psnr": 30.0}, tried, "every step", kept)
    assert "nothing faster was near enough: the nearest, plan 1, kept 24.2 dB; a longer budget" in report.text()
    assert (
        "1.00 times as fast" in report.text() and "PSNR to the model as it was equal (median), equal (" in report.text()
    )
    assert "<td>equal</td>" in report.page() and "<td>24.2</td>" in report.page() and "200.0" not in report.page()
    assert "nothing faster" not in FastReport("x", {"min_psnr": 30.0}, tried, "plan 1", kept).text()
