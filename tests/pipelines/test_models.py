"""Which model is meant, and what is refused before anything heavy is imported."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

from diffusion_accel import AcceleratedPipeline, ConfigurationError, ModelLoadError
from diffusion_accel.model_files.names import EMBEDDED, check_weights, find_model, safetensors_header
from diffusion_accel.pipelines.loading import load_pipeline


def test_embedded_models_are_whole_and_small() -> None:
    for name, model in EMBEDDED.items():
        source = find_model(name)
        assert source.kind == "embedded" and source.defaults == model.settings
        assert 0 < model.size <= 40_000_000
        assert (model.path / "README.md").is_file(), "the model card ships with the model"
        for file in model.path.rglob("*.safetensors"):
            check_weights(file)


RECOMMENDED = {
    "sticker": {"width": 96, "height": 96, "steps": 20, "guidance_scale": 3.0, "scheduler": "dpm++"},
    "sticker-dit": {"width": 96, "height": 96, "steps": 28, "guidance_scale": 3.0},
}


def test_a_saved_model_recommends_what_the_embedded_one_does(tmp_path: Path, capfd: Any) -> None:
    for name, settings in RECOMMENDED.items():
        assert EMBEDDED[name].settings == settings == find_model(name).defaults
    load_pipeline("sticker").save_pretrained(tmp_path / "plain")  # diffusers' own, which knows nothing of it
    pipe: Any = AcceleratedPipeline.from_pretrained("sticker", scheduler="euler")
    AcceleratedPipeline.from_pipe(pipe, task="image-to-image").save_pretrained(tmp_path / "start")
    load_pipeline(str(tmp_path / "plain")).save_pretrained(tmp_path / "again")
    for folder in ("plain", "again"):
        assert find_model(str(tmp_path / folder)).defaults == RECOMMENDED["sticker"]
    chosen = {key: value for key, value in RECOMMENDED["sticker"].items() if key != "scheduler"}
    assert find_model(str(tmp_path / "start")).defaults == chosen, "somebody set another scheduler"
    assert (tmp_path / "start" / "transparency" / "adapter.safetensors").is_file()
    capfd.readouterr()
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "start", local_files_only=True)
    assert type(loaded.scheduler).__name__ == "EulerDiscreteScheduler"
    assert "_diffusion_accel" not in capfd.readouterr().err, "plain diffusers passes over it"


@pytest.mark.parametrize(
    ("notes", "says"),
    [
        (5, "must be a table"),
        ({"recommended": 5}, "must be a table"),
        ({"recommended": {"steps": 0}}, "steps must be from 1 to 10000, got 0"),
        ({"recommended": {"steps": True}}, "steps must be from 1"),
        ({"recommended": {"width": 96.5}}, "width must be from 8"),
        ({"recommended": {"scheduler": "../solver.json"}}, "scheduler must be the name of one"),
        ({"recommended": {"scheduler": 3}}, "scheduler must be the name of one"),
    ],
)
def test_recommendations_that_nobody_can_follow(notes: Any, says: str, tmp_path: Path) -> None:
    index = {"_class_name": "StableDiffusionPipeline", "_diffusion_accel": notes}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelLoadError, match=says):
        find_model(str(tmp_path))
    index["_diffusion_accel"] = {"recommended": {"of_tomorrow": 5, "steps": 8, "guidance_scale": 2}, "new": []}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert find_model(str(tmp_path)).defaults == {"steps": 8, "guidance_scale": 2.0}


def test_kinds(tmp_path: Path) -> None:
    assert find_model("owner/name").kind == "hub"
    weights = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(3)}, weights)
    assert find_model(str(weights)).kind == "file"
    assert set(safetensors_header(weights)) - {"__metadata__"} == {"a"}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    assert find_model(str(tmp_path)).kind == "folder"


@pytest.mark.parametrize("name", ["stiker", "nonsense", "a b", ""])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ConfigurationError, match="unknown model"):
        find_model(name)
    if name == "stiker":
        with pytest.raises(ConfigurationError, match="did you mean 'sticker'"):
            find_model(name)


@pytest.mark.parametrize("name", ["./missing", "/missing/folder", "missing.safetensors", "a/b/c/d"])
def test_missing_files(name: str) -> None:
    with pytest.raises(ModelLoadError, match="no such model"):
        find_model(name)


def test_pickles_need_permission(tmp_path: Path) -> None:
    pickle = tmp_path / "model.ckpt"
    pickle.write_bytes(b"\x80\x04.")
    with pytest.raises(ModelLoadError, match="pickle"):
        find_model(str(pickle))
    assert find_model(str(pickle), allow_pickle=True).kind == "file"
    folder = tmp_path / "folder"
    (folder / "unet").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "X", "unet": ["diffusers", "Y"]}))
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelLoadError, match="pickle"):
        find_model(str(folder))
    assert find_model(str(folder), allow_pickle=True).kind == "folder"


def test_folders_that_are_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="model_index.json"):
        find_model(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ModelLoadError, match="not valid JSON"):
        find_model(str(tmp_path))
    (tmp_path / "model_index.json").write_text("[]")
    with pytest.raises(ModelLoadError, match="_class_name"):
        find_model(str(tmp_path))


def test_broken_safetensors(tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    save_file({"a": torch.zeros(100), "b": torch.ones(7)}, good)
    data = good.read_bytes()
    cases = {
        "empty": b"",
        "short": data[:5],
        "header": data[:30],
        "cut": data[:-9],
        "longer": data + b"\0\0",
        "noise": bytes(range(256)) * 4,
        "huge": struct.pack("<Q", 2**60) + data[8:],
        "list": struct.pack("<Q", 2) + b"[]",
    }
    for name, content in cases.items():
        bad = tmp_path / f"{name}.safetensors"
        bad.write_bytes(content)
        with pytest.raises(ModelLoadError) as error:
            check_weights(bad)
        assert "\n" not in str(error.value) and str(bad) in str(error.value)


def test_a_component_that_points_outside_its_folder_is_not_followed(tmp_path: Path) -> None:
    folder, outside = tmp_path / "model", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (outside / "broken.safetensors").write_bytes(b"x")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "X", "../outside": ["diffusers", "Y"]}))
    assert find_model(str(folder)).kind == "folder"


@pytest.mark.parametrize("model", [5, None, [], ["sticker"]])
def test_a_model_is_a_text(model: Any) -> None:
    with pytest.raises(ConfigurationError, match="a model is a name, a folder, a file or a hub id, got "):
        find_model(model)
