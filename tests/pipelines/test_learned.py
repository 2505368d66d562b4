"""Learned solvers by name: what is taken, and what is refused before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from solvers import odd
from zoo import ddim, run, sd

from diffusion_accel import AcceleratedPipeline, ConfigurationError, LearnedMultistepScheduler
from diffusion_accel.model_files.names import EMBEDDED, find_model
from diffusion_accel.pipelines.loading import load_pipeline
from diffusion_accel.pipelines.schedulers import check_scheduler, check_steps, not_learnt_here, scheduler_for
from diffusion_accel.schedulers import solver


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved solver for 4 and 6 evaluations."""
    odd(ddim(), 4, 6, channels=4).save_pretrained(tmp_path / "solver")
    return tmp_path / "solver"


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, as if one shipped for the embedded model."""
    monkeypatch.setattr(solver, "SHIPPED", tmp_path / "shipped")
    base = load_pipeline("sticker").scheduler
    odd(base, 4, 6, channels=base.config.get("channels", 1)).save_pretrained(tmp_path / "shipped" / "sticker")
    return tmp_path / "shipped" / "sticker"


def test_a_saved_solver_is_a_scheduler_by_its_folder_or_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call = sd()
    images = []
    monkeypatch.chdir(saved.parent)
    for name in (str(saved), f"{saved}/scheduler_config.json", "solver"):
        check_scheduler(name)
        pipe.scheduler = made = scheduler_for(pipe, name)
        assert isinstance(made, LearnedMultistepScheduler) and made.evaluations == [4, 6]
        assert made.config.steps_offset == 1, "the rest of the pipeline's own"
        images.append(run(pipe, call, 4))
        assert not_learnt_here(pipe, 6) is None and "nearest to 7 is 6" in str(not_learnt_here(pipe, 7))
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    assert type(scheduler_for(pipe, "ddim")).__name__ == "DDIMScheduler", "and back"
    assert not_learnt_here(sd()[0], 7) is None


def test_what_does_not_fit_the_model_is_one_line(saved: Path) -> None:
    pipe, _ = sd()
    for scheduler, says in (
        (ddim(prediction_type="v_prediction"), "predicts epsilon, DDIMScheduler is for v_prediction"),
        (ddim(beta_end=0.012), r"its noise schedule \(betas\) is not that of DDIMScheduler"),
    ):
        pipe.scheduler = scheduler
        with pytest.raises(ConfigurationError, match=f"does not fit this model: .*{says}"):
            scheduler_for(pipe, str(saved))
    with pytest.raises(ConfigurationError, match=r"no learned solver ships for .* give the folder or file"):
        scheduler_for(pipe, "learned")


def test_before_a_model_is_loaded(saved: Path, tmp_path: Path) -> None:
    source = find_model("sticker")
    check_steps(str(saved), source, 6)
    check_steps("ddim", source, 7)
    check_steps(None, source, 7)
    with pytest.raises(ConfigurationError, match=r"with steps 5: learnt for 4 and 6 .* nearest to 5 is 4 or 6"):
        check_steps(str(saved), source, 5)
    empty = tmp_path / "empty"
    LearnedMultistepScheduler().save_pretrained(empty)
    ddim().save_pretrained(tmp_path / "other")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    for name, says in (
        (str(empty), "holds no solver"),
        (str(tmp_path / "other"), "is no learned solver: its _class_name is 'DDIMScheduler'"),
        (str(broken), "is not valid JSON"),
        (str(tmp_path / "none.json"), "cannot be read"),
        (str(tmp_path / "none" / "there"), "cannot be read"),
    ):
        with pytest.raises(ConfigurationError, match=says) as error:
            check_steps(name, source, 4)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigurationError, match="did you mean 'learned'"):
        check_scheduler("lerned")


def test_damaged_solvers_name_their_file(saved: Path) -> None:
    file = saved / "scheduler_config.json"
    values = json.loads(file.read_text())
    for change, says in (
        ({"solvers": {"4": {"timesteps": [1], "steps": ["1;1"]}}}, "the solver for 4 evaluations: timesteps must be 4"),
        ({"solvers": []}, "holds no solver"),
        ({"solvers": [1]}, "solvers must be a table"),
        ({"num_train_timesteps": "x"}, "num_train_timesteps must be a whole number"),
    ):
        file.write_text(json.dumps({**values, **change}))
        with pytest.raises(ConfigurationError, match=says) as error:
            check_steps(str(file), find_model("sticker"), 4)
        assert str(file) in str(error.value)


def test_a_folder_that_was_saved_with_one_is_known(saved: Path, tmp_path: Path) -> None:
    pipe: Any = load_pipeline("sticker")
    pipe.scheduler = odd(pipe.scheduler, 4, 6)
    pipe.save_pretrained(tmp_path / "m")
    source = find_model(str(tmp_path / "m"))
    check_steps(None, source, 6)
    check_steps("ddim", source, 7)
    with pytest.raises(ConfigurationError, match="nearest to 50 is 6"):
        check_steps(None, source, 50)


def test_none_ships_without_its_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(solver, "SHIPPED", tmp_path)
    with pytest.raises(ConfigurationError, match="no learned solver ships for sticker; models that have one: none"):
        LearnedMultistepScheduler.for_model("sticker")
    with pytest.raises(ConfigurationError, match=r"no learned solver ships for sticker \(models that have one: none\)"):
        check_steps("learned", find_model("sticker"), None)
    for name, says in (("stiker", "did you mean sticker"), (5, "unknown model 5"), ("x", "embedded models: sticker")):
        with pytest.raises(ConfigurationError, match=says):
            LearnedMultistepScheduler.for_model(name)  # type: ignore[arg-type]


def test_one_that_ships_is_found_by_the_model(shipped: Path) -> None:
    assert LearnedMultistepScheduler.for_model("sticker").evaluations == [4, 6]
    source = find_model("sticker")
    check_steps("learned", source, 4)
    with pytest.raises(ConfigurationError, match="scheduler learned with steps 20: .* nearest to 20 is 6"):
        check_steps("learned", source, 20)
    pipe: Any = AcceleratedPipeline.from_pretrained("sticker", scheduler="learned")
    assert pipe.scheduler.evaluations == [4, 6]
    call = {"prompt": EMBEDDED["sticker"].example, "height": 32, "width": 32, "output_type": "latent"}
    first = run(pipe, call, 4)
    pipe.scheduler = LearnedMultistepScheduler.for_model("sticker")
    assert torch.equal(run(pipe, call, 4), first)
