"""Checkpoints that are damaged, or of another layout: refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file, save_file

from diffusion_accel import ModelLoadError
from diffusion_accel.errors import ConfigurationError
from diffusion_accel.quant.model import digest_of_version_1
from diffusion_accel.quant.spec import VERSION


def damaged(checkpoint: Path, tmp_path: Path) -> Path:
    shutil.copytree(checkpoint, tmp_path / "pipe")
    return tmp_path / "pipe" / "unet"


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= values
    (folder / "config.json").write_text(json.dumps(config))


def change_weights(folder: Path, change: Any) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def flip(tensors: dict[str, torch.Tensor]) -> None:
    tensors["conv_in.weight_codes"][0, 0] ^= 1


def test_a_newer_version_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = damaged(checkpoint, tmp_path)
    change_config(folder, version=VERSION + 1)
    with pytest.raises(ModelLoadError, match=f"layout version {VERSION + 1}, this package reads up to {VERSION}"):
        DiffusionPipeline.from_pretrained(folder.parent)


def swap(tensors: dict[str, torch.Tensor]) -> None:
    one, two = "down_blocks.0.resnets.0.norm1.weight", "down_blocks.0.resnets.0.norm2.weight"
    tensors[one], tensors[two] = tensors[two] + 0.5, tensors[one].clone()


def put(name: str, value: float) -> Any:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[0] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (flip, "its weights are not the ones it was saved with"),
        (swap, "its weights are not the ones it was saved with"),
        (put("conv_out.bias", 3.0), "its weights are not the ones it was saved with"),
        (put("conv_norm_out.bias", float("nan")), "conv_norm_out.bias has values that are no finite numbers"),
        (put("conv_in.weight_scale", float("inf")), "conv_in.weight_scale has values that are no finite numbers"),
        (put("conv_in.input_scale", 0.0), "conv_in.input_scale has values that are no finite numbers above 0"),
        (lambda t: t.pop("conv_in.weight_scale"), "it has no conv_in.weight_scale"),
        (lambda t: t.pop("conv_norm_out.weight"), "it has no conv_norm_out.weight"),
        (lambda t: t.update({"conv_in.weight_codes": t["conv_in.weight_codes"][:, :-1].clone()}), "has shape"),
        (lambda t: t.update({"conv_norm_out.weight": t["conv_norm_out.weight"][:-1].clone()}), "has shape"),
        (lambda t: t.update({"conv_in.weight_scale": t["conv_in.weight_scale"].half()}), "is torch.float16 instead"),
    ],
)
def test_damaged_weights_are_refused(checkpoint: Path, tmp_path: Path, change: Any, says: str) -> None:
    folder = damaged(checkpoint, tmp_path)
    change_weights(folder, change)
    with pytest.raises(ModelLoadError, match=says):
        UNet2DModel.from_pretrained(folder)


def test_the_digest_covers_the_config_and_cannot_be_left_out(checkpoint: Path, tmp_path: Path) -> None:
    folder = damaged(checkpoint, tmp_path)
    file = folder / "config.json"
    whole = json.loads(file.read_text())
    quantization = whole["quantization_config"]
    for changed, says in (
        ({**whole, "norm_eps": 0.1}, "its config.json is not the one it was saved with"),
        (whole | {"quantization_config": quantization | {"timesteps": quantization["timesteps"][::-1]}}, "config.json"),
        (whole | {"quantization_config": quantization | {"recipe": {"bits": "w2"}}}, "config.json is not"),
        (whole | {"quantization_config": {k: v for k, v in quantization.items() if k != "digest"}}, "has no digest"),
    ):
        file.write_text(json.dumps(changed))
        with pytest.raises(ModelLoadError, match=says):
            UNet2DModel.from_pretrained(folder)
    file.write_text(json.dumps({**whole, "_diffusers_version": "0.1"}))  # a note about how it was saved
    UNet2DModel.from_pretrained(folder)


def test_the_first_layout_is_read_with_a_warning_and_saved_in_the_current_one(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = damaged(checkpoint, tmp_path)
    digest = digest_of_version_1(UNet2DModel.from_pretrained(folder))
    change_config(folder, version=1, digest=digest)
    model = UNet2DModel.from_pretrained(folder)
    assert "layout version 1, whose digest covers the quantized layers alone" in caplog.text
    change_config(folder, digest=None)
    with pytest.raises(ModelLoadError, match="no digest"):
        UNet2DModel.from_pretrained(folder)
    change_config(folder, digest=digest)
    model.save_pretrained(tmp_path / "again")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        saved, first = ((f / name).read_bytes() for f in (tmp_path / "again", checkpoint / "unet"))
        if name == "config.json":
            saved, first = ({**json.loads(text), "_name_or_path": ""} for text in (saved, first))
        assert saved == first
    change_weights(folder, flip)
    with pytest.raises(ModelLoadError, match="its weights are not the ones it was saved with"):
        UNet2DModel.from_pretrained(folder)


def test_a_truncated_file_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = damaged(checkpoint, tmp_path)
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    from diffusion_accel.pipelines.loading import load_pipeline

    with pytest.raises(ModelLoadError, match="cut off"):
        load_pipeline(str(folder.parent))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"layers": {}}, "names no layers"),
        ({"layers": {"conv_in": {"weight_bits": 40}}}, "weight_bits must be 2 to 8, got 40"),
        ({"layers": {"conv_in": {"weight_bits": 4, "colour": 3}}}, "unknown colour"),
        ({"layers": {"nowhere": {"weight_bits": 4}}}, "has no layer nowhere"),
        ({"layers": {"conv_act": {"weight_bits": 4}}}, "not a quantizable layer"),
        ({"layers": {"conv_in": {"weight_bits": 4, "compact_grids": True}}}, "compact_grids needs"),
        ({"timesteps": "often"}, "timesteps must be a list"),
        ({"timesteps": [750.0, float("nan"), 0.0]}, "nan is no timestep"),
        ({"timesteps": [float("inf"), 250.0, 0.0]}, "inf is no timestep"),
        ({"timesteps": [10**39, 250, 0]}, "is no timestep"),
        ({"timesteps": [0.0, 0.0, 0.0]}, "not in order"),
        ({"timesteps": [True, 250.0, 0.0]}, "timesteps must be a list of numbers"),
        ({"timesteps": list(range(5000))}, "5000 timesteps, at most 4096"),
        ({"layers": []}, "names no layers"),
        ({"layers": {"conv_in": [4]}}, "unknown not a table"),
        ({"layers": {"conv_in": {"weight_bits": 10**39}}}, "weight_bits must be 2 to 8, got 10000"),
        ({"layers": {"conv_in": {"weight_bits": 4, "per_channel": "yes"}}}, "per_channel must be true or false"),
        ({"layers": {"conv_in": {"weight_bits": 4, "sqnr": float("inf")}}}, "sqnr must be a finite number"),
        ({"layers": {"conv_in": {"weight_bits": 4, "split": 10**20}}}, "split must be a number of channels"),
        ({"layers": {"conv_in": {"weight_bits": 4, "split": 3}}}, "has no 3 channels to split"),
        ({"softmax": 8}, "softmax must be a table"),
        ({"softmax": {"mid_block.attentions.0": 99}}, "must be 2 to 16, got 99"),
        ({"recipe": "none"}, "recipe must be a table"),
        ({"digest": 5}, "digest must be a hash"),
        ({"version": [1]}, "no version this package knows"),
        ({"timesteps": []}, "activation bits but no timesteps"),
        ({"version": None}, "no version"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(
    checkpoint: Path, tmp_path: Path, values: dict[str, Any], says: str
) -> None:
    folder = damaged(checkpoint, tmp_path)
    change_config(folder, **values)
    with pytest.raises((ModelLoadError, ConfigurationError), match=says):
        UNet2DModel.from_pretrained(folder)
