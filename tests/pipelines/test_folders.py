"""Damaged and hostile model folders: one line with the file and what is wrong, never an image of another model."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from model_folder import TEXT, UNET, draw, edit_json, edit_tensors, refused

from diffusion_accel import ModelLoadError, UnsupportedPipelineError, accelerate
from diffusion_accel.model_files.headers import safetensors_header
from diffusion_accel.pipelines.loading import load_pipeline

DEEP = "[" * 100_000 + "]" * 100_000


def test_a_model_in_the_hubs_cache(whole: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--me--tiny" / "snapshots" / ("a" * 40), tmp_path / "models--me--tiny" / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(f for f in whole.rglob("*") if f.is_file())):
        link = snapshot / file.relative_to(whole)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, blobs / str(number))
        link.symlink_to(os.path.relpath(blobs / str(number), link.parent))
    (tmp_path / "models--me--tiny" / "refs").mkdir()
    (tmp_path / "models--me--tiny" / "refs" / "main").write_text("a" * 40)
    pipe = load_pipeline("me/tiny", cache_dir=str(tmp_path))
    assert pipe.config._name_or_path == "me/tiny"
    assert torch.equal(draw(pipe), draw(load_pipeline(str(snapshot))))
    edit_tensors((snapshot / TEXT).resolve(), lambda t: t.pop("final_layer_norm.bias"))
    with pytest.raises(ModelLoadError, match="final_layer_norm.bias"):
        load_pipeline("me/tiny", cache_dir=str(tmp_path))


CONFIGURATIONS: list[tuple[str, dict[str, Any]]] = [
    *(("vae/config.json", {"scaling_factor": v}) for v in (float("nan"), float("inf"), 0, "0.2", None, [1])),
    ("vae/config.json", {"latents_std": [1.0, 0.0]}),
    *(("vae/config.json", {"scaling_factor": v}) for v in (1e300, 1e-300)),
    ("vae/config.json", {"shift_factor": 1e20}),
    ("vae/config.json", {"norm_num_groups": -1}),
    ("unet/config.json", {"norm_eps": 1e9}),
    ("unet/config.json", {"attention_head_dim": -4}),
    ("unet/config.json", {"quantization_config": 5}),
    ("text_encoder/config.json", {"layer_norm_eps": -1}),
    ("scheduler/scheduler_config.json", {"trained_betas": [0.1]}),
    *(("scheduler/scheduler_config.json", {"steps_offset": v}) for v in (1.0, -1)),
    *(("unet/config.json", {"downsample_padding": v}) for v in (2**31, -1)),
    *(("tokenizer/tokenizer_config.json", {"unk_token": v}) for v in ("CLIPTokenizer", "\u202eabc")),
    ("tokenizer/tokenizer_config.json", {"pad_token": "<|end\x7ftext|>"}),
    ("scheduler/scheduler_config.json", {"sample_max_value": 1e300}),
    *(("scheduler/scheduler_config.json", {"beta_start": v}) for v in (float("nan"), "x", -1, 5)),
    *(("scheduler/scheduler_config.json", {"num_train_timesteps": v}) for v in (0, 10**9, "7")),
    ("scheduler/scheduler_config.json", {"prediction_type": "guess"}),
    ("unet/config.json", {"layers_per_block": 10**7}),
    ("unet/config.json", {"layers_per_block": 9_999}),
    ("unet/config.json", {"block_out_channels": [16, 1 << 30]}),
    ("unet/config.json", {"sample_size": 10**9}),
    ("text_encoder/config.json", {"num_hidden_layers": 10**7}),
    ("text_encoder/config.json", {"max_position_embeddings": 10**9}),
    ("text_encoder/config.json", {"vocab_size": 10**9}),
    ("model_index.json", {"unet": ["subprocess", "Popen"]}),
    ("model_index.json", {"unet": ["model_folder", "write_folder"]}),
    ("model_index.json", {"unet": 5}),
    ("model_index.json", {"unet": ["diffusers"]}),
    ("model_index.json", {"_class_name": 5}),
]


def test_configurations_that_cannot_be_used(whole: Path, folder: Path) -> None:
    for file, change in CONFIGURATIONS:
        edit_json(folder / file, **change)
        refused(folder, str(folder / (file if "index" in file else file.partition("/")[0])))
        shutil.copy(whole / file, folder / file)
    for file in sorted(f.relative_to(whole) for f in whole.rglob("*.json") if f.name != "tokenizer.json"):
        for text in (f'{{"a": {DEEP}}}', "[1]", "{", "\xff\xfe"):
            (folder / file).write_text(text, "latin-1")
            refused(folder, str(folder / file))
        shutil.copy(whole / file, folder / file)
    (folder / "tokenizer" / "tokenizer.json").write_text(f'{{"a": {DEEP}}}')
    refused(folder)


def test_a_bound_that_is_infinite_by_default(folder: Path) -> None:
    """DPM-Solver writes -Infinity into its configuration."""
    pipe = load_pipeline(str(folder))
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(folder)
    assert "-Infinity" in (folder / "scheduler" / "scheduler_config.json").read_text()
    assert load_pipeline(str(folder)).scheduler.config.lambda_min_clipped == -float("inf")


def test_names_that_are_no_components_are_left_alone(whole: Path, folder: Path) -> None:
    edit_json(folder / "model_index.json", **{"a" * 5000: ["diffusers", "AutoencoderKL"], "../whole": ["os", "x"]})
    assert torch.equal(draw(load_pipeline(str(folder))), draw(load_pipeline(str(whole))))


def test_a_recipe_of_routing_that_is_none(folder: Path) -> None:
    for value in (5, [1], {"x": 1}):
        edit_json(folder / "unet" / "config.json", _task_routing=value)
        with pytest.raises(UnsupportedPipelineError, match="not a recipe"):
            accelerate(load_pipeline(str(folder)))


def test_only_regular_files_of_the_folder_are_opened(whole: Path, folder: Path) -> None:
    for name in (UNET, "unet/config.json", "model_index.json", "tokenizer/tokenizer.json"):
        file = folder / name
        for make in (
            lambda f: os.mkfifo(f),
            lambda f: f.mkdir(),
            lambda f: f.symlink_to("/dev/zero"),
            lambda f: f.symlink_to(f.name),
            lambda f: f.symlink_to(whole / f.relative_to(folder)),
        ):
            file.unlink()
            make(file)
            refused(folder, str(file))
            file.rmdir() if file.is_dir() else file.unlink()
            shutil.copy(whole / name, file)
    (folder / "also.safetensors").symlink_to(folder / UNET)
    shutil.move(folder / UNET, folder / "moved.safetensors")
    (folder / UNET).symlink_to("../moved.safetensors")  # a link within the model
    load_pipeline(str(folder))
    shutil.rmtree(folder / "tokenizer")
    refused(folder, "tokenizer")


def test_shards_lie_beside_their_index(folder: Path) -> None:
    edit = {"metadata": {}, "weight_map": {"conv_in.weight": "../vae/diffusion_pytorch_model.safetensors"}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(edit))
    refused(folder, "index.json", "../vae")


def test_damaged_headers(tmp_path: Path) -> None:
    def entry(**changes: Any) -> dict[str, Any]:
        return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}

    def write(header: str, data: int = 8) -> Path:
        file = tmp_path / "x.safetensors"
        file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(data))
        return file

    assert set(safetensors_header(write(json.dumps({"a": entry()})))) == {"a"}
    two = json.dumps({"a": entry()})[:-1] + ', "a": ' + json.dumps(entry()) + "}"
    for header in (
        two,
        json.dumps({"a": entry(dtype="F31")}),
        json.dumps({"a": entry(shape=[3])}),
        json.dumps({"a": entry(shape=[-2])}),
        json.dumps({"a": entry(shape="2")}),
        json.dumps({"a": entry(data_offsets=[0, 2**70])}),
        json.dumps({"a": entry(), "b": entry()}),
        json.dumps({"a": entry(shape=[1], data_offsets=[4, 8])}),
        json.dumps({"a": entry(), "__metadata__": {"x": 1}}),
        json.dumps({"a": [1]}),
        f'{{"a": {DEEP}}}',
    ):
        with pytest.raises(ModelLoadError) as error:
            safetensors_header(write(header))
        assert "\n" not in str(error.value)
