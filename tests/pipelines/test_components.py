"""What the classes of components expect of their weights, compared before anything is drawn."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, UNet2DConditionModel
from model_folder import TEXT, UNET, VAE, draw, edit_json, edit_tensors, refused
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, T5Config, T5EncoderModel
from zoo import controlnet_model, unet

from diffusion_accel import ModelLoadError
from diffusion_accel.model_files.headers import safetensors_header
from diffusion_accel.pipelines.components import bounded, check_keys
from diffusion_accel.pipelines.loading import load_controlnet, load_pipeline


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


@pytest.mark.parametrize("part", ["controlnet", "controlnet_1"])
def test_several_controlnets_in_a_folder(part: str, whole: Path, tmp_path: Path) -> None:
    """Each is checked as one alone is: a damaged one is refused before memory is taken for it."""
    nets = [controlnet_model(number) for number in range(2)]
    parts = load_pipeline(str(whole)).components
    pipe = StableDiffusionControlNetPipeline(**parts, controlnet=nets, requires_safety_checker=False)
    pipe.save_pretrained(tmp_path / "m")
    load_pipeline(str(tmp_path / "m"))
    place = tmp_path / "m" / part
    weights, config = place / "diffusion_pytorch_model.safetensors", place / "config.json"
    good = weights.read_bytes(), config.read_bytes()
    key = "controlnet_mid_block.bias"
    for change, words in (
        (lambda: edit_tensors(weights, lambda t: t.pop(key)), (f"{place} does not fit", "have no " + key)),
        (lambda: edit_tensors(weights, lambda t: t.update({key: torch.zeros(1)})), (str(place), key, "[1]")),
        (lambda: weights.write_bytes(good[0][:-5]), (str(weights), "is cut off")),
        (lambda: weights.rename(weights.with_suffix(".bin")), (part, "is a pickle, which can run code")),
        (lambda: config.write_text("[1]"), (str(config), "is not a table of settings")),
        (lambda: edit_json(config, block_out_channels=[10**7, 10**7]), (str(place), "does not fit", "[16] instead")),
        (lambda: edit_json(config, layers_per_block=10**5), (str(config), "layers_per_block must be at most")),
    ):
        change()
        refused(tmp_path / "m", *words)
        weights.with_suffix(".bin").unlink(missing_ok=True)
        weights.write_bytes(good[0])
        config.write_bytes(good[1])
    load_pipeline(str(tmp_path / "m"))


def test_classes_that_are_built_in_their_own_way_are_left_to_their_loader(tmp_path: Path) -> None:
    unet().save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    edit_tensors(tmp_path / "diffusion_pytorch_model.safetensors", lambda t: t.pop("conv_in.bias"))
    check_keys(tmp_path, UNet2DConditionModel)
    check_keys(tmp_path / "missing", CLIPTextModel)
