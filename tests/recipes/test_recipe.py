"""A recipe's file: what is written is read again, and what is not right is refused in one line, before a model."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_folder import edit_json
from zoo import sd

from diffusion_accel import ConfigurationError, OutputError, Reuse, accelerate
from diffusion_accel.errors import AccelerationError
from diffusion_accel.recipes.recipe import FILE, VERSION, Recipe, read_recipe
from diffusion_accel.registry import feature_class

TUNED = "tuned:ddim-fast"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe") / "whole"
    pipe, _ = sd()
    accelerate(pipe, Reuse(plan=TUNED)).acceleration.save(folder)
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "r"))


def refused(place: Path, *words: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        read_recipe(place)
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


# ---------------------------------------------------------------------- what is written is read
VALUES: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "reuse": {
        "plan": st.sampled_from(["hold:3", "deepcache:3", "steps:full hold full", "auto", TUNED, "tuned:dpm"]),
        "guidance": st.sampled_from(["both", "reuse:2", "interval:0.1-0.9"]),
        "stretch": st.booleans(),
        "batch_decoder": st.booleans(),
        "max_group_mb": st.integers(1, 2**20),
    },
    "encoder_reuse": {
        "schedule": st.lists(st.integers(1, 60), unique=True, max_size=6).map(lambda steps: (0, *sorted(steps)))
        | st.sampled_from(["uniform:3", "paper", "all"]),
        "prior_noise": st.floats(0, 0.1),
        "prior_noise_below": st.floats(0, 1),
    },
    "compiled": {
        "engine": st.sampled_from(["eager", "inductor"]),
        "parts": st.sampled_from(["denoiser", "denoiser+vae", "vae+text"]),
        "on_new_shape": st.sampled_from(["compile", "eager"]),
    },
    "task_routing": {"beta": st.none() | st.floats(0.01, 1), "untrained": st.just(True)},
    "patch_parallel": {
        "ranks": st.integers(0, 1),
        "mode": st.sampled_from(["sync", "displaced"]),
        "warmup": st.integers(1, 9_999),
        "timeout": st.floats(1, 1e5),
    },
}
FEATURES = st.sampled_from(sorted(VALUES)).flatmap(
    lambda name: st.fixed_dictionaries({}, optional=VALUES[name]).map(lambda v: feature_class(name)(**v))
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(feature=FEATURES, off=st.booleans(), steps=st.none() | st.integers(1, 10_000))
def test_settings_come_back_as_they_were(tmp_path: Path, feature: Any, off: bool, steps: int | None) -> None:
    pipe, _ = sd()
    try:
        accelerate(pipe, feature)
    except AccelerationError:
        return  # not for this pipeline
    if off:
        pipe.acceleration.disable()
    call = {} if steps is None else {"steps": steps, "guidance_scale": 3}
    file = pipe.acceleration.save(tmp_path / "a.json", overwrite=True, call=call, measured={"psnr": 50.5})
    found = read_recipe(file)
    assert found.off == ((feature.name,) if off else ()) and found.call == call and found.measured == {"psnr": 50.5}
    here, there = feature.to_dict(), found.features[feature.name].to_dict()
    if str(here.get("plan")).startswith("tuned:"):
        assert Path(there["plan"]).parent == tmp_path / "a.files"
        ours, theirs = feature.source, found.features["reuse"].source  # type: ignore[attr-defined]
        assert theirs.for_steps(ours.made_for) == ours.for_steps(ours.made_for)
        here.pop("plan"), there.pop("plan")
    assert here == there


def test_a_recipe_that_is_there_is_replaced_when_that_is_wanted(folder: Path) -> None:
    pipe, _ = sd()
    accelerate(pipe, Reuse(plan="hold:2"))
    with pytest.raises(OutputError, match=r"acceleration.json exists; .* overwrite=True"):
        pipe.acceleration.save(folder)
    assert read_recipe(folder).features["reuse"] != Reuse(plan="hold:2") and (folder / "acceleration.files").is_dir()
    assert pipe.acceleration.save(folder, overwrite=True) == folder / FILE
    assert read_recipe(folder).features == {"reuse": Reuse(plan="hold:2")}
    assert [p.name for p in folder.iterdir()] == [FILE], "nothing of the old one, nothing unfinished"


def test_what_could_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    pipe, _ = sd()
    save = accelerate(pipe, Reuse(plan="hold:2")).acceleration.save
    (tmp_path / "notes.files").mkdir()
    (tmp_path / "notes.files" / "mine").touch()
    for asked, words in (
        ({"place": None}, "recipe must be the path of a .json file or of a folder, got None"),
        ({"place": 3}, "got 3"),
        ({"place": tmp_path / ("a" * 300 + ".json")}, "too long"),
        ({"call": {"steps": -1}}, "call: steps must be from 1 to 10000, got -1"),
        ({"call": {"guidance_scale": float("nan")}}, "call: guidance_scale must be from 0 to 1000"),
        ({"call": {"step": 3}}, "call: unknown key 'step'; did you mean 'steps'?"),
        ({"measured": {"psnr": object()}}, "measured must be a table of JSON values"),
        ({"place": tmp_path / "notes.json"}, "notes.files exists; choose another name or pass overwrite=True"),
    ):
        with pytest.raises(AccelerationError) as error:
            save(**{"place": tmp_path / "a.json", **asked})
        assert words in str(error.value)
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == [
        "notes.files",
        "notes.files/mine",
    ]


# ---------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "a plan"}, ["is no recipe", "pipe.acceleration.save"]),
        ({"version": VERSION + 1}, [f"version {VERSION + 1}", "a later diffusion-accel reads it"]),
        ({"version": 0}, ["version 0, this program reads version 1"]),
        ({"version": "1"}, ["version '1'"]),
        ({"version": True}, ["version True"]),
        ({"feature": {}}, ["unknown key 'feature'; did you mean 'features'?"]),
        ({"zzzz": 1}, ["unknown key 'zzzz'; the keys are: call, features"]),
        ({"features": []}, ["features must be a table"]),
        ({"features": {"re_use": {}}}, ["unknown key 're_use'; did you mean 'reuse'?"]),
        ({"features": {"reuse": {"plam": "hold:2"}}}, ["unknown key 'plam'", "did you mean 'plan'?"]),
        ({"features": {"reuse": {"max_group_mb": 0}}}, ["max_group_mb must be between 1 and 1048576"]),
        ({"features": {"reuse": "hold:2"}}, ["reuse: settings must be a table"]),
        ({"features": {"reuse": {"guidance": {"file": "x"}}}}, ["guidance must be no table"]),
        ({"features": {"reuse": {"plan": {"files": "x"}}}}, ["plan must be no table"]),
        ({"features": {"reuse": {"plan": "other.json"}}}, ["plan is a file", '{"file": "NAME"}']),
        ({"features": {"reuse": {"plan": "tuned:/etc/x.json:fast"}}}, ["plan is a file"]),
        ({"features": {"transparent": {"weights": "/etc"}}}, ["weights is a file"]),
        ({"features": {"transparent": {"weights": "a/b/c"}}}, ["weights is a file"]),
        ({"features": {"transparent": {"adapter": "x.safetensors"}}}, ["adapter is a file"]),
        ({"off": ["compiled"]}, ["off must be a list of its features"]),
        ({"off": "reuse"}, ["off must be a list"]),
        ({"scheduler": {}}, ["scheduler must be a configuration with a _class_name"]),
        ({"scheduler": {"_class_name": "os.system"}}, ["with a _class_name"]),
        ({"scheduler": {"_class_name": "DDIMScheduler", "num_train_timesteps": 10**9}}, ["num_train_timesteps"]),
        ({"scheduler": {"_class_name": "LearnedMultistepScheduler", "solvers": {"x": 1}}}, ["number of evaluations"]),
        ({"quantize": "folder"}, ["quantize must be"]),
        ({"quantize": {"folder": "."}}, ["quantize must be"]),
        ({"runtime": "fast"}, ["runtime must be one of"]),
        ({"low_memory": 1}, ["low_memory must be one of False, True"]),
        ({"models": {"unet": {"class": 1}}}, ["class must be a short text"]),
        ({"models": {"unet": {"hash": "1"}}}, ["unknown key 'hash'"]),
        ({"call": {"step": 3}}, ["unknown key 'step'; did you mean 'steps'?"]),
        ({"call": {"steps": 2.5}}, ["call: steps must be"]),
        ({"call": {"guidance_scale": float("nan")}}, ["call: guidance_scale must be"]),
        ({"measured": 3}, ["measured must be a table"]),
        ({"made_by": {"torch": 2}}, ["made_by: torch must be a short text"]),
    ],
)
def test_what_is_not_right_is_refused(folder: Path, changes: dict[str, Any], words: list[str]) -> None:
    edit_json(folder / FILE, **changes)
    refused(folder, FILE, *words)


def naming(folder: Path, text: Any) -> None:
    edit_json(folder / FILE, features={"reuse": {"plan": {"file": text}}})


@pytest.mark.parametrize("text", ["../plan.json", "/etc/plan.json", "a/../../plan.json", "~/plan.json", "C:/plan.json"])
def test_files_outside_of_the_folder_are_refused(folder: Path, text: str) -> None:
    (folder.parent / "plan.json").write_text((folder / "acceleration.files" / "reuse-plan.json").read_text())
    naming(folder, text)
    refused(folder, "leaves the recipe's folder")


@pytest.mark.parametrize("text", [1, "", None, "a\\b.json", "a\0.json", ["x"]])
def test_what_is_no_name_of_a_file_is_refused(folder: Path, text: Any) -> None:
    naming(folder, text)
    refused(folder, "a file is a relative path")


def test_links_out_of_the_folder_are_refused(folder: Path, tmp_path: Path) -> None:
    plan = folder / "acceleration.files" / "reuse-plan.json"
    outside = plan.rename(tmp_path / "outside.json")
    refused(folder, "there is no 'acceleration.files/reuse-plan.json' beside it")
    plan.symlink_to(outside)
    refused(folder, "a link that leaves the recipe's folder")
    plan.unlink()
    plan.symlink_to(shutil.move(outside, folder / "other.json"))
    assert read_recipe(folder).features["reuse"]
    plan.unlink()
    edit_json(folder / FILE, quantize={"file": "acceleration.files"}, features={})
    (folder / "acceleration.files" / "deep").symlink_to("/etc")
    refused(folder, "a link that leaves the recipe's folder")
    (folder / FILE).rename(tmp_path / "there.json")
    (folder / FILE).symlink_to(tmp_path / "there.json")
    refused(folder, "a link that leaves its folder")


def test_what_is_no_json_or_too_much_is_refused(folder: Path, tmp_path: Path) -> None:
    refused(tmp_path / "none", "no such file, or folder with an acceleration.json")
    refused(tmp_path, "no such file")
    (folder / FILE).write_text('{"format": ' + "[" * 100 + "]" * 100 + "}")
    refused(folder, "deep in each other")
    (folder / FILE).write_text("{")
    refused(folder, "not valid JSON")
    with (folder / FILE).open("wb") as file:
        file.truncate(2**24 + 1)
    refused(folder, "at most 16777216 are allowed")
    (folder / FILE).unlink()
    os.mkfifo(folder / FILE)
    refused(folder, "not a regular file")


def test_a_damaged_plan_beside_it_is_refused_as_plans_are(folder: Path) -> None:
    edit_json(folder / "acceleration.files" / "reuse-plan.json", version=2)
    refused(folder, FILE, "a plan of version 2, this program reads version 1")


def test_every_field_is_written(written: Path) -> None:
    known = {f.name for f in dataclasses.fields(Recipe)} - {"path"}
    assert {*json.loads((written / FILE).read_text())} <= known | {"format", "version"}
