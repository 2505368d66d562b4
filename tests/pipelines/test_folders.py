"""Damaged and hostile model folders: one line with the file and what is wrong, never an image of another model."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DPMSolverMultistepScheduler, UNet2DConditionModel
from model_folder import edit_json, edit_tensors, write_folder
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, T5Config, T5EncoderModel
from zoo import rand, unet

from diffusion_accel import ConfigurationError, ModelLoadError, UnsupportedPipelineError, accelerate
from diffusion_accel.errors import CallStateError
from diffusion_accel.model_files.headers import safetensors_header
from diffusion_accel.pipelines.components import bounded, check_keys
from diffusion_accel.pipelines.loading import load_controlnet, load_lora, load_pipeline

UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model") / "whole")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "m"))


def draw(pipe: Any, **changes: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "output_type": "pt", **changes}
    return pipe("red apple", generator=torch.Generator().manual_seed(0), **settings).images


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(ModelLoadError) as error:
        load_pipeline(str(folder))
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


@pytest.mark.parametrize("file", [UNET, VAE, TEXT])
def test_every_tensor_is_there_and_of_its_shape_and_finite(whole: Path, folder: Path, file: str) -> None:
    key = next(k for k in sorted(load_file(folder / file)) if k.endswith("norm_out.bias") or "fc1.bias" in k)
    part = str(folder / file.partition("/")[0])
    cases: list[tuple[Callable[[dict[str, torch.Tensor]], Any], tuple[str, ...]]] = [
        (lambda t: t.pop(key), (part, "have no", key)),
        (lambda t: t.update({key: torch.zeros(3, 5)}), (part, key, "[3, 5]")),
        (lambda t: t.update({key: t[key].long()}), (part, key, "int64")),
        (lambda t: t[key].view(-1)[:1].fill_(torch.inf), (key, "not finite")),
        (lambda t: t[key].fill_(torch.nan), (key, "not finite")),
    ]
    for change, words in cases:
        edit_tensors(folder / file, change)
        refused(folder, *words)
        shutil.copy(whole / file, folder / file)


def test_names_of_older_versions_ties_variants_and_shards_are_known(whole: Path, folder: Path) -> None:
    expected = draw(load_pipeline(str(whole)))
    edit_tensors(folder / TEXT, lambda t: [t.update({f"text_model.{k}": t.pop(k)}) for k in list(t)])
    edit_tensors(folder / TEXT, lambda t: t.update({"text_model.embeddings.position_ids": torch.arange(8)[None]}))
    assert torch.equal(draw(load_pipeline(str(folder))), expected)
    loaded = load_pipeline(str(whole))
    loaded.save_pretrained(folder, variant="fp16", max_shard_size="40KB")
    for file in (folder / UNET, folder / VAE, folder / TEXT):
        file.unlink()
    assert len(list((folder / "unet").glob("*fp16*of*.safetensors"))) > 1
    assert torch.equal(draw(load_pipeline(str(folder), variant="fp16")), expected)
    shard = sorted((folder / "unet").glob("*fp16*of*.safetensors"))[0]
    edit_tensors(shard, lambda t: t.pop(sorted(t)[0]))  # the index still names it
    with pytest.raises(ModelLoadError, match="its weights have no"):
        load_pipeline(str(folder), variant="fp16")


def test_pickles_and_empty_notes_of_a_quantizer_are_compared_as_well(whole: Path, folder: Path) -> None:
    expected = draw(load_pipeline(str(whole)))
    for file, name in ((TEXT, "pytorch_model.bin"), (UNET, "diffusion_pytorch_model.bin")):
        tensors = load_file(folder / file)
        (folder / file).unlink()
        pickle = (folder / file).with_name(name)
        torch.save(tensors, pickle)
        assert torch.equal(draw(load_pipeline(str(folder), allow_pickle=True)), expected)
        torch.save(
            {k: v for k, v in tensors.items() if not k.endswith("norm_out.bias") and "fc1.bias" not in k}, pickle
        )
        with pytest.raises(ModelLoadError, match="its weights have no"):
            load_pipeline(str(folder), allow_pickle=True)
        pickle.unlink()
        save_file(tensors, folder / file, {"format": "pt"})
    edit_json(folder / "text_encoder/config.json", quantization_config=None)
    edit_tensors(folder / TEXT, lambda t: t.pop("final_layer_norm.bias"))
    refused(folder, "final_layer_norm.bias")


def test_a_configuration_of_fewer_layers_than_there_are_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_pipeline(str(folder))
    assert not caplog.messages
    edit_json(folder / "text_encoder/config.json", num_hidden_layers=0)
    edit_tensors(folder / UNET, lambda t: t.update(left_over=torch.ones(2)))
    load_pipeline(str(folder))
    assert [
        part
        for m in caplog.messages
        for part in ("16 tensors that CLIPTextModel", "1 tensors that UNet2DConditionModel")
        if f" {part} does not use" in m
    ] == ["16 tensors that CLIPTextModel", "1 tensors that UNet2DConditionModel"]


def test_attention_weights_of_old_autoencoders(folder: Path) -> None:
    """diffusers renames query, key and value; the comparison must do so as well."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if ".mid_block.attentions." in n]:
            for new, was in old.items():
                if f".{new}." in name:
                    tensors[name.replace(f".{new}.", f".{was}.")] = tensors.pop(name)

    edit_tensors(folder / VAE, rename)
    assert any(name.endswith("query.weight") for name in safetensors_header(folder / VAE))
    load_pipeline(str(folder))


