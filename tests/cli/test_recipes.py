"""Recipes on the command line: drawn as they say, under what is given, and refused before a model is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command import call
from model_folder import edit_json, write_folder
from PIL import Image

from diffusion_accel import AcceleratedPipeline
from diffusion_accel.cli.settings import merge
from diffusion_accel.recipes.recipe import FILE

DRAW = ("generate", "red apple", "--seed", 3, "--height", 16, "--width", 16, "--quiet")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An accelerated model."""
    place = tmp_path_factory.mktemp("model")
    write_folder(place / "plain")
    pipe: Any = AcceleratedPipeline.from_pretrained(str(place / "plain"), reuse="hold:3", scheduler="euler")
    pipe.save_pretrained(place / "fast")
    pipe.acceleration.save(place / "recipe.json", call={"steps": 4, "guidance_scale": 2})
    return place


def image_and_features(capsys: Any, output: Path, *options: Any) -> tuple[bytes, dict[str, Any]]:
    code, _, err = call(capsys, *DRAW, *options, "-o", output)
    assert code == 0, err
    with Image.open(output) as image:
        values = json.loads(image.info["diffusion_accel"])
        return image.tobytes(), {key: values[key] for key in ("features", "scheduler", "settings")}


def test_a_folder_draws_as_its_recipe_says(folder: Path, tmp_path: Path, capsys: Any) -> None:
    plain, fast, recipe = folder / "plain", folder / "fast", folder / "recipe.json"
    named = ("--scheduler", "euler", "--steps", 4)
    wanted, values = image_and_features(capsys, tmp_path / "1.png", "-m", plain, "--reuse", "hold:3", *named)
    for number, options in enumerate(
        (
            ("-m", fast, "--steps", 4),
            ("-m", plain, "--recipe", fast, "--steps", 4),
            ("-m", plain, "--recipe", recipe, "--guidance-scale", 7.5),
            ("-m", fast, "--recipe", "on", *named),
        )
    ):
        image, found = image_and_features(capsys, tmp_path / f"a{number}.png", *options)
        assert image == wanted and found["features"] == values["features"]
        assert found["scheduler"] == "EulerDiscreteScheduler" and found["settings"]["steps"] == 4
    whole, _ = image_and_features(capsys, tmp_path / "2.png", "-m", plain, *named)
    for number, options in enumerate((("--recipe", "off"), ("--reuse", "off"))):
        image, found = image_and_features(capsys, tmp_path / f"b{number}.png", "-m", fast, *options, *named)
        assert image == whole and not found["features"]


def settings(**flags: Any) -> Any:
    return merge(flags, {}, restoring=True)[0]


def test_flags_win_over_a_recipe_and_a_recipe_over_recommendations(folder: Path, tmp_path: Path) -> None:
    model, recipe = str(folder / "plain"), str(folder / "recipe.json")
    found = settings(model=model, recipe=recipe)
    assert found.steps == 4 and found.guidance_scale == 2 and found.scheduler is None
    assert found.scheduler_name == "EulerDiscreteScheduler" and found.features["reuse"].plan == "hold:3"
    found = settings(model=model, recipe=recipe, steps=9, scheduler="ddim", encoder_reuse="on")
    assert found.steps == 9 and found.scheduler_name == "ddim" and [*found.features] == ["encoder_reuse"]
    found = settings(recipe=recipe)
    assert found.scheduler is None and found.width == 96, "in place of the embedded model's own"
    assert not settings(model=str(folder / "fast"), recipe="off").features
    assert merge({"model": str(folder / "fast")}, {})[0].features == {}, "commands that measure models draw without"
    assert merge({"model": model}, {"recipe": recipe}, restoring=True)[0].features, "also in a configuration file"


def test_what_cannot_be_restored_is_refused_before_a_model(
    folder: Path, tmp_path: Path, no_model: None, capsys: Any
) -> None:
    fast = Path(shutil.copytree(folder / "fast", tmp_path / "fast"))
    for options, says in (
        (("--recipe", tmp_path / "none.json"), "no such file"),
        (("-m", folder / "plain", "--recipe", "on"), "has no acceleration.json"),
        (("-m", fast, "--recipe", ""), "recipe is empty"),
    ):
        code, _, err = call(capsys, *DRAW, *options)
        assert code == 2 and says in err and err.startswith("error: ") and err.count("\n") == 1, err
    for changes, says in (
        ({"version": 9}, "a recipe of version 9"),
        ({"featurs": {}}, "did you mean 'features'?"),
        ({"features": {"reuse": {"plan": {"file": "../x.json"}}}}, "leaves the recipe's folder"),
        ({"quantize": {"file": "vae"}}, "holds no checkpoint"),
    ):
        shutil.copy(folder / "fast" / FILE, fast / FILE)
        edit_json(fast / FILE, **changes)
        code, _, err = call(capsys, *DRAW, "-m", fast)
        assert code in (1, 2) and says in err and err.count("\n") == 1, err


def test_a_learned_solver_says_its_steps_first(folder: Path, tmp_path: Path, no_model: None, capsys: Any) -> None:
    from solvers import odd
    from zoo import ddim

    fast = Path(shutil.copytree(folder / "fast", tmp_path / "fast"))
    edit_json(fast / FILE, scheduler=json.loads(odd(ddim(), 4, 6).to_json_string()), features={})
    code, _, err = call(capsys, *DRAW, "-m", fast, "--steps", 5)
    assert code == 2 and "with --steps 5: learnt for 4 and 6 evaluations; the nearest to 5 is 4 or 6" in err
