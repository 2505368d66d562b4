"""Quantizing from files to files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from quantized import draw, tiny_pipeline
from safetensors.torch import load_file, save_file

from diffusion_accel import quantize_files
from diffusion_accel.errors import AccelerationError, ModelLoadError, OutputError
from diffusion_accel.quant.affine import codes_of, values_of, weight_grid
from diffusion_accel.quant.layers import QuantizedLayer
from diffusion_accel.quant.model import quantized_layers
from diffusion_accel.quant.spec import LayerSpec
from diffusion_accel.quant.stored import verify

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "pipe"
    tiny_pipeline().save_pretrained(folder)
    return folder


def layers_of(folder: Path) -> dict[str, QuantizedLayer]:
    return quantized_layers(DiffusionPipeline.from_pretrained(folder).unet)


@pytest.mark.parametrize(("bits", "group"), [(4, 16), (3, 0), (8, 64)])
def test_every_weight_is_the_nearest_on_its_grid(plain: Path, tmp_path: Path, bits: int, group: int) -> None:
    report = quantize_files(plain, tmp_path / "made", weight_bits=bits, group=group)
    pipe = DiffusionPipeline.from_pretrained(plain)
    made = layers_of(tmp_path / "made")
    assert report.layers == len(made) > 10
    for name, layer in made.items():
        weight = pipe.unet.get_submodule(name).weight.detach()
        spec = LayerSpec(8 if name in ("conv_in", "conv_out") else bits, group)
        assert (layer.spec.weight_bits, layer.spec.weight_group) == (spec.weight_bits, group)
        shrink = (1.0,) if spec.weight_bits == 8 else tuple(1 - 0.04 * j for j in range(10))
        rows = weight.flatten(1)
        grid = weight_grid(rows, spec, shrink, norm=2.0)
        expected = values_of(codes_of(rows, *grid, spec), *grid, spec)
        assert torch.allclose(layer.floats().flatten(1), expected, atol=1e-6), name
        noise = 10 * torch.log10(rows.square().sum() / (layer.floats().flatten(1) - rows).square().sum())
        assert report.sqnr[name] == pytest.approx(float(noise), abs=0.01)
    rest = set(pipe.unet.state_dict()) - {f"{name}.weight" for name in made}
    twin = DiffusionPipeline.from_pretrained(tmp_path / "made").unet.state_dict()
    assert rest and all(torch.equal(pipe.unet.state_dict()[name], twin[name]) for name in rest)


def test_the_checkpoint_is_one_like_any_other(plain: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    quantize_files(plain, made, weight_bits=8, activation_bits=8)
    warnings: list[str] = []
    spec, _ = verify(made / "unet", [made / "unet" / WEIGHTS], warnings.append)
    assert not warnings and not spec.timesteps and all(layer.dynamic for layer in spec.layers.values())
    pipe = DiffusionPipeline.from_pretrained(made)
    images, reference = draw(pipe), draw(DiffusionPipeline.from_pretrained(plain))
    assert 0 < float((images - reference).abs().mean()) < 0.02
    pipe.save_pretrained(tmp_path / "again")
    again = tmp_path / "again" / "unet" / WEIGHTS
    assert load_file(again).keys() == load_file(made / "unet" / WEIGHTS).keys()
    assert torch.equal(draw(DiffusionPipeline.from_pretrained(tmp_path / "again")), images)
    for file in plain.rglob("*"):
        if file.is_file() and file.parent.name != "unet":
            assert (made / file.relative_to(plain)).read_bytes() == file.read_bytes()


def test_rows_in_slices_are_the_same_bytes(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize_files(plain, tmp_path / "whole", weight_bits=3, group=16)
    monkeypatch.setattr("diffusion_accel.quant.without_data._ROWS", 100)
    quantize_files(plain, tmp_path / "slices", weight_bits=3, group=16)
    files = [tmp_path / name / "unet" / WEIGHTS for name in ("whole", "slices")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_half_precision_and_several_files(plain: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    pipe = DiffusionPipeline.from_pretrained(plain).to(torch.float16)
    pipe.save_pretrained(source, max_shard_size="20KB")
    assert len(list((source / "unet").glob("*.safetensors"))) > 1
    quantize_files(source, tmp_path / "made", weight_bits=4, group=32)
    stored = load_file(tmp_path / "made" / "unet" / WEIGHTS)
    assert stored["conv_in.bias"].dtype == stored["conv_in.weight_scale"].dtype == torch.float16
    made = layers_of(tmp_path / "made")
    weight = pipe.unet.get_submodule("conv_in").weight.detach().float()
    assert (made["conv_in"].floats() - weight).norm() < 0.01 * weight.norm()


def test_what_cannot_be_quantized_is_refused_and_leaves_nothing(plain: Path, tmp_path: Path) -> None:
    def broken(change: Any) -> Path:
        shutil.rmtree(tmp_path / "source", ignore_errors=True)
        shutil.copytree(plain, tmp_path / "source")
        change(tmp_path / "source")
        return tmp_path / "source"

    def weights(change: Any) -> Any:
        def do(folder: Path) -> None:
            tensors = load_file(folder / "unet" / WEIGHTS)
            change(tensors)
            save_file(tensors, folder / "unet" / WEIGHTS)

        return do

    def config(**values: Any) -> Any:
        def do(folder: Path) -> None:
            file = folder / "unet" / "config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | values))

        return do

    cases = [
        (lambda f: (f / "unet" / WEIGHTS).unlink(), "unet"),
        (weights(lambda t: t.pop("conv_in.weight")), "they lack conv_in.weight"),
        (weights(lambda t: t.update(more=torch.zeros(2))), "they have more"),
        (weights(lambda t: t.update({"conv_in.weight": torch.zeros(2)})), "another shape of conv_in.weight"),
        (weights(lambda t: t["conv_in.weight"].view(-1)[3:4].fill_(float("nan"))), "no finite numbers"),
        (weights(lambda t: t.update({"conv_in.weight": t["conv_in.weight"].int()})), "not floating point"),
        (config(_class_name="os.system"), "unet"),
        (config(quantization_config={"version": 3}), "unet"),
        (lambda f: shutil.rmtree(f / "unet"), "no U-Net or transformer"),
    ]
    for change, says in cases:
        with pytest.raises(ModelLoadError, match=says):
            quantize_files(broken(change), tmp_path / "made")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "file").touch()
    with pytest.raises(OutputError, match="exists"):
        quantize_files(plain, tmp_path / "made")
    for values, says in (({"weight_bits": 9}, "weight_bits must be 2 to 8"), ({"group": 5}, "group must be one of")):
        with pytest.raises(AccelerationError, match=says):
            quantize_files(plain, tmp_path / "other", **values)