def test_tied_weights(tmp_path: Path) -> None:
    config = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=16)
    T5EncoderModel(config).save_pretrained(tmp_path)
    check_keys(tmp_path, T5EncoderModel)
    assert "encoder.embed_tokens.weight" not in load_file(tmp_path / "model.safetensors")
    edit_tensors(tmp_path / "model.safetensors", lambda t: t.pop("shared.weight"))
    with pytest.raises(ModelLoadError, match="embed_tokens"):
        check_keys(tmp_path, T5EncoderModel)


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


def test_building_is_bounded() -> None:
    """Whatever a configuration calls its layers: what is built is counted."""
    with pytest.raises(ModelLoadError, match="far larger"), bounded(3, "x"):
        torch.nn.Sequential(*(torch.nn.Identity() for _ in range(10_000)))
    with bounded(3, "x"):
        torch.nn.Linear(2, 2)
    with torch.device("meta"), pytest.raises(ModelLoadError, match="tables"), bounded(3, "x"):
        torch.nn.Module().register_buffer("x", torch.empty(1 << 32))


def test_controlnets(tmp_path: Path) -> None:
    ControlNetModel.from_unet(unet(), conditioning_channels=3).save_pretrained(tmp_path)
    load_controlnet(str(tmp_path), torch.float32)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    key = "controlnet_mid_block.bias"
    for change in (lambda t: t.pop(key), lambda t: t.update({key: torch.zeros(1)}), lambda t: t[key].fill_(torch.nan)):
        edit_tensors(file, change)
        with pytest.raises(ModelLoadError, match=key):
            load_controlnet(str(tmp_path), torch.float32)
        save_file(tensors, file)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ModelLoadError, match="config.json"):
        load_controlnet(str(tmp_path), torch.float32)


def test_halves_of_a_lora(whole: Path, tmp_path: Path) -> None:
    pipe, file = load_pipeline(str(whole)), tmp_path / "lora.safetensors"
    key = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    good = {f"{key}.lora_A.weight": rand(2, 32), f"{key}.lora_B.weight": rand(32, 2)}
    cases = [
        ({k: v for k, v in good.items() if "lora_A" in k}, "lora_B"),
        ({k: v for k, v in good.items() if "lora_B" in k}, "lora_A"),
        (good | {f"{key}.lora_A.weight": torch.full((2, 32), torch.nan)}, "not finite"),
    ]
    for tensors, word in cases:
        save_file(tensors, file)
        with pytest.raises(ModelLoadError, match=word):
            load_lora(pipe, str(file), "one")
    save_file(good, file)
    load_lora(pipe, str(file), "one")


def test_no_image_that_is_not_a_number_comes_out_silently(whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = accelerate(load_pipeline(str(whole)))
    with caplog.at_level(logging.WARNING, "diffusion_accel"):
        draw(pipe)
        assert not caplog.records
        with pytest.raises(ConfigurationError, match="latents"):
            draw(pipe, latents=torch.full((1, 4, 8, 8), torch.nan))
        pipe.scheduler.alphas_cumprod[:] = torch.nan  # the first prediction is still whole
        for kind in ("pil", "latent"):
            draw(pipe, output_type=kind)
            assert "not finite" in caplog.text
            caplog.clear()
        with torch.no_grad():
            pipe.unet.conv_in.bias[0] = torch.nan
        with pytest.raises(CallStateError, match="first prediction"):
            draw(pipe)
    assert not pipe.unet._forward_hooks and not pipe.vae.decoder._forward_hooks


def test_arguments_of_a_call_are_finite(whole: Path) -> None:
    pipe = accelerate(load_pipeline(str(whole)))
    broken = np.full((1, 8, 8, 3), np.nan, np.float32)
    for name, value in {
        "guidance_scale": float("nan"),
        "guidance_rescale": float("inf"),
        "prompt_embeds": torch.full((1, 8, 16), torch.nan),
        "ip_adapter_image_embeds": [torch.full((2, 1, 4), torch.nan)],
        "ip_adapter_image": broken,
        "sigmas": [1.0, float("nan")],
    }.items():
        with pytest.raises(ConfigurationError, match=f"^{name} holds numbers that are not finite"):
            draw(pipe, **{name: value})


def test_classes_that_are_built_in_their_own_way_are_left_to_their_loader(tmp_path: Path) -> None:
    unet().save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    edit_tensors(tmp_path / "diffusion_pytorch_model.safetensors", lambda t: t.pop("conv_in.bias"))
    check_keys(tmp_path, UNet2DConditionModel)
    check_keys(tmp_path / "missing", CLIPTextModel)
