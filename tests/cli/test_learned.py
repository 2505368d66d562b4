"""Learned solvers on the command line: drawn with, recorded, compared, and refused without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import call
from PIL import Image
from solvers import odd

from diffusion_accel import LearnedMultistepScheduler
from diffusion_accel.model_files.names import EMBEDDED
from diffusion_accel.schedulers import solver

PROMPT = "red apple, 3d style"
QUIET = ["--seed", "1", "-q"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A solver for the embedded model, 2 and 4 evaluations."""
    from diffusers import DDIMScheduler

    folder = tmp_path_factory.mktemp("shipped") / "sticker"
    base = DDIMScheduler.from_pretrained(EMBEDDED["sticker"].path, subfolder="scheduler")
    made = odd(base, 2, 4, channels=12)
    made.register_to_config(made_for={"guidance_scale": [1.0, 5.0]})
    made.save_pretrained(folder)
    return folder


@pytest.fixture
def shipped(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "SHIPPED", saved.parent)


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path))


def test_drawn_recorded_and_the_same_by_name_folder_and_configuration(
    shipped: None, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.toml"
    config.write_text('scheduler = "learned"\nsteps = 4\n')
    ways: list[list[Any]] = [
        ["--scheduler", "learned", "--steps", "4"],
        ["--scheduler", saved, "--steps", "4"],
        ["--config", config],
    ]
    for number, way in enumerate(ways):
        code, out, err = call(capsys, "generate", PROMPT, *way, *QUIET, "-o", tmp_path / f"{number}.png")
        assert (code, out, err) == (0, "", "")
    first = pixels(tmp_path / "0.png")
    assert np.array_equal(first, pixels(tmp_path / "1.png")) and np.array_equal(first, pixels(tmp_path / "2.png"))
    image: Any = Image.open(tmp_path / "0.png")
    assert "Steps: 4, Sampler: LearnedMultistep, " in image.text["parameters"]
    _, out, _ = call(capsys, "metadata", tmp_path / "0.png", "--json")
    data = json.loads(out)["diffusion_accel"]
    assert (data["scheduler"], data["settings"]["steps"]) == ("LearnedMultistepScheduler", 4)


def test_without_steps_it_makes_as_many_evaluations_as_it_can(
    shipped: None, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusion_accel import AcceleratedPipeline, load_pipeline

    pipe: Any = load_pipeline("sticker")
    pipe.scheduler = LearnedMultistepScheduler.from_pretrained(saved)
    pipe.save_pretrained(tmp_path / "own")
    pipe = AcceleratedPipeline.from_pretrained("sticker", scheduler="learned")
    pipe.acceleration.save(tmp_path / "recipe.json")
    ways: tuple[list[Any], ...] = (
        ["--scheduler", "learned"],
        ["--scheduler", saved],
        ["--model", tmp_path / "own"],
        ["--recipe", tmp_path / "recipe.json"],
        ["--recipe", tmp_path / "recipe.json", "--scheduler", "learned"],
    )
    for way in ways:
        code, out, err = call(capsys, "generate", PROMPT, *way, "--json", "--seed", "1", "-q", "-o", tmp_path / "a.png")
        assert code == 0, (way, err)
        assert json.loads(out)["report"]["steps"] == 4, way
        (tmp_path / "a.png").unlink()
    code, _, err = call(capsys, "generate", PROMPT, "--model", tmp_path / "own", "--scheduler", "ddim", "--steps", "3",
                        "-q", "-o", tmp_path / "a.png")  # fmt: skip
    assert code == 0, err


def test_a_call_that_was_not_measured_is_said_and_features_act_on_top(
    shipped: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--guidance-scale", "7", "--reuse", "deepcache:2", "--compare"]
    code, _, err = call(
        capsys, "generate", PROMPT, "--scheduler", "learned", "--steps", "4", *QUIET, *more, "-o", tmp_path / "a.png"
    )
    assert code == 0 and "was not measured with guidance_scale 7 (from 1 to 5 it was)" in err
    assert (tmp_path / "a.png").is_file()


def test_an_image_to_start_from(shipped: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (96, 96), (200, 30, 30)).save(tmp_path / "red.png")
    start = ["--image", tmp_path / "red.png", "--scheduler", "learned", "--steps", "4", "--strength"]
    for strength in ("0.5", "1"):
        file = tmp_path / f"{strength}.png"
        code, _, err = call(capsys, "generate", PROMPT, *start, strength, "--json", *QUIET, "-o", file)
        assert (code, err) == (0, "")
    assert not np.array_equal(pixels(tmp_path / "0.5.png"), pixels(tmp_path / "1.png"))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        (["fewer-steps:2,learned", "--steps", "3"], {"fewer-steps 2,learned", "2 steps (one step fewer)"}),
        (
            ["reuse:deepcache:2", "--scheduler", "learned", "--steps", "4"],
            {"reuse deepcache:2", "2 steps (the next that was learnt)"},
        ),
    ],
)
def test_bench_compares_with_it(
    arguments: list[str], rows: set[str], shipped: None, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--count", "1", "--rounds", "1", "--no-converged", "--width", "32", "--height", "32"]
    code, out, err = call(capsys, "bench", *arguments, *few, "--json", "-q")
    assert code == 0, err
    found = {row["name"]: row for row in json.loads(out)["rows"]}
    assert found.keys() >= rows and all(found[name]["psnr_each"] for name in rows)


REFUSED: dict[str, tuple[list[str], str]] = {
    "steps": (["generate", PROMPT, "--scheduler", "learned", "--steps", "3"], "nearest to 3 is 2 or 4"),
    "steps of a line": (["generate", "--prompts-file", "JOBS", "--scheduler", "learned", "--steps", "4"], "to 9 is 4"),
    "evaluate": (["evaluate", "--scheduler", "learned", "--steps", "3"], "nearest to 3 is 2 or 4"),
    "bench": (["bench", "fewer-steps:3,learned"], "nearest to 3 is 2 or 4"),
    "bench's baseline": (["bench", "reuse:hold:2", "--scheduler", "learned", "--steps", "9"], "nearest to 9 is 4"),
    "file": (["generate", PROMPT, "--scheduler", "none.json", "--steps", "4"], "none.json cannot be read"),
    "name": (["generate", PROMPT, "--scheduler", "lerned", "--steps", "4"], "did you mean 'learned'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_a_model_is_loaded(
    case: str, shipped: None, no_model: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, says = REFUSED[case]
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text(json.dumps({"prompt": PROMPT, "steps": 9}) + "\n")
    code, out, err = call(capsys, *[str(jobs) if a == "JOBS" else a for a in arguments])
    assert code == 2 and not out
    assert says in err and len(err.strip().splitlines()) == 1


def test_none_for_other_models(
    shipped: None, no_model: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = call(capsys, "generate", PROMPT, "--model", "owner/model", "--scheduler", "learned", "--steps", "4")
    assert code == 2 and "no learned solver ships for owner/model (models that have one: sticker)" in err
    assert LearnedMultistepScheduler.for_model("sticker").evaluations == [2, 4]
